"""Labelled images from folders, IDX files and datasets: what is read, what is held out, what is wrong in one line."""

import gzip
import os
import shutil
import struct
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from shunter.data import labelled_images, spooled
from shunter.data.labelled_images import read_labelled, split
from shunter.errors import UserError
from tests.conftest import SEED

ALL = {"share": 0.25, "most": 1000, "most_held_out": 1000}


@pytest.fixture
def draw():
    return np.random.default_rng(SEED)


def write_idx(folder, part, images, labels, pack=True):
    folder.mkdir(exist_ok=True)
    for what, array in (("images", images), ("labels", labels)):
        head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        name = f"{part}-{what}-idx{array.ndim}-ubyte"
        raw = head + array.astype(np.uint8).tobytes()
        (folder / (name + ".gz" * pack)).write_bytes(gzip.compress(raw) if pack else raw)


def write_folder(root, counts, draw):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(draw.integers(0, 256, (6, 5), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def pixels(found, i):
    with found.images.open(i) as image:
        return np.asarray(image)


@pytest.mark.parametrize("pack", [True, False])
def test_idx_files_give_their_images_labels_and_split(pack, tmp_path, draw):
    images = {part: draw.integers(0, 256, (n, 5, 5), dtype=np.uint8) for part, n in (("train", 20), ("t10k", 8))}
    labels = {part: np.arange(len(array)) % 3 for part, array in images.items()}
    for part in images:
        write_idx(tmp_path / "d", part, images[part], labels[part], pack)
    found = split(read_labelled(str(tmp_path / "d")), **ALL)
    assert found.classes == ["0", "1", "2"] and not found.colours
    for part, numbers in (("train", found.train), ("t10k", found.held_out)):
        assert len(numbers) == len(images[part])
        seen = {int(found.images.where[i].rpartition(" ")[2]) - 1: i for i in numbers}
        assert sorted(seen) == list(range(len(numbers)))
        for place, i in seen.items():
            assert np.array_equal(pixels(found, i), images[part][place]) and found.targets[i] == labels[part][place]


@pytest.mark.parametrize("pack", [True, False])
def test_idx_files_may_be_larger_than_memory(pack, tmp_path, draw, monkeypatch):
    monkeypatch.setattr(spooled, "IN_MEMORY", 2**16)
    monkeypatch.setattr(labelled_images, "_AT_A_TIME", 2**16)
    images = {part: draw.integers(0, 256, (32, 256, 256), dtype=np.uint8) for part in ("train", "t10k")}
    for part, array in images.items():
        write_idx(tmp_path / "d", part, array, np.arange(32) % 2, pack)
    tracemalloc.start()
    try:
        found = split(read_labelled(str(tmp_path / "d")), **ALL)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20, "of 4 MiB of pixels"
    for i in (found.train[3], found.held_out[5]):
        part = "train" if i in found.train else "t10k"
        assert np.array_equal(pixels(found, i), images[part][int(found.images.where[i].rpartition(" ")[2]) - 1])


def test_no_file_is_read_whole_to_find_that_it_is_no_image(tmp_path, draw, monkeypatch):
    root = write_folder(tmp_path / "a", {"cat": 6, "dog": 6}, draw)
    (root / "cat/0.png").write_bytes(b"words")
    os.truncate(root / "cat/0.png", 2**25)
    with open(root / "dog/0.png", "ab") as stream:
        stream.write(bytes(3000))
    monkeypatch.setattr(labelled_images, "_LARGEST", 2000)
    tracemalloc.start()
    try:
        found = split(read_labelled(str(root)), **ALL)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**24 and "cat/0.png: not an image" in found.left_out
    assert "dog/0.png: is larger than 2,000 bytes" in found.left_out and found.left_out.startswith("Left out 2 of 12")


def test_a_folder_gives_a_share_of_each_class_or_what_it_says_itself(tmp_path, draw):
    found = split(read_labelled(str(write_folder(tmp_path / "a", {"cat": 8, "dog": 12}, draw))), **ALL)
    held_out = [found.images.labels[i] for i in found.held_out]
    assert held_out.count("cat") == 2 and held_out.count("dog") == 3 and len(found.train) == 15
    counts = {"train/cat": 4, "train/dog": 5, "test/cat": 2, "test/dog": 3}
    own = split(read_labelled(str(write_folder(tmp_path / "b", counts, draw))), **ALL)
    assert len(own.train) == 9 and {own.images.where[i].split("/")[-3] for i in own.held_out} == {"test"}
    fewer = split(read_labelled(str(tmp_path / "b")), share=0.25, most=4, most_held_out=2)
    assert len(fewer.train) <= 5 and len(fewer.held_out) == 2
    for part in (fewer.train, fewer.held_out):
        assert {fewer.images.labels[i] for i in part} == {"cat", "dog"}


def test_a_dataset_of_the_datasets_library(tmp_path, draw, monkeypatch):
    datasets = pytest.importorskip("datasets")
    arrays = [draw.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(8)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])})
    rows = {"img": [Image.fromarray(array) for array in arrays], "label": [0, 1] * 4}
    whole = datasets.Dataset.from_dict(rows, features=features)
    asked = datasets.DatasetDict({"train": whole.select(range(6)), "test": whole.select([6, 7])})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked)
    found = split(read_labelled("someone/pictures"), **ALL)
    assert found.classes == ["a", "b"] and found.colours and len(found.held_out) == 2
    assert {found.images.where[i] for i in found.held_out} == {f"someone/pictures, test, record {n}" for n in (1, 2)}
    for i in found.train:
        place = int(found.images.where[i].rpartition(" ")[2]) - 1
        assert np.array_equal(pixels(found, i), arrays[place]) and found.targets[i] == 1 - place % 2


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path, draw):
    root = write_folder(tmp_path / "a", {"cat": 6, "dog": 6}, draw)
    (root / "cat/0.png").write_bytes((root / "cat/0.png").read_bytes()[:50])
    (root / "dog/1.png").write_bytes(b"")
    found = split(read_labelled(str(root)), **ALL)
    assert found.left_out.startswith("Left out 2 of 12 images: ")
    assert "cat/0.png: not an image" in found.left_out and "dog/1.png: not an image" in found.left_out
    used = [*found.train, *found.held_out]
    assert len(used) == 10 and not any("cat/0.png" in found.images.where[i] for i in used)


def test_the_fingerprint_is_of_what_is_used(tmp_path, draw):
    root = write_folder(tmp_path / "a", {"cat": 6, "dog": 6}, draw)
    first = split(read_labelled(str(root)), **ALL).fingerprint
    shutil.copytree(root, tmp_path / "b")
    assert split(read_labelled(str(tmp_path / "b")), **ALL).fingerprint == first, "the place is not part of it"
    content = bytearray((root / "dog/3.png").read_bytes())
    content[-20] ^= 1
    (root / "dog/3.png").write_bytes(content)
    assert split(read_labelled(str(root)), **ALL).fingerprint != first
    os.rename(tmp_path / "b/cat/0.png", tmp_path / "b/dog/z.png")
    assert split(read_labelled(str(tmp_path / "b")), **ALL).fingerprint != first


def empty(root, draw):
    root.mkdir()


def one_class(root, draw):
    write_folder(root, {"cat": 6}, draw)


def bare(root, draw):
    write_folder(root, {"cat": 6, "dog": 6}, draw)
    shutil.copy(root / "cat/0.png", root / "loose.png")


def alone(root, draw):
    write_folder(root, {"cat": 6, "dog": 1}, draw)


def strange(root, draw):
    write_idx(root, "train", draw.integers(0, 9, (6, 3, 3)), np.array([0, 1] * 3))
    write_idx(root, "t10k", draw.integers(0, 9, (2, 3, 3)), np.array([0, 7]))


def uneven(root, draw):
    write_idx(root, "train", draw.integers(0, 9, (6, 3, 3)), np.array([0, 1]))


def without_labels(root, draw):
    write_idx(root, "train", draw.integers(0, 9, (6, 3, 3)), np.array([0, 1] * 3))
    (root / "train-labels-idx1-ubyte.gz").unlink()


def short(root, draw):
    write_idx(root, "train", draw.integers(0, 9, (6, 3, 3)), np.array([0, 1] * 3), pack=False)
    file = root / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])


def cut(root, draw):
    write_idx(root, "train", draw.integers(0, 9, (60, 3, 3)), np.array([0, 1] * 30))
    file = root / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-12])


def no_idx(root, draw):
    write_idx(root, "train", draw.integers(0, 9, (6, 3, 3)), np.array([0, 1] * 3), pack=False)
    (root / "train-images-idx3-ubyte").write_bytes(b"words")


def huge(root, draw):
    write_idx(root, "train", draw.integers(0, 9, (6, 3, 3)), np.array([0, 1] * 3))
    head = struct.pack(">HBB3I", 0, 8, 3, 2**15, 2**7, 2**7)
    (root / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head))


def countless(root, draw):
    """Images of one pixel, of which a megabyte of gzip has a thousand million."""
    write_idx(root, "train", np.zeros((1_100_000, 1, 1)), np.zeros(1_100_000))


def all_bad(root, draw):
    write_folder(root, {"cat": 2, "dog": 2}, draw)
    for file in root.rglob("*.png"):
        file.write_bytes(b"words")


def two_of_a_name(root, draw):
    write_folder(root, {"cat/2020": 3, "dog/2021": 3, "dog/2020": 3}, draw)


def without_classes(root, draw):
    write_folder(root, {"train/cat": 3, "train/dog": 3, "test": 3}, draw)


def of_no_size(root, draw):
    write_idx(root, "train", np.zeros((6, 0, 3)), np.array([0, 1] * 3))


def no_folder(root, draw):
    pass


@pytest.mark.parametrize(
    "make, said",
    [
        (empty, "no file in this folder ends in"),
        (one_class, "has images of one class to train on, 'cat'"),
        (bare, "loose.png: an image belongs into a folder that is named as its class, as in"),
        (alone, "class 'dog' has no image that could be held out"),
        (strange, "t10k-images-idx3-ubyte.gz, record 2: its class '7' is none of those"),
        (uneven, "holds 6 images, and train-labels-idx1-ubyte.gz 2 labels"),
        (without_labels, "has no train-labels beside train-images-idx3-ubyte.gz"),
        (short, "its head says 54 bytes, and 53 follow"),
        (cut, "train-images-idx3-ubyte.gz: cannot be read"),
        (no_idx, "is no IDX file of bytes in 3 dimensions"),
        (huge, "unpack it (gunzip)"),
        (countless, "train-images-idx3-ubyte.gz: holds 1,100,000 images; of its size at most 1,048,5"),
        (all_bad, "4 of 4 images cannot be read, the first: "),
        (two_of_a_name, "cat/2020 and dog/2020 have one name; put the images of a class into one folder"),
        (without_classes, "test/0.png: an image of test belongs into a folder that is named as its class, as in"),
        (of_no_size, "its head says 6 by 0 by 3 bytes, which is nothing"),
        (no_folder, "no such folder"),
    ],
)
def test_bad_data_are_one_line_with_file_and_record(make, said, tmp_path, draw):
    make(tmp_path / "data", draw)
    with pytest.raises(UserError) as error:
        split(read_labelled(str(tmp_path / "data")), **ALL)
    assert said in str(error.value) and "\n" not in str(error.value)
