"""The code in README, CONTRIBUTING and the pages of docs runs as it stands."""

import argparse
import ast
import re
import shlex
import types

import pytest

import shunter
from shunter import cli, routers
from shunter.recipes.compare import parse_routers, with_router
from shunter.recipes.config import load_config
from shunter.recipes.registry import find

from .pages import BLOCK, ROOT, run_page

PAGES = ["README.md", "CONTRIBUTING.md", "docs/balance.md", "docs/layers.md", "docs/training.md", "docs/reliability.md"]
PAGES += ["docs/networks.md", "docs/quantised.md", "docs/offload.md"]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SEVERAL_PROCESSES = {"docs/parallel.md"}


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """Each block by itself; those of a page of docs one after the other."""
    if "shunter[lora]" in (ROOT / page).read_text(encoding="utf-8"):
        pytest.importorskip("peft")
    run_page(ROOT / page, monkeypatch, tmp_path, together=page.startswith("docs/"))


def test_every_page_with_code_is_run():
    pages = [page.relative_to(ROOT).as_posix() for page in DOCUMENTS if "```python" in page.read_text(encoding="utf-8")]
    assert {page for page in pages if not page.startswith("docs/tutorials/")} == {*PAGES} | SEVERAL_PROCESSES


@pytest.mark.parametrize("page", sorted(SEVERAL_PROCESSES))
def test_code_that_is_not_run_names_what_there_is(page):
    """Its imports work, and modules of Shunter have what it takes of them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for body in (body for kind, body in BLOCK.findall(text) if kind == "python"):
        tree, names = ast.parse(body), {"shunter": shunter, "parallel": shunter.parallel}
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), page, "exec"), names)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = names.get(node.value.id)
                assert not isinstance(owner, types.ModuleType) or hasattr(owner, node.attr), ast.unparse(node)


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    """To a file that is there, and to a heading of it; pictures have words for who does not see them."""
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert link.startswith("https://") or target.exists(), link
        if heading and not link.startswith("https://"):
            assert heading in _headings(target.read_text(encoding="utf-8")), link
    assert all(len(words) > 10 for words in re.findall(r"!\[([^\]]*)\]", text))


def _headings(text):
    """The headings of a page as links name them."""
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


def test_readme_names_routers_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.search(r"\| who decides \|.*?\n\n", text, re.DOTALL)
    named = {name for cell in re.findall(r"^\|[^|]*\|(.*)\|$", rows.group(), re.MULTILINE) for name in _code(cell)}
    assert named == set(routers.names())


def _code(text):
    return re.findall(r"`(\w+)`", text)


SHOWN = re.compile(r"^(?: {4}|\$ )(shunter (?:.*\\\n)*.*)|`(shunter [^`]+)`", re.MULTILINE)
OF_A_PAGE = {"second_opinion"}  # a router that a page registers


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_have_the_verbs_options_and_settings_that_there_are(page):
    """What a page shows as a command is one, as far as can be told without running it; … stands for anything."""
    for match in SHOWN.finditer(page.read_text(encoding="utf-8")):
        whole, within = match.groups()
        words = shlex.split((whole or within).replace("\\\n", " ").replace("`", ""), comments=bool(whole))[1:]
        if "…" not in " ".join(words):
            try:
                _check_command(words, whole=bool(whole))
            except (ValueError, SystemExit) as error:
                pytest.fail(f"{page.name}: {(whole or within)!r}: {error}")


def _check_command(words, whole):
    parser = cli._parser()
    if not whole:
        parser = _verb(parser, words)
        known = {option for action in parser._actions for option in action.option_strings}
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert options <= known, f"{' '.join(words)}: {options - known}"
    if words[0] in ("train", "compare") and "--resume" not in words and words[1:2] not in ([], ["RECIPE"]):
        args, rest = cli._parser().parse_known_args(words)
        args.overrides = rest
        overrides, recipe = cli.train._overrides(args), find(args.recipe)
        config = load_config(recipe.config, None, overrides + cli.train._short_forms(args))
        for spec in parse_routers(args.routers) if getattr(args, "routers", None) else []:
            if spec not in OF_A_PAGE:
                with_router(recipe, config, spec)
    elif whole:
        _, rest = parser.parse_known_args(words)
        assert words[0] == "branch" or not rest, f"{' '.join(words)}: {rest}"


def _verb(parser, words):
    """The parser of a command's verb, as of `bench routers`."""
    for word in words:
        deeper = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
        if deeper is None:
            break
        assert word in deeper.choices, f"{' '.join(words)}: there is no verb {word}"
        parser = deeper.choices[word]
    return parser
