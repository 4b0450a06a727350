"""What makes the repository a project: version, changelog, checks, issue forms, documentation, distributions."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import shunter
from tests.helpers import TIME_LIMIT

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_is_that_of_the_metadata():
    assert shunter.__version__ == PROJECT["version"]


def test_a_source_folder_that_is_not_installed_has_a_version_too():
    code = (
        "import importlib.metadata as metadata, sys\n"
        "found = metadata.version\n"
        "def version(name):\n"
        "    if name == 'shunter': raise metadata.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "metadata.version = version\n"
        "import shunter; print(shunter.__version__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIME_LIMIT, check=True)
    assert found.stdout.strip() == "0+unknown"


def test_the_changelog_knows_the_version():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert "Unreleased" in headings or PROJECT["version"] in headings
    assert len(headings) == len(set(headings))


def test_a_commit_is_checked_by_what_the_tests_begin_with():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    first = re.search(r"^test: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    assert entries == ["make lint"] and "lint" in first


@pytest.mark.parametrize("form", ["bug", "router"])
def test_issue_forms_ask_each_thing_once(form):
    asked = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(asked)
    ids = [field["id"] for field in asked["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids)) >= 4 and all("label" in f["attributes"] for f in asked["body"] if "id" in f)


def test_every_page_is_in_the_navigation():
    def targets(nav):
        for entry in nav:
            for target in entry.values():
                yield from [target] if isinstance(target, str) else targets(target)

    found = list(targets(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert all((ROOT / target).is_file() for target in found if target.endswith(".md"))
    folders = tuple(target for target in found if target.endswith("/"))
    pages = {page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages - set(found) if not page.startswith(folders)} == set()


@pytest.fixture
def tools(monkeypatch):
    pytest.importorskip("griffe", reason="the pages need the extra [docs]")
    monkeypatch.syspath_prepend(ROOT / "tools")


def test_the_reference_has_what_the_package_says_is_public(tools, tmp_path):
    import docs

    docs.write_reference(tmp_path)
    pages = {page.stem: page.read_text(encoding="utf-8") for page in tmp_path.glob("*.md")}
    for name in shunter.__all__:
        member = getattr(shunter, name)
        assert f"[`{name}`](" in pages["shunter"]
        if isinstance(member, type(shunter)):
            for inner in getattr(member, "__all__", ()):
                assert f"::: shunter.{name}.{inner}\n" in pages[f"shunter.{name}"]
        else:
            assert sum(bool(re.search(rf"^::: shunter\.([a-z]+\.)?{name}$", p, re.M)) for p in pages.values()) == 1
    assert re.findall(r"^ +heading: (\w+)$", pages["routers"], re.MULTILINE) == shunter.routers.names()
    assert {f"## `shunter {verb}`" for verb in ("train", "upcycle", "bench")} <= set(pages["command-line"].splitlines())
    assert "--num" not in pages["command-line"] and "--top-k" in pages["command-line"]


@pytest.mark.parametrize(
    "tag, fault",
    [
        ('<a class="x" href="there.json#part">', None),
        ('<a href="https://arxiv.org/abs/2209.01667">', None),
        ('<a href="gone.json">', "gone.json does not exist"),
        ('<img alt="a" src="gone.png"/>', "gone.png does not exist"),
        ('<img src="https://example.org/a.png">', "fetches https://example.org/a.png"),
        ('<script async src="//example.org/a.js">', "fetches //example.org/a.js"),
    ],
)
def test_pages_that_lack_or_fetch_something_are_refused(tools, tmp_path, monkeypatch, tag, fault):
    import docs

    monkeypatch.setattr(docs, "SITE", tmp_path)
    (tmp_path / "there.json").write_text("{}")
    (tmp_path / "page.html").write_text(f"<p>{tag}</p>")
    assert docs.faults(tmp_path / "page.html") == ([] if fault is None else [f"page.html: {fault}"])


def test_docstrings_become_sections(tools):
    import griffe
    from docstrings import Docstrings

    code = '''
def draw(x, width, *, mask=None, device=None, dtype=None, **options):
    """Draw x.

    >>> draw(1)
    2

    Args:
        x: (T, d),
            on two lines.
        device, dtype: of the result.

        mask: True at real tokens.
        seed: for the options; not an argument of its own.

    Source: A 2020 (Title), section 1;
    B 2021.
    """
'''
    with griffe.temporary_visited_package(
        "made", {"__init__.py": code}, extensions=griffe.Extensions(Docstrings())
    ) as made:
        parsed = made["draw"].docstring.parse("google", warn_missing_types=False)
    sections = {section.kind.value: section.value for section in parsed}
    assert [p.name for p in sections["parameters"]] == ["x", "device", "dtype", "mask"]
    assert sections["parameters"][0].description.split() == "(T, d), on two lines.".split()
    assert {p.description for p in sections["parameters"][1:3]} == {"of the result."}
    assert [p.name for p in sections["other parameters"]] == ["seed"]
    assert sections["examples"][0][1] == ">>> draw(1)\n2"
    assert parsed[-1].value == "**Source:** A 2020 (Title), section 1;\nB 2021."


def test_a_wheel_that_lacks_or_adds_a_file_is_refused(tools, tmp_path, capsys):
    import release

    files = [f"shunter/{file.relative_to(release.PACKAGE).as_posix()}" for file in release.package_files()]
    assert "shunter/py.typed" in files and any("/templates/" in file for file in files)
    wheel = tmp_path / "shunter-1-py3-none-any.whl"
    for change, said in (("lack", "lacks ['shunter/py.typed']"), ("add", "should not have ['tests/data.json']")):
        with zipfile.ZipFile(wheel, "w") as archive:
            for file in files:
                if change != "lack" or file != "shunter/py.typed":
                    archive.writestr(file, "")
            if change == "add":
                archive.writestr("tests/data.json", "")
        with pytest.raises(SystemExit, match=re.escape(said)):
            release.compare(wheel, set(zipfile.ZipFile(wheel).namelist()), set(files))
