"""README, docs/ and the docstrings to a site in build/site that needs no network: python tools/docs.py.

Every link is checked, and every warning is an error. The pages keep the paths they have in the repository, so that
relative links hold in both places. What is public is asked of the package: the `__all__` of its face and of its rooms,
the registry of routers, and the command line's own help.
"""

import contextlib
import html
import io
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import griffe
import yaml

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
PAGES, SITE = BUILD / "pages", BUILD / "site"
COPIED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE", "docs")
REFERENCE = "docs/reference"


def main() -> None:
    """Gather the pages, write the reference, build."""
    for folder in (PAGES, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    PAGES.mkdir(parents=True)
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, PAGES / name)
    write_reference(PAGES / REFERENCE)
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    config |= {"docs_dir": "pages", "site_dir": "site", "nav": expanded(config["nav"], PAGES)}
    handler = config["plugins"][1]["mkdocstrings"]["handlers"]["python"]
    handler["paths"] = [str(ROOT / path) for path in handler["paths"]]
    handler["options"]["extensions"] = [str(ROOT / path) for path in handler["options"]["extensions"]]
    (BUILD / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    command = [Path(sys.executable).with_name("zensical"), "build", "--strict", "--clean", "-f", BUILD / "mkdocs.yml"]
    done = subprocess.run(command, cwd=BUILD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    said = re.sub(r"\x1b\[[\d;]*m", "", done.stdout)
    # What is wrong in a docstring is said in a line, and is no warning of the build's.
    if done.returncode or re.search("^(griffe|mkdocstrings|mkdocs_autorefs)", said, re.MULTILINE):
        sys.exit(f"{said.partition('Traceback')[0] or said}\nthe site was not built: the lines above say why")
    wrong = [line for page in sorted(SITE.rglob("*.html")) for line in faults(page)]
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"The site: {SITE / 'index.html'}")


def faults(page: Path) -> list[str]:
    """What is wrong in a page of the site: a file that is not there, or something fetched when the page is read."""
    found = []
    for tag, target in re.findall(r'''<(\w+)\b[^>]*?\b(?:src|href)="([^"]*)"''', page.read_text(encoding="utf-8")):
        url = urlsplit(html.unescape(target))
        if url.netloc and tag != "a":
            found.append(f"{page.relative_to(SITE)}: fetches {target}")
        elif not url.scheme and not url.netloc and url.path:
            file = SITE / url.path.lstrip("/") if url.path.startswith("/") else page.parent / url.path
            if not Path(unquote(str(file))).exists():
                found.append(f"{page.relative_to(SITE)}: {target} does not exist")
    return found


def expanded(nav: list[Any], pages: Path) -> list[Any]:
    """A navigation whose folders (entries that end in /) are their pages; one that is not there is left out."""
    found = []
    for entry in nav:
        for title, target in entry.items():
            if isinstance(target, list):
                found.append({title: expanded(target, pages)})
            elif not target.endswith("/"):
                found.append({title: target})
            elif (pages / target).is_dir():
                inner = [{name: f"{target}{page}"} for page, name in titles(pages / target).items()]
                found.append({title: [f"{target}index.md", *inner]})
    return found


def titles(folder: Path) -> dict[str, str]:
    """The pages that the index.md of a folder links to, in its order, and what it calls them."""
    links = re.findall(r"\[([^\]]+)\]\(([\w.-]+\.md)\)", (folder / "index.md").read_text(encoding="utf-8"))
    found = {page: name.replace("`", "") for name, page in links}
    lost = {page.name for page in folder.glob("*.md")} - set(found) - {"index.md"}
    if lost:
        sys.exit(f"{folder / 'index.md'} does not link to {', '.join(sorted(lost))}")
    return found


def write_reference(folder: Path) -> None:
    """A page for the package's face, one for each public module, for the routers by name, and for the command line."""
    folder.mkdir(parents=True, exist_ok=True)
    package = griffe.load("shunter", search_paths=[ROOT / "src"])
    modules = public_modules(package)
    rows = []
    for path in ["shunter", *modules]:
        module = package if path == "shunter" else modules[path]
        text = face_page(package, modules) if path == "shunter" else f"# `{path}`\n\n{members(path, module)}"
        (folder / f"{path}.md").write_text(text, encoding="utf-8")
        rows.append((f"[`{path}`]({path}.md)", first_sentence(module)))
    (folder / "routers.md").write_text(routers_page(), encoding="utf-8")
    rows.append(("[Routers by name](routers.md)", "every router with its options"))
    (folder / "command-line.md").write_text(command_line_page(), encoding="utf-8")
    rows.append(("[Command line](command-line.md)", "every verb of `shunter` with its options"))
    table = "\n".join(f"| {link} | {what} |" for link, what in rows)
    text = f"""# Reference

Made from the docstrings. T tokens, E experts, k experts of a token, C slots of an expert, d the width of a hidden
state, f of an expert.

| page | what is there |
|---|---|
{table}
"""
    (folder / "index.md").write_text(text, encoding="utf-8")


def public_modules(package: griffe.Module) -> dict[str, griffe.Module]:
    """Dotted path -> module: those in the `__all__` of the package's face, and its rooms that state an `__all__`."""
    public = set(package.exports or ())
    found = {}
    for name, member in sorted(package.members.items()):
        if member.is_alias and not member.target_path.startswith("shunter."):  # what the face imports from elsewhere
            continue
        module = member.final_target if member.is_alias else member
        if not module.is_module:
            continue
        room = module.is_init_module and module.exports and name != "cli"  # its face is the command line
        if name in public or room:
            found[f"shunter.{name}"] = module
    return found


def members(path: str, module: griffe.Module) -> str:
    """The directives of a module: its own text, then each name of its `__all__`."""
    options = {"members": [], "show_root_heading": False, "show_root_toc_entry": False}
    return "\n".join([directive(path, options), *(directive(f"{path}.{name}") for name in module.exports or ())])


def directive(path: str, options: dict[str, Any] | None = None) -> str:
    """What mkdocstrings replaces by the documentation of an object."""
    given = yaml.safe_dump({"options": options}, sort_keys=False) if options else ""
    return f"::: {path}\n{textwrap.indent(given, '    ')}"


def face_page(package: griffe.Module, modules: dict[str, griffe.Module]) -> str:
    """The page of `import shunter`: a line for each public name, and in full what no other page has."""
    homes = {
        module[name].final_target.path if module[name].is_alias else module[name].path: f"{path}.md#{path}.{name}"
        for path, module in modules.items()
        for name in module.exports or ()
        if name in module.members
    }
    rows, here = [], []
    for name in package.exports or ():
        path = f"shunter.{name}"
        member = package.members[name]
        target = member.final_target if member.is_alias else member
        if path in modules:
            link = f"{path}.md"
        elif target.path in homes:
            link = homes[target.path]
        else:
            link = f"#{path}"
            here.append(directive(path))
        rows.append(f"| [`{name}`]({link}) | {first_sentence(target)} |")
    table = "\n".join(rows)
    body = "\n".join(here)
    return f"# `shunter`\n\n{first_sentence(package)}\n\n| name | what it is |\n|---|---|\n{table}\n\n{body}"


def routers_page() -> str:
    """Every router of the registry, by the name that `MoE` takes."""
    from shunter import routers

    parts = ["# Routers by name\n\nThe names that `MoE`, `sparsify` and `upcycle` take as `router=`.\n"]
    for name in routers.names():
        cls = routers.find(name)
        options = {"heading": name, "toc_label": name, "members": [], "show_symbol_type_heading": False}
        parts.append(directive(f"{cls.__module__}.{cls.__qualname__}", options))
    return "\n".join(parts)


def command_line_page() -> str:
    """What `shunter --help` and each verb's `--help` print."""
    os.environ["COLUMNS"] = "100"
    top = help_of()
    parts = [f"# Command line\n\n```text\n{top}```\n"]
    for verb in verbs(top):
        text = help_of(verb)
        parts.append(f"## `shunter {verb}`\n\n```text\n{text}```\n")
        parts += [f"```text\n{help_of(verb, inner)}```\n" for inner in verbs(text)]
    return "\n".join(parts)


def verbs(text: str) -> list[str]:
    """The verbs that a help text lists: argparse indents them by four, below the positional arguments."""
    block = re.search(r"^positional arguments:\n((?: .*\n)+)", text, re.MULTILINE)
    return re.findall(r"^    (\w+) ", block[1], re.MULTILINE) if block else []


def help_of(*arguments: str) -> str:
    """What the command line prints with --help."""
    from shunter.cli import main as cli

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli([*arguments, "--help"])
    return out.getvalue()


def first_sentence(obj: griffe.Object) -> str:
    """The first sentence of a docstring, on one line, for a table's cell."""
    text = " ".join(obj.docstring.value.split("\n\n")[0].split()) if obj.docstring else ""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
