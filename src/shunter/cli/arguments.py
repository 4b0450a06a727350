"""Kinds of arguments that several verbs take, read before any work is done."""

from __future__ import annotations

from argparse import ArgumentTypeError

__all__ = ["seed"]


def seed(text: str) -> int:
    """A seed, which torch takes up to 64 bits.

    Raises:
        ValueError: where it is no whole number.
        ArgumentTypeError: where it is none of these.
    """
    value = int(text)
    if not 0 <= value < 2**63:
        raise ArgumentTypeError(f"{text[:40]} must be from 0 to 2**63 - 1")
    return value
