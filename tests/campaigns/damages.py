"""Campaign E: what lies on the disk is damaged, and none of it is used in silence."""

import random
import shutil
from pathlib import Path

from shunter.durable import new_folder, verify
from shunter.errors import UserError
from tests.campaigns.campaign import drawn
from tests.campaigns.runs import KINDS, fresh, job


def damage(result, folder, cases, seed):
    """E: a file of a stopped run has a bit flipped, is cut, lost, or swapped with another."""
    for case in cases:
        draw = drawn(seed, case)
        work = job(folder, draw.choice(list(KINDS)))
        with fresh(folder) as run:
            shutil.copytree(work.origin, run)
            files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.stat().st_size]
            _damage(draw, files)
            fault = work.ended(run)
            refused = fault.startswith("exit code 2: shunter train: ") and str(run) in fault
            result.count(case, "" if refused else fault, detected=refused)


def _damage(draw, files):
    path, how = draw.choice(files), draw.choice(["flip", "flip", "cut", "lose", "swap"])
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif how == "lose":
        path.unlink()
    else:
        other = draw.choice(files)
        path.write_bytes(other.read_bytes())


def flips(result, folder, cases, seed):
    """E: one bit of a sealed folder flipped."""
    draw = random.Random(seed)
    sealed = Path(folder) / f"sealed-{seed}"
    if not sealed.exists():
        with new_folder(sealed, step=1) as part:
            for name in ("model.safetensors", "config.json", "optimizer.pt"):
                (part / name).write_bytes(draw.randbytes(2000))
    files = sorted(sealed.iterdir())
    for case in cases:
        draw = drawn(seed, case)
        path = draw.choice(files)
        before = path.read_bytes()
        content = bytearray(before)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            verify(sealed)
            result.count(case, f"a bit of {path.name} was not missed")
        except UserError as error:
            result.count(case, "several lines" if "\n" in str(error) else "", detected=True)
        path.write_bytes(before)
