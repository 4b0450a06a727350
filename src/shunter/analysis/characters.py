"""Strings from data and tokenizers made safe to look at: what is invisible, or moves its surroundings, is named."""

import unicodedata

SYMBOLS = {" ": "\u2423", "\n": "⏎", "\t": "⇥"}
SPACES = {" ", "\n", "\t", "\u00a0"}
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}  # Unicode categories


def visible(token: str) -> str:
    """A token with every character visible: whitespace as a symbol, other unseen characters as their code point."""
    if token and unicodedata.category(token[0]).startswith("M"):
        token = "\u25cc" + token  # a combining mark needs a base, here the dotted circle
    return "".join(_symbol(character) for character in token) or "(empty)"


def printable(text: str) -> str:
    """`text` with each character that is invisible, ill-formed or reorders its surroundings as its code point, such as
    ⟨U+202E⟩; ordinary spaces, tabs and line ends stay."""
    return "".join(character if character in SPACES else _named(character) for character in text)


def _symbol(character: str) -> str:
    if character in SYMBOLS.values():
        return _code(character)  # a real one is not mistaken for a space
    return SYMBOLS.get(character) or _named(character)


def _named(character: str) -> str:
    return _code(character) if unicodedata.category(character) in UNSEEN else character


def _code(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"
