"""What a token is, as people would say it."""

import pytest

from shunter.analysis.inspect.tokens import kind, token_text
from tests.analysis.inspect.subjects import BYTES


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the", "function word"),
        ("The", "function word"),
        ("the", "piece"),
        (" house", "word"),
        (" said", "verb"),
        ("said", "piece"),
        ("ouse", "piece"),
        (" London", "name"),
        ("\n  ", "space"),
        (" 42", "number"),
        (" ==", "punctuation"),
        ("語", "other script"),
        ("\\xe8", "other script"),
        (" é", "word"),
    ],
)
def test_kinds_of_tokens(text, expected):
    assert kind(text) == expected


def test_kinds_where_pieces_are_marked():
    assert kind("house", True) == "word" and kind("##ing", True) == "piece" and kind("the", True) == "function word"


def test_pieces_of_characters_are_shown_as_their_bytes():
    for text in ("é", "語", "a", "\n"):
        ids = BYTES.backend_tokenizer.encode(text).ids
        shown = "".join(token_text(BYTES, i) for i in ids)
        assert shown == (text if len(ids) == 1 else "".join(f"\\x{b:02x}" for b in text.encode()))
