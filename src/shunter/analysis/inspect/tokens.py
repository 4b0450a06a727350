"""What a token of text is: from its id to text that people can read, and from the text to one of a few kinds."""

from __future__ import annotations

import unicodedata

from transformers import PreTrainedTokenizerBase

__all__ = ["KINDS", "kind", "token_text"]

KINDS = ("special", "space", "punctuation", "number", "function word", "verb", "name", "word", "piece", "other script")
FUNCTION_WORDS = set(
    "a an the and or but nor so if of to in on at by for from with as than that this these those which who whom it its "
    "he she they we you i him her them us me his their our your my is are was were be been not no do does did has have "
    "had will shall would should may can could must there then when where".split()
)
VERBS = set(
    "say says said saith go goes went gone come comes came take takes took taken give gives gave given make makes made "
    "see sees saw seen know knows knew known get gets got find finds found bring brought put let set speak spake "
    "spoken tell told call called hear heard keep kept send sent turn turned return returned eat drink die died live "
    "run use used think thought want try ask asked answered build built read write wrote written raise raises import "
    "yield del pass assert add added remove select selected change changed enter entered save open close".split()
)


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as a person reads it; a piece of a character as its bytes."""
    text, piece = str(tokenizer.decode([token])), str(tokenizer.convert_ids_to_tokens(token))
    if piece.startswith("\u2581") and not text.startswith(" "):
        text = " " + text  # SentencePiece leaves the space of a text's first word out
    if "\ufffd" not in text:
        return text
    # Byte-level tokens spell bytes as letters: printable Latin-1 as itself, the others counted up from U+0100.
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(itself)]
    byte_of = {chr(b): b for b in itself} | {chr(256 + i): b for i, b in enumerate(others)}
    return "".join(f"\\x{byte_of[c]:02x}" for c in piece) if set(piece) <= set(byte_of) else text


def kind(text: str, pieces_are_marked: bool = False) -> str:
    """What a token is, by its text alone: one of `KINDS` but "special".

    A "name" begins with a capital; a "piece" goes on with a word that another token began; a "verb" is one of `VERBS`,
    frequent ones of English and of programs, be it used as one or not.

    Args:
        text: of the token, with the space that it begins with.
        pieces_are_marked: whether the tokenizer writes ## before a piece, rather than a space before a word.
    """
    bare = text.strip()
    goes_on = bare.startswith("##") if pieces_are_marked else not text[:1].isspace()
    bare = bare.removeprefix("##") if pieces_are_marked else bare
    if not bare:
        return "space"
    letters = [c for c in bare if c.isalpha()]
    if bare.startswith("\\x") or any("LATIN" not in unicodedata.name(c, "") for c in letters):
        return "other script"
    if not letters:
        return "number" if any(c.isdigit() for c in bare) else "punctuation"
    if bare.lower() in FUNCTION_WORDS and not (goes_on and bare.islower()):
        return "function word"
    if bare in VERBS and not goes_on:
        return "verb"
    if bare[0].isupper():
        return "name"
    return "piece" if goes_on else "word"
