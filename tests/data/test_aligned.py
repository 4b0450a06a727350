"""Aligned sentences: tables of either form, what is missing, the split by source, Django's messages."""

import random

import pytest

from shunter.data.aligned import Aligned, built_in_pairs, read_pairs, split_pairs
from shunter.errors import UserError
from tests.conftest import SEED

pandas = pytest.importorskip("pandas")


def test_both_forms_of_a_table_hold_the_same_pairs(tmp_path):
    draw = random.Random(SEED)
    sources = [f'say "{i}", NA' for i in range(9)]
    wide = pandas.DataFrame({"en": sources, **{name: [f"{name} {s}" for s in sources] for name in ("a", "b")}})
    gone = draw.randrange(9), draw.choice("ab")
    wide.loc[gone] = None
    long = wide.melt("en", var_name="language", value_name="target").rename(columns={"en": "source"})
    found = {}
    for ending, write in {
        "csv": lambda frame, file: frame.to_csv(file, index=False),
        "tsv": lambda frame, file: file.write_text(
            "\n".join("\t".join("" if pandas.isna(c) else c for c in row) for row in [frame.columns, *frame.values])
        ),
        "parquet": lambda frame, file: frame.to_parquet(file),
        "jsonl": lambda frame, file: frame.to_json(file, orient="records", lines=True),
    }.items():
        for form, frame in (("wide", wide), ("long", long)):
            file = tmp_path / f"{form}.{ending}"
            write(frame, file)
            found[form, ending] = read_pairs(file, "en")
    expected = {
        name: [(s, t) for s, t in zip(sources, wide[name], strict=True) if not pandas.isna(t)] for name in ("a", "b")
    }
    for which, one in found.items():
        assert one.pairs == expected, which
        assert f"Left out 1 of 18 pairs of {which[0]}.{which[1]}" in one.notes[0]


def test_numbers_are_texts_and_holes_of_every_kind_are_missing(tmp_path):
    frame = pandas.DataFrame({"en": ["one", "two", "three"], "n": pandas.array([1, None, 3], dtype="Int64")})
    frame.to_parquet(tmp_path / "n.parquet")
    assert read_pairs(tmp_path / "n.parquet", "en").pairs == {"n": [("one", "1"), ("three", "3")]}


def test_without_a_language_all_are_of_one(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text("source,target\na,b\n")
    assert read_pairs(file, "en").pairs == {"target": [("a", "b")]}


def test_a_source_is_held_out_in_all_languages():
    draw = random.Random(SEED)
    sources = [str(i) for i in range(200)]
    pairs = {name: [(s, name + s) for s in draw.sample(sources, 120)] for name in "abc"}
    split = split_pairs(Aligned(pairs, "", "", []), 0.2)
    train = {s for part, _ in split.values() for s, _ in part}
    held_out = {s for _, part in split.values() for s, _ in part}
    known = {s for part in pairs.values() for s, _ in part}
    assert not train & held_out and train | held_out == known
    assert len(held_out) == round(0.2 * len(known))
    for name, parts in split.items():
        assert sorted(parts[0] + parts[1]) == sorted(pairs[name])


def test_djangos_messages():
    found = built_in_pairs(["fr", "lb"])
    assert list(found.pairs) == ["fr", "lb"] and ("Delete", "Supprimer") in found.pairs["fr"]
    assert found.license == "BSD-3-Clause" and all(s != t and s.strip() and t.strip() for s, t in found.pairs["lb"])
    with pytest.raises(UserError, match="have no 'xx'; they have af, "):
        built_in_pairs(["xx"])
