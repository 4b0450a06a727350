"""Sounds with what is said in them: of a folder, a table, or digits that a synthesiser speaks in many voices."""

from __future__ import annotations

import csv
import hashlib
import io
import random
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, escaped, one_line
from ..untrusted import open_file, parse_json
from . import espeak
from .files import LeftOut, files_in, say_left_out
from .hub import is_dataset, load_splits
from .labelled_images import HELD_OUT
from .sifting import at_most, left_out, sift
from .sounds import RATE, SUFFIXES, Sound, read_sound, resampled
from .tables import check_names

__all__ = ["SYNTHESISED", "Clip", "Corpus", "digits", "read_clips", "split", "synthesised", "words_of"]

SYNTHESISED = "synthesised"
"""What stands for the built-in sounds among sources."""
UNKNOWN = "unknown"
_TABLES = {".csv", ".jsonl", ".tsv"}
_MOST_ROWS = 1_000_000
_COLUMNS = {
    "path": ("path", "file", "file_name", "filename", "audio", "wav"),
    "text": ("text", "transcript", "transcription", "sentence", "label"),
    "language": ("language", "locale", "lang"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "split": ("split",),
}

DIGITS = {
    "en": "zero one two three four five six seven eight nine",
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve",
    "fr": "zéro un deux trois quatre cinq six sept huit neuf",
    "it": "zero uno due tre quattro cinque sei sette otto nove",
    "ru": "ноль один два три четыре пять шесть семь восемь девять",
}
"""The words for 0 to 9 by language."""

# Of eSpeak's voices, those that are no robots, whispers or jokes, and no two of one name.
VOICES = (
    "Alex Alicia Andrea Andy Annie Denis Diogo Gene Hugo Jacky Lee Marco Mario Michael Mike Nguyen Reed adam anika "
    "antonio aunty belinda benjamin boris caleb david ed f1 f2 f3 f4 f5 grandma grandpa gustave ian iven john klatt "
    "linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo max michel miguel norbert pablo paul pedro quincy rob robert sandro shelby "
    "steph travis victor zac"
).split()


@dataclass(frozen=True)
class Clip:
    """A sound and what is known of it.

    Args:
        where: what names it for people: its file, or its table and record.
        text: what is said, as it was written down.
        language, speaker: of the one who speaks; `UNKNOWN` and "" where nobody says.
        held_out: whether the data themselves hold it out (True) or train on it (False); None where they do not say.
        read: its sound, which lasts so many seconds at most.
        raw: the bytes that tell it from any other, in parts.
        corpus: what its source is called.
        license, source: in words.
        wrong: why it cannot be used, where its record alone says so.
    """

    where: str
    text: str
    language: str
    speaker: str
    held_out: bool | None
    read: Callable[[float], Sound]
    raw: Callable[[], Iterator[bytes]]
    corpus: str
    license: str
    source: str
    wrong: str = ""


def words_of(text: str) -> str:
    """A transcript as it is learned: small letters of one form (NFC), no punctuation but within words."""
    plain = unicodedata.normalize("NFC", text).lower()
    kept = (c if c.isalnum() or unicodedata.category(c)[0] == "M" or c in "'’-" else " " for c in plain)
    return " ".join(word for part in "".join(kept).split() if (word := part.strip("'’-")))


def synthesised(
    voices: int, takes: int, longest: int, *, languages: Sequence[str], noise: tuple[float, float], seed: int = 0
) -> list[Clip]:
    """Strings of digits in several languages, spoken by eSpeak NG, with white noise.

    A voice has a timbre of eSpeak's, a pitch and a speed of its own, in all languages.

    Args:
        voices: how many speak, `VOICES` at most.
        takes: strings of a voice in a language.
        longest: digits of a string; each has 1 to so many.
        languages: of `DIGITS`.
        noise: the least and the greatest signal-to-noise ratio, in dB.
        seed: of what is said, how, and the noise.

    Raises:
        ModuleNotFoundError: without espeakng-loader.
        UserError: where it fails.
    """
    draw = random.Random(seed)
    said: list[tuple[espeak.Utterance, str, str]] = []
    for voice in draw.sample(VOICES, voices):
        speed, pitch = draw.randint(150, 210), draw.randint(35, 65)
        for language in languages:
            words = DIGITS[language].split()
            for _ in range(takes):
                text = " ".join(draw.choices(words, k=draw.randint(1, longest)))
                said.append((espeak.Utterance(text, f"{language}+{voice}", speed, pitch), language, voice))
    try:
        sounds = espeak.speak([utterance for utterance, _, _ in said])
    except RuntimeError as error:
        raise UserError(f"the built-in sounds cannot be synthesised: {one_line(error)}") from None
    source = f"strings of digits synthesised by eSpeak NG, pip package espeakng-loader {espeak.version()}"
    clips = []
    for i, ((utterance, language, voice), spoken) in enumerate(zip(said, sounds, strict=True)):
        samples = _noisy(_trimmed(spoken), noise, np.random.default_rng([seed, i]))
        clips.append(
            Clip(
                f"{voice} saying {utterance.text!r}",
                utterance.text,
                language,
                voice,
                None,
                lambda seconds, samples=samples: Sound(samples.astype(np.float32) / 32768, RATE),  # type: ignore[misc]
                lambda samples=samples: iter([samples.tobytes()]),  # type: ignore[misc]
                SYNTHESISED,
                "none of its own; eSpeak NG is GPL-3.0",
                source,
            )
        )
    return clips


def _trimmed(spoken: Any) -> Any:
    """Samples without the silence at their ends."""
    loud = np.flatnonzero(np.abs(spoken.astype(np.int32)) > 300)
    return spoken[loud[0] : loud[-1] + 1] if len(loud) else spoken


def _noisy(spoken: Any, noise: tuple[float, float], generator: np.random.Generator) -> Any:
    """Samples of eSpeak, at `RATE`, equally loud, with noise, as 16-bit numbers."""
    clean = resampled(spoken.astype(np.float32), espeak.RATE)
    clean = np.pad(clean / max(float(np.sqrt(np.mean(clean**2))), 1.0), RATE // 50)
    hiss = generator.standard_normal(len(clean), dtype=np.float32) * 10 ** (-generator.uniform(*noise) / 20)
    return np.clip((clean + hiss) * 3000, -32768, 32767).round().astype(np.int16)


def digits(folder: Path) -> list[Clip] | None:
    """The digits of Debian’s asterisk-core-sounds-*-wav, all held out, as one person speaks a language; or None."""
    clips = []
    for spoken in sorted(folder.glob("[a-z][a-z]_[A-Z][A-Z]_[fm]_*/digits")):
        name = spoken.parent.name
        for n, word in enumerate(DIGITS.get(name[:2], "").split()):
            clip = _of_file(spoken / f"{n}.wav", word, name[:2], name, True, folder)
            clips.append(replace(clip, corpus="asterisk", license="CC-BY-SA-3.0; ru: CC-BY-3.0"))
    return clips or None


def read_clips(source: str) -> list[Clip]:
    """A user's own sounds.

    Args:
        source: a table (csv, tsv, jsonl) with a column of files, beside it or by their full names, and one of what is
            said, and, if they are known, `language`, `speaker` and `split`; a folder with a table named metadata; or a
            folder of sounds, each with a .txt of its name beside it or in a folder that is named as what is said
            (folders `train` and `test` or `validation` around these say what is held out); or a name of the `datasets`
            library, or a folder that its `save_to_disk` wrote, with such columns, of sounds or of their files.

    Raises:
        UserError: naming the file and the record.
    """
    path = Path(source)
    if is_dataset(source, _TABLES):
        return _dataset(source)
    if path.is_dir():
        tables = [path / f"metadata{suffix}" for suffix in sorted(_TABLES)]
        table = next((file for file in tables if file.exists()), None)
        return digits(path) or (_folder(path) if table is None else _table(table))
    if not path.exists():
        raise UserError(f"{source}: no such file or folder")
    if path.suffix.lower() not in _TABLES:
        raise UserError(f"{source}: give a folder of sounds, or a table that ends in {', '.join(sorted(_TABLES))}")
    return _table(path)


def _folder(folder: Path) -> list[Clip]:
    files, others = files_in(folder, lambda file: file.suffix.lower() in {*SUFFIXES, ".txt"})
    say_left_out(folder, others, f"hidden, no regular files, or not sounds ({', '.join(sorted(SUFFIXES))})")
    written = {file for file in files if file.suffix.lower() == ".txt"}
    sounds = [file for file in files if file not in written]
    if not sounds:
        raise UserError(f"{folder}: no file in this folder ends in {', '.join(sorted(SUFFIXES))}")
    stems = {file.with_suffix("") for file in sounds}
    alone = [file for file in sorted(written) if file.with_suffix("") not in stems]
    say_left_out(folder, alone, "texts with no sound beside them")
    parts = [file.relative_to(folder).parts for file in sounds]
    first = {names[0] for names in parts}
    official = "train" in first and bool(first & set(HELD_OUT))
    clips = []
    for file, names in zip(sounds, parts, strict=True):
        beside = file.with_suffix(".txt")
        if beside in written:
            text = _text(beside)
        elif len(names) == 1 or (official and len(names) == 2):
            raise UserError(
                f"{escaped(str(file))}: nothing says what is said in it; put {beside.name} beside it, or put it into a "
                "folder that is named so"
            )
        else:
            text = names[-2].replace("_", " ")
        held_out = names[0] in HELD_OUT if official and names[0] in ("train", *HELD_OUT) else None
        speaker = file.stem.partition("_nohash_")[0] if "_nohash_" in file.stem else ""
        clips.append(_of_file(file, text, UNKNOWN, speaker, held_out, folder))
    return clips


def _dataset(source: str) -> list[Clip]:
    """The sounds of a data set, all of its splits that say what is trained on and held out."""
    parts = load_splits(source)
    import datasets

    kept = {part: rows for part, rows in parts.items() if part in ("train", *HELD_OUT)}
    if not kept:
        raise UserError(f"{escaped(source)}: has no split 'train', only {escaped(', '.join(map(str, parts)))}")
    if others := [str(part) for part in parts if part not in kept]:
        more = "s" * (len(others) > 1)
        warnings.warn(
            f"{escaped(source)}: left out the split{more} {escaped(', '.join(others))}", LeftOut, stacklevel=2
        )
    clips = []
    for part, rows in kept.items():
        kinds = rows.features
        names = _columns(Path(source), list(kinds))
        for column in names.values():
            if isinstance(kinds[column], datasets.Audio):
                rows = rows.cast_column(column, datasets.Audio(decode=False))
        for number, row in enumerate(rows.select_columns([n for n in names.values() if n != names["path"]]), 1):
            value = {what: _said(row[name], kinds[name]) for what, name in names.items() if what != "path"}
            clips.append(
                _of_row(
                    lambda rows=rows, number=number, name=names["path"]: rows[number - 1][name],  # type: ignore[misc]
                    value,
                    None if len(kept) == 1 else part != "train",
                    source,
                    f"{escaped(source)}, {part}, record {number}",
                )
            )
    return clips


def _said(value: Any, kind: Any) -> str:
    """A cell as a text; that of a class is its name."""
    names = getattr(kind, "names", None)
    if names is not None and isinstance(value, int):
        return str(names[value]).replace("_", " ") if 0 <= value < len(names) else ""
    return "" if value is None else str(value).strip()


def _of_row(cell: Callable[[], Any], value: dict[str, str], held_out: bool | None, source: str, where: str) -> Clip:
    """A clip of a row, whose sound is the name of a file, or bytes and their name as the library keeps them."""

    def held() -> tuple[Path, bytes | None]:
        found = cell()
        found = found if isinstance(found, dict) else {"path": found}
        if not found.get("bytes") and not found.get("path"):
            raise UserError(f"{where}: has no sound")
        file = Path(str(found.get("path") or "sound"))
        return file, found.get("bytes") or None

    def read(seconds: float) -> Sound:
        file, raw = held()
        return read_sound(file, seconds, raw)

    def raw() -> Iterator[bytes]:
        file, content = held()
        yield from _blocks(file) if content is None else [content]

    return Clip(
        where,
        value["text"],
        escaped(value.get("language", "")) or UNKNOWN,
        escaped(value.get("speaker", "")),
        held_out,
        read,
        raw,
        escaped(Path(source).name),
        "the data set's own",
        f"datasets: {escaped(source)}",
    )


def _text(file: Path) -> str:
    try:
        with open_file(file) as stream:
            return stream.read(100_000).decode("utf-8")
    except UnicodeDecodeError:
        return ""
    except OSError as error:
        raise UserError(f"{escaped(str(file))}: {error.strerror or error}") from None


def _table(file: Path) -> list[Clip]:
    clips: list[Clip] = []
    names: dict[str, None] = {}
    columns: dict[str, str] = {}
    try:
        for number, row in enumerate(_rows(file), 1):
            if number > _MOST_ROWS:
                raise UserError(f"{file}: holds more than {_MOST_ROWS:,} records; give a part of it")
            if not names.keys() >= row.keys():  # of lines of JSON each has its own
                names |= dict.fromkeys(row)
                columns = _known_columns(list(names))
            value = {what: str(row.get(name) or "").strip() for what, name in columns.items()}
            part = value.get("split", "").lower()
            wrong = "" if value.get("path") else "names no file"
            if None in row:  # of csv, what is behind the last column
                wrong = f"has {len(row[None]):,} cells more than there are columns"  # type: ignore[index]
            if "split" in value and part not in ("train", *HELD_OUT):
                wrong = f"its split is {part!r}; known: train, {', '.join(HELD_OUT)}"
            clip = _of_file(
                file.parent / value.get("path", ""),
                value.get("text", ""),
                escaped(value.get("language", "")) or UNKNOWN,
                escaped(value.get("speaker", "")),
                part != "train" if "split" in value else None,
                file,
                f"{escaped(str(file))}, record {number}",
                wrong,
            )
            clips.append(clip)
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{escaped(str(file))}: cannot be read at record {len(clips) + 1}: {reason}") from None
    if not clips:
        raise UserError(f"{escaped(str(file))}: holds no record")
    _columns(file, list(names))
    return clips


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with io.TextIOWrapper(open_file(file), encoding="utf-8-sig", newline="") as stream:
        if file.suffix.lower() != ".jsonl":
            tabs = file.suffix.lower() == ".tsv"
            rows = csv.DictReader(
                stream,
                delimiter="\t" if tabs else ",",
                quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
                strict=True,  # else a quote that nobody closes hides the records behind it
            )
            check_names(file, [name.strip().lower() for name in rows.fieldnames or ()])
            yield from rows
            return
        for line in stream:
            if line.strip():
                row = parse_json(line)
                if not isinstance(row, dict):
                    raise ValueError("a line must be an object")
                yield row


def _known_columns(names: list[Any]) -> dict[str, str]:
    known = {str(name).strip().lower(): str(name) for name in names}
    return {what: known[one] for what, some in _COLUMNS.items() for one in reversed(some) if one in known}


def _columns(file: Path, names: list[Any]) -> dict[str, str]:
    found = _known_columns(names)
    for what in ("path", "text"):
        if what not in found:
            raise UserError(
                f"{escaped(str(file))}: has no column {' or '.join(_COLUMNS[what])}; it has "
                f"{escaped(', '.join(map(str, names)))[:200]}"
            )
    return found


def _of_file(
    file: Path,
    text: str,
    language: str,
    speaker: str,
    held_out: bool | None,
    source: Path,
    where: str = "",
    wrong: str = "",
) -> Clip:
    where = where or escaped(str(file))
    return Clip(
        where,
        text,
        language,
        speaker,
        held_out,
        lambda seconds: read_sound(file, seconds),
        lambda: _blocks(file),
        escaped(source.name),
        "the user's own",
        escaped(str(source)),
        wrong,
    )


def _blocks(file: Path) -> Iterator[bytes]:
    """What a file holds, in parts.

    Raises:
        UserError: where it cannot be read.
    """
    try:
        with open_file(file) as stream:
            while block := stream.read(2**20):
                yield block
    except OSError as error:
        raise UserError(f"{escaped(str(file))}: {error.strerror or error}") from None


@dataclass(frozen=True)
class Corpus:
    """Clips to train on and held out.

    Args:
        clips: all that are used.
        train, held_out: numbers of clips, in order.
        texts: of each clip, as it is learned.
        notes: sentences on what was left out, resampled, and how it was held out.
        fingerprint: SHA-256 over what is trained on and held out, in order.
    """

    clips: list[Clip]
    train: list[int]
    held_out: list[int]
    texts: list[str]
    notes: list[str]
    fingerprint: str


def split(
    clips: list[Clip],
    enough: Callable[[Sound, str], str],
    *,
    share: float,
    seconds: float,
    most: int,
    most_held_out: int,
) -> Corpus:
    """See that clips can be used, leave out those that cannot, and hold out whole speakers.

    Args:
        clips: of all sources.
        enough: why a sound cannot have this text; empty where it can.
        share: held out of the speakers of each language, or of its clips where one speaker or none is known, if the
            data do not say what is.
        seconds: the longest that a sound may last.
        most, most_held_out: how many clips at most, in parts of each language as they are.

    Raises:
        UserError: where nothing is left to train on or to hold out, or more than half cannot be used.
    """
    chosen, note = _choose(clips, share)
    by_language = [_by_language(clips, part) for part in chosen]
    train = at_most(by_language[0], most, "data.train_clips")
    held_out = at_most(by_language[1], most_held_out, "data.eval_clips")
    digest, rates = hashlib.sha256(), Counter[int]()
    texts = [words_of(clip.text) for clip in clips]

    def read(i: int) -> None:
        clip = clips[i]
        wrong = clip.wrong or ("" if texts[i] else "nothing says what is said in it")
        try:
            sound = None if wrong else clip.read(seconds)
        except UserError as error:
            wrong = str(error)
        wrong = wrong or enough(sound, texts[i])  # type: ignore[arg-type]
        if wrong:
            raise UserError(wrong if wrong.startswith(clip.where) else f"{clip.where}: {wrong}")
        assert sound is not None
        rates[sound.rate] += 1
        digest.update("\0".join(["", texts[i], clip.language, clip.speaker, ""]).encode())
        for block in clip.raw():
            digest.update(block)

    every = [*train, *held_out]
    bad = sift(every, read, lambda i: clips[i].where, "sounds")
    train, held_out = ([i for i in part if i not in bad] for part in (train, held_out))
    digest.update(f"{len(train)}".encode())
    for part, what in ((train, "to train on"), (held_out, "to hold out")):
        if not part:
            sources = ", ".join(dict.fromkeys(clip.source for clip in clips))
            cure = f"; give others beside it, or the built-in ones as {SYNTHESISED!r}" if part is train else ""
            raise UserError(f"{sources}: has no sound {what}{cure}")
    notes = [note] if note else []
    if others := {rate: count for rate, count in sorted(rates.items()) if rate != RATE}:
        listed = ", ".join(f"{count:,} of {rate:,} Hz" for rate, count in others.items())
        notes.append(f"Resampled to {RATE:,} Hz: {listed}.")
    if said := left_out(bad, len(every), "sounds"):
        notes.append(said)
    return Corpus(clips, train, held_out, texts, notes, digest.hexdigest())


def _by_language(clips: list[Clip], chosen: list[int]) -> list[list[int]]:
    """Clips by language, each in a fixed random order."""
    groups: dict[str, list[int]] = {}
    for i in chosen:
        groups.setdefault(clips[i].language, []).append(i)
    draw = random.Random(0)
    for _, group in sorted(groups.items()):
        draw.shuffle(group)
    return [group for _, group in sorted(groups.items())]


def _choose(clips: list[Clip], share: float) -> tuple[tuple[list[int], list[int]], str]:
    """Which clips are trained on and which held out, and a note on it."""
    free = [i for i, clip in enumerate(clips) if clip.held_out is None]
    told = [i for i, clip in enumerate(clips) if clip.held_out]
    trained = [i for i, clip in enumerate(clips) if clip.held_out is False]
    if told and trained:
        return ([*trained, *free], told), ""
    free, speakers = [*trained, *free], dict[str, set[str]]()
    wrong = {i for i in free if clips[i].wrong or not words_of(clips[i].text)}  # of nobody's voice, left out later
    free = [i for i in free if i not in wrong]
    for i in free:
        speakers.setdefault(clips[i].language, set()).add(clips[i].speaker)
    names = sorted({clips[i].speaker for i in free} - {""})
    random.Random(0).shuffle(names)
    held: set[str] = set()
    alone = {language for language, those in speakers.items() if len(those) < 2 or "" in those}
    left = {language: len(those) for language, those in speakers.items()}  # not held out
    spoken: dict[str, list[str]] = {}
    for language, those in speakers.items():
        for name in those:
            spoken.setdefault(name, []).append(language)
    for language in sorted(set(speakers) - alone):
        wanted = max(1, round(share * len(speakers[language])))
        for name in names:
            if len(speakers[language]) - left[language] >= wanted:
                break
            if name in speakers[language] and name not in held and all(left[one] > 1 for one in spoken[name]):
                held.add(name)
                for one in spoken[name]:
                    left[one] -= 1
    out = [*told, *(i for i in free if clips[i].language not in alone and clips[i].speaker in held)]
    train = [i for i in free if clips[i].language not in alone and clips[i].speaker not in held]
    for group in _by_language(clips, [i for i in free if clips[i].language in alone]):
        cut = min(max(1, round(share * len(group))), len(group) - 1)
        out, train = [*out, *group[:cut]], [*train, *group[cut:]]
    note = f"Held out: all that {len(held):,} of {len(names):,} voices say, in any language." if held else ""
    if alone:
        which = ", ".join(sorted(alone))
        note += (
            f" Of {which} one voice is known, or not whose voices they are: what is held out may be of voices heard."
        )
    return (sorted([*train, *wrong]), sorted(out)), note.strip()
