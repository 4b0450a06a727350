"""What a source holds and a recipe does not read is said in a sentence that the report shows, whatever the source."""

import json
import os
import random
import warnings
import wave

import numpy as np
import pytest
from PIL import Image

from shunter.data.aligned import read_pairs as read_sentences
from shunter.data.documents import read_domains
from shunter.data.files import LeftOut, sentences
from shunter.data.labelled_images import read_labelled, split
from shunter.data.pairs import read_pairs
from shunter.data.sifting import left_out, sift
from shunter.data.tables import read_table
from shunter.errors import UserError
from tests.conftest import SEED


def picture(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(SEED).integers(0, 256, (4, 4), dtype=np.uint8)).save(file)


def said_of(read, source):
    """The sentences on what is left out of a source."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with sentences() as said:
            read(source)
    assert [f"{one.message}." for one in caught if issubclass(one.category, LeftOut)] == said, "people hear it too"
    return said


def test_images_beside_train_and_test(tmp_path):
    places = [f"{part}/{name}/{i}.png" for part in ("train", "test") for name in "ab" for i in range(3)]
    for place in [*places, "more/a/0.png", "more/b/1.png"]:
        picture(tmp_path / place)
    [said] = said_of(lambda folder: read_labelled(str(folder)), tmp_path)
    assert said.endswith("left out more/a/0.png, more/b/1.png: beside the folders train and test.")


def test_images_beside_idx_files(tmp_path):
    for what, head, size in (
        ("images-idx3", [8, 3, 0, 0, 0, 9, 0, 0, 0, 2, 0, 0, 0, 2], 36),
        ("labels-idx1", [8, 1, 0, 0, 0, 9], 9),
    ):
        (tmp_path / f"train-{what}-ubyte").write_bytes(bytes([0, 0, *head, *[0, 1, 2] * (size // 3)]))
    picture(tmp_path / "a" / "0.png")
    [said] = said_of(lambda folder: read_labelled(str(folder)), tmp_path)
    assert said.endswith("left out a: beside IDX files, which are read alone.")


def test_a_class_of_which_no_image_can_be_read_is_named(tmp_path):
    for name in "abc":
        for i in range(4):
            picture(tmp_path / name / f"{i}.png")
    for i in range(4):
        (tmp_path / "b" / f"{i}.png").write_bytes(b"no image")
    found = split(read_labelled(str(tmp_path)), share=0.3, most=100, most_held_out=100)
    assert found.classes == ["a", "c"] and "Of the class 'b' none can be read" in found.left_out
    assert "<" not in found.left_out, "no word of Python's own objects"


def test_more_records_than_a_setting_takes(tmp_path):
    for name in "ab":
        for i in range(10):
            picture(tmp_path / name / f"{i}.png")
    [said] = said_of(lambda folder: split(read_labelled(str(folder)), share=0.2, most=6, most_held_out=100), tmp_path)
    assert said == "Left out 10 of 16 records, more than data.train_images=6."


def test_texts_beside_which_there_is_no_image_or_sound(tmp_path):
    from shunter.data.speech import read_clips

    for i in range(3):
        picture(tmp_path / "pairs" / f"{i}.png")
        (tmp_path / "pairs" / f"{i}.txt").write_text(f"word {i}")
    (tmp_path / "pairs" / "lone.txt").write_text("nothing to see")
    [said] = said_of(lambda folder: read_pairs(str(folder)), tmp_path / "pairs")
    assert said.endswith("left out lone.txt: captions with no image beside them.")
    (tmp_path / "sounds").mkdir()
    for i in range(2):
        with wave.open(str(tmp_path / "sounds" / f"{i}.wav"), "wb") as stream:
            stream.setparams((1, 2, 16000, 0, "NONE", ""))
            stream.writeframes(bytes(8000))
        (tmp_path / "sounds" / f"{i}.txt").write_text("la")
    (tmp_path / "sounds" / "lone.txt").write_text("nothing to hear")
    [said] = said_of(lambda folder: read_clips(str(folder)), tmp_path / "sounds")
    assert said.endswith("left out lone.txt: texts with no sound beside them.")


def test_links_in_circles_are_left_out(tmp_path):
    from shunter.data.speech import read_clips

    for kind, suffix, read in (
        ("pairs", ".png", read_pairs), ("images", ".png", read_labelled), ("sounds", ".wav", read_clips),
        ("texts", ".txt", lambda folder: read_domains([folder])),
    ):  # fmt: skip
        here = tmp_path / kind / "thing"
        here.mkdir(parents=True)
        (here / f"a{suffix}").write_bytes(b"word")
        if kind == "pairs":
            (here / "a.txt").write_text("word")
        (here / f"self{suffix}").symlink_to(here / f"self{suffix}")
        (here / f"one{suffix}").symlink_to(here / f"two{suffix}")
        (here / f"two{suffix}").symlink_to(here / f"one{suffix}")
        (here / "up").symlink_to(tmp_path / kind)
        [said] = said_of(lambda folder, read=read: read(str(folder)), tmp_path / kind)
        names = [f"thing/{name}" for name in ("up", f"one{suffix}", f"self{suffix}", f"two{suffix}")]
        assert f"left out {', '.join(names)}: " in said


@pytest.mark.parametrize("kind", ["images", "pairs", "sounds", "texts"])
def test_folders_that_cannot_be_read_are_left_out_by_name(kind, tmp_path, monkeypatch):
    from shunter.data.speech import read_clips

    read = {"images": read_labelled, "pairs": read_pairs, "sounds": read_clips, "texts": lambda f: read_domains([f])}
    for name in ("one", "two", "lost+found"):
        (tmp_path / name).mkdir()
        for i in range(4):
            for suffix in {"images": [".png"], "pairs": [".png", ".txt"], "sounds": [".wav"], "texts": [".txt"]}[kind]:
                (tmp_path / name / f"{name}{i}{suffix}").write_text(f"word {i}")
    scandir, closed = os.scandir, tmp_path / "lost+found"

    def refusing(path):
        if os.fspath(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    [said] = said_of(lambda folder: read[kind](str(folder)), tmp_path)
    assert said.endswith("left out lost+found: folders that cannot be read.")
    with pytest.raises(UserError, match=r"lost\+found: Permission denied"):
        read[kind](str(closed))


def test_what_is_left_out_is_one_line_whatever_its_name(tmp_path):
    for name in "ab":
        for i in range(4):
            picture(tmp_path / name / f"{i}.png")
    (tmp_path / "a" / "two\nlines\x1b[31m.png").write_bytes(b"no image")
    found = split(read_labelled(str(tmp_path)), share=0.3, most=100, most_held_out=100)
    assert found.left_out.isprintable() and r"two\nlines\x1b[31m.png" in found.left_out

    def read(i):
        raise UserError("no\nsound") if i == 1 else LookupError("no\x07picture")

    bad = sift([0, 1], lambda i: read(i) if i else None, str, "things") | sift(
        [0, 1, 2, 3], lambda i: i > 2 and read(i), str, "things"
    )
    assert bad == {1: r"no\nsound", 3: "3: no picture"} and left_out(bad, 4, "things").isprintable()


def test_a_row_of_sounds_with_more_cells_than_columns_is_wrong(tmp_path):
    from shunter.data.speech import read_clips

    (tmp_path / "t.csv").write_text("path,text\na.wav,la\nb.wav,ti, ta\n")
    assert [clip.wrong for clip in read_clips(str(tmp_path / "t.csv"))] == [
        "",
        "has 1 cells more than there are columns",
    ]


def test_text_behind_the_bytes_of_a_domain_and_empty_records(tmp_path):
    draw = random.Random(SEED)
    for name in ("short", "long"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("".join(draw.choices("abc \n", k=1000 if name == "short" else 1001)))
    [said] = said_of(lambda folder: read_domains([str(folder)], 1000), tmp_path)
    assert "behind the first 1,000 bytes of the domain long (data.max_bytes)" in said and "short" not in said
    records = tmp_path / "r.jsonl"
    records.write_text("\n".join(json.dumps({"text": text}) for text in ("word", "", "more", "")))
    [said] = said_of(lambda file: read_domains([str(file)]), records)
    assert said.endswith("left out 2 of 4 records, the first in record 2: empty.")


def test_the_record_of_a_target_that_is_none_is_named(tmp_path):
    file = tmp_path / "t.csv"
    rows = [f"{i},{'yes' if i % 2 else 'no'}" for i in range(20)]
    file.write_text("\n".join(["a,y", *rows, "1,perhaps"]) + "\n")
    with pytest.raises(UserError, match="record 21: column 'y' is 'perhaps'"):
        read_table(file, ["y"], 0.2)
    file.write_text("\n".join(["a,y", *(f"{i},{i}" for i in range(20)), "1,many"]) + "\n")
    with pytest.raises(UserError, match="record 21: column 'y' is 'many'"):
        read_table(file, ["y"], 0.2)


def test_sentences_of_which_a_part_is_missing_are_counted(tmp_path):
    file = tmp_path / "s.tsv"
    file.write_text("source\ttarget\tlanguage\na\tb\tfr\n\tb\tfr\na\t\tfr\na\tb\t\n")
    assert read_sentences(file, "en").notes[0].startswith("Left out 3 of 4 pairs")
