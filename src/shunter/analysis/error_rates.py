"""What was said and what was recognised, to word and character error rates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["edits", "error_rates"]


def edits(said: Sequence[str], heard: Sequence[str]) -> int:
    """The least number of insertions, deletions and substitutions that turn one into the other (Levenshtein 1966)."""
    row = list(range(len(heard) + 1))
    for i, wanted in enumerate(said, 1):
        diagonal, row[0] = row[0], i
        for j, found in enumerate(heard, 1):
            diagonal, row[j] = row[j], min(diagonal + (wanted != found), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def error_rates(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Edits per hundred words (`wer`) and per hundred characters (`cer`) of pairs of what was said and was heard.

    The edits of all pairs are divided by the length of all that was said; more than 100 is possible.
    """
    counts = {"wer": [0, 0], "cer": [0, 0]}
    for said, heard in pairs:
        for which, a, b in (("wer", said.split(), heard.split()), ("cer", list(said), list(heard))):
            counts[which][0] += edits(a, b)
            counts[which][1] += len(a)
    return {which: 100 * wrong / max(1, length) for which, (wrong, length) in counts.items()}
