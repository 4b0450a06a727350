"""Shunter's docstrings to sections that the documentation's reader of Google style knows: an extension of griffe."""

import re

import griffe

SECTION = re.compile(r"^(Args|Attributes):\n((?:    .*\n?|\n(?=    ))+)", re.MULTILINE)
ENTRY = re.compile(r"    (\*{0,2}\w+(?:, \*{0,2}\w+)*): ")


class Docstrings(griffe.Extension):
    """Set off sources and examples, and give each of several names before one description an entry."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite the docstring of a module, class, function or attribute before it is parsed."""
        if obj.docstring is not None:
            callable_ = obj.is_class or obj.is_function
            obj.docstring.value = sections(obj.docstring.value, list(obj.parameters) if callable_ else None)


def sections(text: str, parameters: list[griffe.Parameter] | None = None) -> str:
    """A docstring with its source in bold, its examples in a section, and each argument in the section it belongs to.

    Args:
        text: a docstring without its indentation; `device, dtype: of the parameters.` becomes two entries.
        parameters: of what the docstring describes. Arguments of a class without any are its attributes (a named
            tuple's); those that are not among them reach it by `**options`, and are "Other Args:".
    """
    text = re.sub(r"^Source: ", "**Source:** ", text, flags=re.MULTILINE)
    text = re.sub(r"(?:^(?:>>>|\.\.\.) .*\n?)+(?:^\S.*\n?)*", _example, text, flags=re.MULTILINE)
    return re.sub(
        r"^(Args|Attributes):\n((?:    .*\n?|\n(?=    ))+)", lambda m: _entries(m, parameters), text, flags=re.M
    )


def _example(match: "re.Match[str]") -> str:
    return "Examples:\n" + "".join(f"    {line}" for line in match[0].splitlines(keepends=True))


def _entries(match: "re.Match[str]", parameters: list[griffe.Parameter] | None) -> str:
    title, found, other = match[1], [], []
    names = {parameter.name for parameter in parameters or ()}
    takes_more = any(parameter.kind is griffe.ParameterKind.var_keyword for parameter in parameters or ())
    for entry in re.split(r"^(?=    \S)", match[2].rstrip("\n"), flags=re.MULTILINE)[1:]:
        given = ENTRY.match(entry)
        for name in given[1].split(", ") if given else [None]:
            one = entry.rstrip("\n") if given is None else f"    {name}: {entry[given.end() :].rstrip()}"
            passed_on = title == "Args" and takes_more and name is not None and name.lstrip("*") not in names
            (other if passed_on else found).append(one)
    if title == "Args" and parameters == []:
        title = "Attributes"
    blocks = [f"{title}:\n" + "\n".join(found)] if found else []
    blocks += ["Other Args:\n" + "\n".join(other)] if other else []
    return "\n\n".join(blocks) + ("\n" if match[2].endswith("\n") else "")
