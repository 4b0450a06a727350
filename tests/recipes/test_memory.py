"""Runs on data of 2 GiB by a process that may allocate 1 GiB: what a recipe keeps does not grow with its source."""

import gzip
import json
import os
import subprocess
import sys
import wave

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from tests.conftest import SEED
from tests.recipes import conftest as text
from tests.recipes import test_images, test_multimodal, test_speech

SIZE = 2**31
LIMIT = 2**30

RUN = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, ({LIMIT}, {LIMIT}))  # what is allocated, not what is mapped of files
from shunter.cli import main
sys.exit(main(sys.argv[1:]))
"""


def copies(file, folders):
    """Names of one file in some folders, as many as make `SIZE` bytes and more; it is on the disk once."""
    count = SIZE // file.stat().st_size + 1
    for i in range(count):
        place = folders[i % len(folders)]
        place.mkdir(parents=True, exist_ok=True)
        os.link(file, place / f"{i}{file.suffix}")
    return count


def picture(file):
    draw = np.random.default_rng(SEED)
    Image.fromarray(draw.integers(0, 256, (4000, 4000, 3), dtype=np.uint8)).save(file)
    return file


def write_images(folder):
    return copies(picture(folder.parent / "one.bmp"), [folder / "cat", folder / "dog"])


def write_pairs(folder):
    count = copies(picture(folder.parent / "one.bmp"), [folder])
    for i in range(count):
        (folder / f"{i}.txt").write_text(f"thing {i}")
    return count


def write_sounds(folder):
    """Clips of four seconds at a high rate, of eight channels."""
    samples = np.random.default_rng(SEED).integers(-3000, 3000, 8 * 384_000 * 4, dtype=np.int16)
    with wave.open(str(folder.parent / "one.wav"), "wb") as stream:
        stream.setparams((8, 2, 384_000, 0, "NONE", ""))
        stream.writeframes(samples.astype("<i2").tobytes())
    return copies(folder.parent / "one.wav", [folder / "yes", folder / "no"])


def write_text(folder):
    """A text that is mostly a hole, which takes no disk, and records that unpack to as much; parts of them are used."""
    for name in ("long", "records"):
        (folder / name).mkdir(parents=True)
    (folder / "long/a.txt").write_text("some words to begin with. " * 200_000)
    os.truncate(folder / "long/a.txt", SIZE // 2)
    line = json.dumps({"text": "other words " * 80_000}).encode() + b"\n"
    block = gzip.compress(line * 16)
    with open(folder / "records/b.jsonl.gz", "wb") as stream:
        for _ in range(SIZE // 2 // (16 * len(line)) + 1):
            stream.write(block)
    return None


def write_words(folder):
    """A text file that is read whole, of words that hardly come twice."""
    draw = np.random.default_rng(SEED)
    folder.mkdir()
    with open(folder / "words.txt", "w") as stream:
        while stream.tell() < SIZE:
            letters = draw.integers(ord("a"), ord("z") + 1, (2**20, 8), dtype=np.uint8)
            letters[:, -1] = ord(" ")
            stream.write(letters.tobytes().decode())
    return None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux alone")
@pytest.mark.parametrize(
    "recipe, settings, write",
    [
        ("text", text.SMALL, write_text),
        ("text", [*text.SMALL, "data.tokenizer=bpe", f"data.max_bytes={SIZE}"], write_words),
        ("images", [*test_images.SMALL, "data.eval_share=0.1"], write_images),
        ("multimodal", test_multimodal.SMALL, write_pairs),
        ("speech", [*test_speech.SMALL, "data.seconds=5", "training.batch_tokens=500"], write_sounds),
    ],
)
def test_two_gibibytes_are_trained_on_in_one(recipe, settings, write, tmp_path):
    count = write(tmp_path / "data")
    run = tmp_path / "run"
    settings = [*settings, f"data.source=['{tmp_path / 'data'}']", "training.steps=2"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, "train", recipe, "--run", str(run), *settings],
        capture_output=True,
        text=True,
        timeout=7200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (run / "report.html").is_file()
    if count is not None:
        rows = json.loads((run / "data.json").read_text())["domains"]
        used = [row[key] for row in rows for key in row if key.endswith(("_images", "_pairs", "_clips"))]
        assert sum(used) == count, "all are read"
