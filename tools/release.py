"""A wheel and a source distribution in dist/, checked, then the wheel installed and run where nothing else is.

python tools/release.py, in an environment with the extra [release]. Any failure is the exit code; nothing is published.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

from install import install_cpu_torch, pip

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
PACKAGE = ROOT / "src" / "shunter"
# The main job with its every stage, made as small as its settings allow.
SMALL = (
    "data.max_bytes=60000 data.vocab_size=300 data.sequence_length=32 data.eval_windows=2 model.dim=32 model.layers=1 "
    "model.hidden=96 sparse.num_experts=4 training.steps=4 training.batch_tokens=256 training.warmup=1 "
    "training.eval_every=2 training.log_every=1 training.save_every=4"
).split()


def main() -> None:
    """Build, check, install, run."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    say(f"Building shunter {version}")
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT, quiet=True)
    wheel, source = DIST / f"shunter-{version}-py3-none-any.whl", DIST / f"shunter-{version}.tar.gz"
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, source)
    check_contents(wheel, source, version)
    with tempfile.TemporaryDirectory() as folder:
        try_out(wheel, version, Path(folder))
    say(f"Ready: {wheel.relative_to(ROOT)} and {source.relative_to(ROOT)}")


def check_contents(wheel: Path, source: Path, version: str) -> None:
    """Both hold the package's files, all and no others, and the licence."""
    files = {f"shunter/{file.relative_to(PACKAGE).as_posix()}" for file in package_files()}
    info = f"shunter-{version}.dist-info"
    written = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")}
    compare(wheel, set(zipfile.ZipFile(wheel).namelist()), files | written | {f"{info}/licenses/LICENSE"})

    with tarfile.open(source) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    names = {name for name in names if not name.startswith("src/shunter.egg-info/")}
    written = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    compare(source, names, {f"src/{file}" for file in files} | written)


def package_files() -> list[Path]:
    """What the package is made of: its modules, py.typed, templates."""
    return [file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts]


def compare(archive: Path, names: set[str], wanted: set[str]) -> None:
    """Exit with what an archive lacks or has too much."""
    lacking, extra = sorted(wanted - names), sorted(names - wanted)
    if lacking or extra:
        sys.exit(f"{archive.name} lacks {lacking} and should not have {extra}")
    say(f"{archive.name}: {len(names)} files, the licence, py.typed and the templates among them")


def try_out(wheel: Path, version: str, folder: Path) -> None:
    """Install the wheel into an empty environment, outside of the checkout, and run the main job's first steps."""
    say("Installing the wheel into an empty environment")
    venv.create(folder / "venv", with_pip=True)
    bin_ = folder / "venv" / "bin"
    install_cpu_torch(bin_ / "python")
    if pip(f"{wheel}[train]", python=bin_ / "python").returncode:
        sys.exit("the wheel could not be installed; the lines above say why")
    place = folder / "place"
    place.mkdir()
    code = "import shunter; print(shunter.__version__, shunter.__file__)"
    found, _, file = run(bin_ / "python", "-c", code, quiet=True, cwd=place).strip().partition(" ")
    if found != version or not Path(file).is_relative_to(folder / "venv"):
        sys.exit(f"the environment has shunter {found} of {file}, not the wheel's {version}")
    say("shunter routers")
    table = run(bin_ / "shunter", "routers", quiet=True, cwd=place)
    if "switch" not in table:
        sys.exit(f"shunter routers does not list switch:\n{table}")
    say(f"shunter train text {' '.join(SMALL)}")
    run(bin_ / "shunter", "train", "text", *SMALL, quiet=True, cwd=place)
    result = place / "runs" / "text"
    summary = json.loads((result / "summary.json").read_text(encoding="utf-8"))
    if not {"dense", "sparse"} <= set(summary) or not (result / "report.html").stat().st_size:
        sys.exit("shunter train text left no report of both models")


def run(*command: str | Path, quiet: bool = False, cwd: Path = ROOT) -> str:
    """The standard output of a command, which is shown unless it is quiet; exits with everything where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode or not quiet:
        print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"{done.stderr}\n{' '.join(map(str, command))} failed with exit code {done.returncode}")
    return done.stdout


def say(text: str) -> None:
    """A line of progress."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
