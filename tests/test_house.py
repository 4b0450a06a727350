"""The tree and the direction of imports are as CONTRIBUTING.md draws them: this test reads that very drawing."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "shunter"


def drawing():
    """The rooms of CONTRIBUTING.md in order: a dotted path and its line, each line importing from lines above alone."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"^    src/shunter/\n((?:    .*\n|\n)+)", text, re.MULTILINE).group(1)
    rooms, parents = {}, []
    for line in filter(str.strip, block.splitlines()):
        match = re.match(r"( +)((?:[\w/]+(?:\.py|/),? *)+)", line)
        if match is None:  # the words of the line above go on
            continue
        depth = (len(match[1]) - 6) // 2
        for name in re.findall(r"[\w/]+(?:\.py|/)", match[2]):
            del parents[depth:]
            rooms[".".join([*parents, name.rstrip("/").removesuffix(".py")])] = len(rooms)
            if name.endswith("/"):
                parents.append(name.rstrip("/"))
    return rooms


def modules(package):
    """Dotted path below the package -> its file; "" is the package's face."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package).with_suffix("").as_posix().replace("/", ".")
        found["" if path == "__init__" else path.removesuffix(".__init__")] = file
    return found


def imports(name, file, known):
    """The modules that a module imports, those inside of functions and for types included."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = [*package[: len(package) - node.level + 1], *filter(None, (node.module or "").split("."))]
            elif node.module and node.module.split(".")[0] == "shunter":
                base = node.module.split(".")[1:]
            else:
                continue
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                yield inner if inner in known else ".".join(base)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "shunter":
                    yield alias.name.partition(".")[2]


def room_of(name, rooms):
    """The line of the drawing that holds a module: the longest path that begins its own."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in rooms:
            return ".".join(parts[:length])
    return None


def faults(package, rooms):
    """What breaks the drawing, in words."""
    known = modules(package)
    found = []
    arrows = {}
    for name, file in known.items():
        if name in ("", "__main__"):  # the face and the start see everything
            continue
        room = room_of(name, rooms)
        inside = any(other.startswith(f"{room}.") for other in rooms) and file.name != "__init__.py"
        if room is None or inside:
            found.append(f"{name} is in no room")
            continue
        arrows[name] = set()
        for target in imports(name, file, known):
            other = room_of(target, rooms)
            if target in ("", "__main__") or other is None:
                found.append(f"{name} imports the face of the package")
                continue
            if target != name and not target.startswith(f"{name}.") and not name.startswith(f"{target}."):
                arrows[name].add(target)
            above = rooms[other] <= rooms[room] or target.startswith(f"{name}.")
            if not above:
                found.append(f"{name} imports {target}, which is below it")
    found += [f"a circle: {' -> '.join(circle)}" for circle in circles(arrows)]
    return found


def circles(arrows):
    """The first circle that each module is met in, as its modules in order."""
    done, path, found = set(), [], []

    def visit(name):
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            path.append(name)
            for target in sorted(arrows.get(name, ())):
                visit(target)
            path.pop()
            done.add(name)

    for name in sorted(arrows):
        visit(name)
    return found


def test_the_tree_is_as_drawn():
    rooms = drawing()
    assert not faults(PACKAGE, rooms)
    for room in rooms:
        path = PACKAGE / room.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"{room} is drawn and not there"


def test_tests_lie_where_what_they_test_lies():
    """A folder of tests is one of the package, but for campaigns and properties of the whole; tests named exist."""
    folders = {file.parent.relative_to(ROOT / "tests") for file in ROOT.glob("tests/**/test_*.py")}
    assert {str(folder) for folder in folders if not (PACKAGE / folder).is_dir()} == {"campaigns", "properties"}
    pages = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("tools/*.py"),
        *ROOT.glob("tests/campaigns/*.py"),
    ]
    for page in pages:
        for name in re.findall(r"\btests/[\w/]+\.py\b", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{page} names {name}"


@pytest.mark.parametrize(
    "files, fault",
    [
        ({"losses.py": "from .moe import MoE"}, "losses imports moe, which is below it"),
        ({"losses.py": "def late():\n    from .hf.hooks import install"}, "losses imports hf.hooks, which is below it"),
        ({"routers/a.py": "from . import b", "routers/b.py": "from .a import c"}, "a circle: routers.a -> routers.b"),
        ({"utils.py": ""}, "utils is in no room"),
        ({"hf/more.py": ""}, "hf.more is in no room"),
        ({"moe/layer.py": "from .. import __version__"}, "moe.layer imports the face of the package"),
    ],
)
def test_what_breaks_the_drawing_is_named(tmp_path, files, fault):
    for file in ("__init__.py", "losses.py", "moe/__init__.py", "routers/__init__.py", "hf/__init__.py", "hf/hooks.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("", encoding="utf-8")
    rooms = drawing()
    assert not faults(tmp_path, rooms)
    for file, text in files.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    assert any(fault in found for found in faults(tmp_path, rooms))
