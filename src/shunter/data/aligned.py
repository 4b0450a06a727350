"""Sentences and their translations into several languages: Django's messages or a user's own table, and their split."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, escaped
from .documents import _package_folder
from .hub import is_dataset, training_split
from .tables import SUFFIXES, read_frame

__all__ = ["LANGUAGES", "Aligned", "Pair", "built_in_pairs", "read_pairs", "split_pairs"]

LANGUAGES = "ast da de es fr gl it lb nl pt_BR sv".split()

MOST_LANGUAGES = 1000

Pair = tuple[str, str]
"""A sentence and its translation."""


@dataclass(frozen=True)
class Aligned:
    """Pairs by language.

    Args:
        pairs: of each language, in a fixed order.
        license, source: in words.
        notes: sentences on what was left out.
    """

    pairs: dict[str, list[Pair]]
    license: str
    source: str
    notes: list[str]


def built_in_pairs(languages: Sequence[str] = ()) -> Aligned:
    """English messages of Django and their translations, from its compiled catalogues; equal ones are left out.

    Args:
        languages: names of its locales; none: `LANGUAGES`.

    Raises:
        UserError: for a language that it has not, and where a package is missing.
    """
    import polib

    root = _package_folder("django", "django")
    known = sorted({file.parent.parent.name for file in root.glob("**/locale/*/LC_MESSAGES/*.mo")})
    pairs: dict[str, list[Pair]] = {}
    for language in languages or LANGUAGES:
        if language not in known:
            raise UserError(
                f"data.languages: the built-in sentences have no {language!r}; they have {', '.join(known)}"
            )
        found: dict[str, str] = {}
        for file in sorted(root.glob(f"**/locale/{language}/LC_MESSAGES/*.mo")):
            for entry in polib.mofile(str(file)):
                if entry.msgid.strip() and entry.msgstr.strip() and entry.msgstr != entry.msgid:
                    found.setdefault(entry.msgid, entry.msgstr)
        pairs[language] = list(found.items())
    return Aligned(pairs, "BSD-3-Clause", "message catalogues of Django, from English", [])


def read_pairs(source: str | Path, source_language: str, languages: Sequence[str] = ()) -> Aligned:
    """A user's own aligned sentences.

    Args:
        source: .csv, .tsv, .parquet or .jsonl, or the split "train" of a data set (a name of the `datasets` library, or
            a folder that its `save_to_disk` wrote); with a column `translation` of such a data set; with columns
            `source`, `target` and `language` (of the target; without it all are of one, "target"); or with a column for
            each language, a sentence a row.
        source_language: the column of those that is translated from.
        languages: those to take; none: all.

    Raises:
        UserError: naming the file, and the record or the column.
    """
    file, shown = Path(source), escaped(str(source))
    named = is_dataset(str(source), SUFFIXES)
    frame = _dataset_frame(str(source)) if named else read_frame(file, texts=True)
    columns = list(frame.columns)
    if {"source", "target"} <= set(columns):
        spoken = frame["language"] if "language" in columns else ["target"] * len(frame)
        cells = zip(frame["source"], frame["target"], spoken, strict=True)
        rows = [(str(number), *row) for number, row in enumerate(cells, 1)]
    elif source_language in columns and len(columns) > 1:
        others = [name for name in columns if name != source_language]
        rows = [
            (str(number), source, target, name)
            for name in others
            for number, (source, target) in enumerate(zip(frame[source_language], frame[name], strict=True), 1)
        ]
    else:
        raise UserError(
            f"{shown}: needs columns source, target and language, or one for each language, {source_language!r} "
            f"(data.source_language) among them; it has {', '.join(map(escaped, columns))}"
        )
    pairs: dict[str, list[Pair]] = {}
    missing: list[str] = []
    for record, source, target, language in rows:
        where = f"{shown}, record {record}"
        source, target = _text(where, source), _text(where, target)
        if not source or not target or not isinstance(language, str):
            missing.append(record)
            continue
        if not _is_name(language):
            raise UserError(f"{where}: a language must be a short name, not {language[:80]!r}")
        pairs.setdefault(language, []).append((source, target))
        if len(pairs) > MOST_LANGUAGES:
            raise UserError(f"{where}: begins language {len(pairs):,}; at most {MOST_LANGUAGES:,} are told apart")
    for language in languages:
        if language not in pairs:
            raise UserError(f"{shown}: has no {language!r}; it has {', '.join(map(escaped, pairs)) or 'nothing'}")
    kept = {language: pairs[language] for language in (languages or sorted(pairs))}
    notes = []
    if missing:
        notes.append(
            f"Left out {len(missing):,} of {len(rows):,} pairs of {file.name}, in which a sentence or its language is "
            f"missing: the first in record {missing[0]}."
        )
    return Aligned(kept, "the user's own", shown, notes)


def _dataset_frame(source: str) -> Any:
    """The rows of a data set as a frame of pandas; of its column `translation`, a column for each language."""
    import pandas

    frame: Any = training_split(source).to_pandas()
    if "translation" not in frame.columns:
        return frame
    return pandas.DataFrame([row or {} for row in frame["translation"]], dtype=object)


def _text(where: str, cell: Any) -> str:
    """The text of a cell without what is around it; empty where there is none.

    Raises:
        UserError: for a cell that is no text.
    """
    import pandas

    if isinstance(cell, bytes) or not pandas.api.types.is_scalar(cell):
        raise UserError(f"{where}: a sentence must be a text, not {repr(cell)[:80]}")
    text = "" if pandas.isna(cell) else str(cell).strip()
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{where}: holds a lone surrogate, which UTF-8 cannot encode")
    return text


def _is_name(language: str) -> bool:
    return 0 < len(language) <= 50 and not any(unicodedata.category(c)[0] in "CZ" or c in "<>|/\\" for c in language)


def split_pairs(aligned: Aligned, share: float) -> dict[str, tuple[list[Pair], list[Pair]]]:
    """Of each language the pairs to train on and those held out: a share of the sources, the same for all languages.

    A source that is held out is trained on in no language. What the shuffle of the sources is depends on them alone.
    """
    sources = sorted({source for pairs in aligned.pairs.values() for source, _ in pairs})
    random.Random(0).shuffle(sources)
    held_out = set(sources[: max(1, round(share * len(sources)))])
    return {
        language: (
            [pair for pair in pairs if pair[0] not in held_out],
            [pair for pair in pairs if pair[0] in held_out],
        )
        for language, pairs in aligned.pairs.items()
    }
