"""YAML to plain values and back: what is written is read equal, whatever looks like a number or a word."""

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import given, settings

from shunter.plain_yaml import as_yaml, parse_yaml

_looks = st.text("0123456789abefnoxyNOY._:+-~", max_size=6)
_plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | _looks
    | st.text("aé #:,[]{}&*!|>%@'\"", max_size=6)
)
_values = st.recursive(_plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_looks, inner, max_size=3))


@settings(max_examples=300, deadline=None)
@given(_values)
def test_what_is_written_is_read_equal(values):
    assert parse_yaml(as_yaml(values)) == values


@pytest.mark.parametrize(
    "text, value",
    [
        *(("010", 10), ("-010", -10), ("0x10", 16), ("0b11", 3), ("1_000", 1000)),
        *(("1:30", "1:30"), ("0o17", "0o17"), ("on", "on")),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text, value):
    """As 010 was eight, and 1:30 ninety; what others read is left alone."""
    assert parse_yaml(text) == value
    assert yaml.safe_load("[010, 1:30, on]") == [8, 90, True] and yaml.safe_dump(0) == "0\n...\n"
