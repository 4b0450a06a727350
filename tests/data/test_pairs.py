"""Images with captions: folders and tables read, what is bad left out by name, concepts and styles held out."""

import io
import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pandas")

import pandas
import pyarrow
from pyarrow import parquet

from shunter.data import spooled
from shunter.data.pairs import LONGEST, built_in_pairs, read_pairs, split_pairs
from shunter.errors import UserError
from tests.conftest import SEED


def picture(i):
    return Image.fromarray(np.random.default_rng(SEED + i).integers(0, 255, (6, 6, 3), dtype=np.uint8))


def folder_of(path, count=12):
    path.mkdir(exist_ok=True)
    for i in range(count):
        picture(i).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(f"  thing  {i}\nfr.utf8=chose\n", encoding="utf-8")
    return path


def table_of(path, kind, count=12, **columns):
    folder_of(path.parent / "images", count)
    rows = {"image": [f"images/{i}.png" for i in range(count)], "caption": [f"thing {i}" for i in range(count)]}
    frame = pandas.DataFrame(rows | columns)
    file = path.with_suffix(kind)
    if kind == ".parquet":
        cells = [{"bytes": (path.parent / name).read_bytes(), "path": None} for name in frame["image"]]
        frame.assign(image=cells).to_parquet(file)
    elif kind == ".jsonl":
        frame.to_json(file, orient="records", lines=True)
    else:
        frame.to_csv(file, sep="\t" if kind == ".tsv" else ",", index=False)
    return file


@pytest.mark.parametrize("kind", ["folder", ".csv", ".tsv", ".jsonl", ".parquet"])
def test_pairs_are_read_whatever_holds_them(kind, tmp_path):
    source = folder_of(tmp_path / "images") if kind == "folder" else table_of(tmp_path / "pairs", kind)
    pairs = read_pairs(str(source))
    assert sorted(caption for [caption] in pairs.captions) == sorted(f"thing {i}" for i in range(12)), (
        "first line, tidy"
    )
    for i, [caption] in enumerate(pairs.captions):
        expected = picture(int(caption.split()[1]))
        assert np.array_equal(np.asarray(pairs.images.open(i)), np.asarray(expected))
    found = split_pairs(pairs, share=0.25)
    assert list(found.parts) == ["new concepts"] and len(found.parts["new concepts"]) == 3 and len(found.train) == 9
    assert not set(found.train) & set(found.parts["new concepts"]) and found.colours and not found.left_out
    again = split_pairs(read_pairs(str(source)), share=0.25)
    assert again.fingerprint == found.fingerprint and again.train == found.train


def test_concepts_and_styles_are_held_out(tmp_path):
    count = 24
    file = table_of(
        tmp_path / "pairs",
        ".csv",
        count,
        concept=[f"c{i // 3}" for i in range(count)],
        style=["a", "b", "c"] * (count // 3),
    )
    pairs = read_pairs(str(file))
    found = split_pairs(pairs, share=0.25, styles=["b"])
    concept, style = pairs.images.labels, pairs.styles
    learned = {concept[i] for i in found.train}
    assert len(learned) == 6 and {style[i] for i in found.train} == {"a", "c"}
    assert list(found.parts) == ["known concepts, new style", "new concepts", "new concepts, new style"]
    for name, some in found.parts.items():
        assert {concept[i] in learned for i in some} == {"known" in name}
        assert {style[i] == "b" for i in some} == {"new style" in name}
    assert sum(map(len, found.parts.values())) + len(found.train) == count
    with pytest.raises(UserError, match="'d' is no style of .*pairs.csv; it has a, b, c"):
        split_pairs(pairs, share=0.25, styles=["d"])
    assert set(found.groups("new concepts")) == {"a", "c"}
    alone = split_pairs(
        read_pairs(str(table_of(tmp_path / "one", ".csv", style=[str(i) for i in range(12)]))), share=0.25
    )
    [together] = alone.groups("new concepts, new style").values()
    assert len(together) == 3, "a style with one caption is no choice"
    few = split_pairs(pairs, share=0.25, styles=["b"], most=5, most_held_out=2)
    assert len(few.train) == 5 and {len(some) for some in few.parts.values()} == {2}


def test_what_the_data_hold_out_is_held_out(tmp_path):
    told = ["test" if i % 3 == 0 else "train" for i in range(12)]
    found = split_pairs(read_pairs(str(table_of(tmp_path / "pairs", ".csv", split=told))), share=0.5)
    assert found.parts == {"new concepts": [0, 3, 6, 9]}
    told[4] = "holdout"
    with pytest.raises(UserError, match="record 5: split is 'holdout'; it must be train, or test"):
        read_pairs(str(table_of(tmp_path / "pairs", ".csv", split=told)))


def test_captions_stay_as_they_are_written(tmp_path):
    file = table_of(tmp_path / "pairs", ".csv", 6)
    lines = file.read_text().splitlines()
    words = ["NA", "007", "null", "1.0", "true", "None"]
    file.write_text("\n".join([lines[0], *(f"images/{i}.png,{word}" for i, word in enumerate(words))]) + "\n")
    assert [caption for [caption] in read_pairs(str(file)).captions] == words
    assert not read_pairs(str(file)).bad


def test_a_caption_of_ten_thousand_words_is_cut_between_letters(tmp_path):
    folder = folder_of(tmp_path / "images", 6)
    for i in range(5):  # of which one is cut within a letter of four bytes at each place
        (folder / f"{i}.txt").write_text("x" * i + "\N{PILE OF POO}" * 10_000, encoding="utf-8")
    (folder / "5.txt").write_bytes(b"word" + "\N{PILE OF POO}".encode()[:2])
    pairs = read_pairs(str(folder))
    assert sorted(len(caption) for [caption] in pairs.captions) == [0, *[LONGEST] * 5]
    [wrong] = pairs.bad.values()
    assert wrong.startswith(f"{folder}/5.txt: ")


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_captions_are_texts_or_lists_of_them(kind, tmp_path):
    given = [["one", " of  two "], ["three"], [], [" ", None], None, ["a", "b", "c"]] + [
        [f"more {i}"] for i in range(6)
    ]
    file = table_of(tmp_path / "pairs", kind, len(given), caption=given)
    pairs = read_pairs(str(file))
    wanted = [["one", "of two"], ["three"], [""], [""], [""], ["a", "b", "c"]] + given[6:]
    assert [list(some) for some in pairs.captions] == wanted and pairs.images.labels[:2] == ["one", "three"]
    assert pairs.bad == {i: f"{file}, record {i + 1}: has no caption" for i in (2, 3, 4)}


def test_captions_of_other_kinds(tmp_path):
    folder_of(tmp_path / "images", 9)
    cells = [7, {"en": "a text"}, "\ud800 alone", True, *(f"thing {i}" for i in range(5))]
    rows = [{"image": f"images/{i}.png", "caption": cell} for i, cell in enumerate(cells)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = read_pairs(str(tmp_path / "t.jsonl"))
    assert [caption for [caption] in pairs.captions][:2] == ["7", ""] and list(pairs.bad) == [1]
    found = split_pairs(pairs, share=0.3)
    assert found.left_out.startswith("Left out 2 of 9 pairs: ")
    assert "t.jsonl, record 3: its caption holds a lone surrogate, which UTF-8 cannot encode" in found.left_out


def test_a_table_of_images_may_be_larger_than_memory(tmp_path, monkeypatch):
    """Of a file of Parquet a few rows are in memory, and images beyond a size in a temporary file."""
    monkeypatch.setattr(spooled, "IN_MEMORY", 2**16)
    draw = np.random.default_rng(SEED)
    images = [draw.bytes(2**16) for _ in range(128)]
    table = pyarrow.table({"image": images, "caption": [f"thing {i}" for i in range(128)]})
    pages = {"write_batch_size": 8, "data_page_size": 2**19, "use_dictionary": False}
    parquet.write_table(table, tmp_path / "t.parquet", compression=None, **pages)
    del table
    tracemalloc.start()
    try:
        pairs = read_pairs(str(tmp_path / "t.parquet"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**22, "of 8 MiB"
    assert [pairs.images.raw(i) for i in (127, 0, 64)] == [images[i] for i in (127, 0, 64)]


def test_a_folder_of_many_files_is_gone_through_once(tmp_path, monkeypatch):
    folder, seen = folder_of(tmp_path / "images", 60), []
    with_suffix = Path.with_suffix
    monkeypatch.setattr(Path, "with_suffix", lambda path, suffix: seen.append(path) or with_suffix(path, suffix))
    assert not read_pairs(str(folder)).bad
    assert len(seen) <= 10 * 120, "and not the square of the files"


def test_what_cannot_be_used_is_counted_and_named(tmp_path):
    folder = folder_of(tmp_path / "images", 14)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:40])
    (folder / "2.txt").unlink()
    (folder / "3.txt").write_text("\n")
    (folder / "4.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="left out note.wav"):
        (folder / "note.wav").write_bytes(b"")
        found = split_pairs(read_pairs(str(folder)), share=0.3)
    said = found.left_out
    assert said.startswith("Left out 4 of 14 pairs: ") and "1.png: not an image that can be read" in said
    assert "2.png: has no caption beside it, 2.txt" in said and "3.txt: its first line, the caption, is empty" in said
    assert "4.txt: " in said and len(found.train) + len(found.parts["new concepts"]) == 10

    file = table_of(tmp_path / "pairs", ".csv", 14)
    lines = file.read_text().splitlines()
    lines[2], lines[7], lines[9] = "images/1.png,", "images/gone.png,gone", ",nothing"
    file.write_text("\n".join(lines) + "\n")
    found = split_pairs(read_pairs(str(file)), share=0.3)
    assert (
        found.left_out.startswith("Left out 3 of 14 pairs") and "pairs.csv, record 2: has no caption" in found.left_out
    )
    assert "record 7: " in found.left_out and "gone.png" in found.left_out
    assert "pairs.csv, record 9: has no image" in found.left_out


def test_bad_pairs_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no such folder or table"):
        read_pairs(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no file in this folder ends in"):
        read_pairs(str(tmp_path / "empty"))
    for count in (1, 3):
        one = folder_of(tmp_path / f"few{count}", count)
        with pytest.raises(UserError, match=f"has pairs of {count} concepts .* at least 4 are needed"):
            split_pairs(read_pairs(str(one)), share=0.2)
    half = folder_of(tmp_path / "half", 8)
    for i in range(5):
        (half / f"{i}.txt").unlink()
    with pytest.raises(UserError, match="5 of 8 pairs cannot be used, the first: .*0.png: has no caption"):
        split_pairs(read_pairs(str(half)), share=0.2)
    (tmp_path / "odd.csv").write_text("picture,caption\na,b\n")
    with pytest.raises(UserError, match="odd.csv: needs one column 'image'; it has picture, caption"):
        read_pairs(str(tmp_path / "odd.csv"))
    (tmp_path / "none.csv").write_text("image,caption\n")
    with pytest.raises(UserError, match="none.csv: has no record"):
        read_pairs(str(tmp_path / "none.csv"))
    told = ["test", *["train"] * 11]
    with pytest.raises(UserError, match=r"1 caption held out \(new concepts\); to tell pairs apart takes two"):
        split_pairs(read_pairs(str(table_of(tmp_path / "pairs", ".csv", split=told))), share=0.2)
    with pytest.raises(UserError, match="nothing is held out"):
        split_pairs(read_pairs(str(table_of(tmp_path / "pairs", ".csv", split=["train"] * 12))), share=0.2)


def test_images_that_change_change_the_fingerprint(tmp_path):
    folder = folder_of(tmp_path / "images")
    before = split_pairs(read_pairs(str(folder)), share=0.25).fingerprint
    number = random.randrange(12)
    kept = (folder / f"{number}.txt").read_text()
    (folder / f"{number}.txt").write_text("another thing\n")
    assert split_pairs(read_pairs(str(folder)), share=0.25).fingerprint != before
    (folder / f"{number}.txt").write_text(kept)
    assert split_pairs(read_pairs(str(folder)), share=0.25).fingerprint == before
    picture(99).save(folder / f"{number}.png")
    assert split_pairs(read_pairs(str(folder)), share=0.25).fingerprint != before


def test_built_in_pairs_are_emoji_in_four_styles():
    for package in ("emoji", "resvg_py"):
        pytest.importorskip(package)
    pairs = built_in_pairs(16)
    styles = sorted(set(pairs.styles))
    assert styles == ["Noto Emoji", "OpenMoji", "OpenMoji lines", "Twemoji"] and set(pairs.licenses) == set(styles)
    by_concept = {}
    for i, concept in enumerate(pairs.images.labels):
        by_concept.setdefault(concept, []).append(i)
        assert concept == pairs.captions[i][0]
    assert len(by_concept) > 1000 and {len(some) for some in by_concept.values()} == {4}
    drawn = {pairs.styles[i]: np.asarray(pairs.images.open(i)).astype(int) for i in by_concept["red heart"]}
    red = {name: (array[..., 0] - array[..., 2]).max() for name, array in drawn.items()}
    assert red["OpenMoji"] > 100 and red["Twemoji"] > 100 and red["Noto Emoji"] == red["OpenMoji lines"] == 0
    assert all(array.min() < 220 and array.max() == 255 for array in drawn.values()), "drawn on white"
    buffer = io.BytesIO()
    pairs.images.open(0).save(buffer, "PNG")
    assert pairs.images.open(0).size == (16, 16)
