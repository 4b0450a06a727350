"""Data sets of the `datasets` library, saved in a folder: every recipe with rows of its own reads them as its files."""

import io
import json
import os
import random
import wave

import numpy as np
import pytest
from PIL import Image

from shunter.data.aligned import read_pairs
from shunter.data.documents import read_domains
from shunter.data.files import sentences
from shunter.data.hub import is_dataset
from shunter.data.labelled_images import read_labelled
from shunter.data.pairs import read_pairs as image_pairs
from shunter.data.pairs import split_pairs
from shunter.errors import UserError
from tests.conftest import SEED

datasets = pytest.importorskip("datasets")


def save(folder, **parts):
    """A data set of splits with rows, as `save_to_disk` writes it."""
    made = {part: datasets.Dataset.from_dict(*rows) for part, rows in parts.items()}
    for part, rows in made.items():
        if "audio" in rows.features:  # encoding takes torchcodec, a cast does not
            made[part] = rows.cast_column("audio", datasets.Audio(sampling_rate=8000))
    datasets.DatasetDict(made).save_to_disk(str(folder))
    return str(folder)


def sound(samples):
    """The bytes of a WAV file."""
    held = io.BytesIO()
    with wave.open(held, "wb") as stream:
        stream.setparams((1, 2, 8000, 0, "NONE", ""))
        stream.writeframes(samples.astype("<i2").tobytes())
    return held.getvalue()


def test_sounds(tmp_path):
    from shunter.data.speech import read_clips

    pytest.importorskip("soundfile")
    draw = np.random.default_rng(SEED)
    content = [sound(6000 * draw.standard_normal(1600)) for _ in range(5)]
    lone = tmp_path / "lone.wav"
    lone.write_bytes(content[3])
    kinds = datasets.Features(
        {
            "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "label": datasets.ClassLabel(names=["turn_left", "stop"]),
            "speaker": datasets.Value("string"),
        }
    )
    cells = [{"bytes": raw, "path": None} for raw in content[:3]]
    cells += [{"bytes": None, "path": str(lone)}, {"bytes": content[4][:60], "path": None}]
    train = {"audio": cells[:3], "label": [0, 1, 0], "speaker": ["a", None, "b"]}
    test = {"audio": cells[3:], "label": [1, 0], "speaker": ["c", "c"]}
    with sentences() as said:
        source = save(tmp_path / "saved", train=(train, kinds), test=(test, kinds), more=(test, kinds))
        clips = read_clips(source)
    assert said == [f"{source}: left out the split more."]
    assert [clip.text for clip in clips] == ["turn left", "stop", "turn left", "stop", "turn left"]
    assert [clip.speaker for clip in clips] == ["a", "", "b", "c", "c"]
    assert [clip.held_out for clip in clips] == [False] * 3 + [True] * 2
    for clip, raw in zip(clips[:4], content, strict=False):
        with wave.open(io.BytesIO(raw)) as stream:
            expected = np.frombuffer(stream.readframes(1600), "<i2") / 32768
        heard = clip.read(1.0)
        assert heard.rate == 8000 and abs(heard.samples[::2] - expected).mean() < 0.5 * abs(expected).mean()
        assert b"".join(clip.raw()) == raw
    with pytest.raises(UserError, match="cut short|can be read"):
        clips[4].read(1.0)


@pytest.mark.parametrize("shape", ["translation", "columns", "languages"])
def test_aligned_sentences(shape, tmp_path):
    draw = random.Random(SEED)
    pairs = [(f"word {draw.random()}", f"wort {i}") for i in range(6)] + [("lone", None)]
    rows = {
        "translation": {"translation": [{"en": source, "de": target} for source, target in pairs]},
        "columns": {"source": [s for s, _ in pairs], "target": [t for _, t in pairs], "language": ["de"] * 7},
        "languages": {"en": [s for s, _ in pairs], "de": [t for _, t in pairs]},
    }[shape]
    folder = str(tmp_path / "saved")
    datasets.Dataset.from_dict(rows).save_to_disk(folder)
    found = read_pairs(folder, "en")
    assert found.pairs == {"de": pairs[:6]}
    assert found.notes[0].startswith("Left out 1 of 7 pairs")


def test_text_and_images(tmp_path):
    text = save(tmp_path / "text", train=({"text": ["one", "two"]},), test=({"text": ["three"]},))
    with sentences() as said:
        [domain] = read_domains([text])
    assert (
        list(domain.documents) == ["one", "two"]
        and domain.name == "text"
        and said == [f"{text}: left out the split test."]
    )
    pixels = [np.random.default_rng([SEED, i]).integers(0, 256, (4, 4), dtype=np.uint8) for i in range(4)]
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [Image.fromarray(array) for array in pixels], "label": [0, 1, 0, 1]}
    found = read_labelled(save(tmp_path / "images", train=(rows, kinds)))
    assert found.labels == ["a", "b", "a", "b"]
    for i, array in enumerate(pixels):
        assert np.array_equal(np.asarray(found.open(i)), array)


@pytest.mark.parametrize("split", [True, False])
def test_images_with_captions(split, tmp_path):
    """Several captions of an image, a class as concept, holes and what does not decode, with splits and without."""
    draw = np.random.default_rng(SEED)
    pixels = [draw.integers(0, 256, (6, 5, 3), dtype=np.uint8) for _ in range(13)]
    kinds = datasets.Features(
        {
            "picture": datasets.Image(),
            "captions": datasets.Sequence(datasets.Value("string")),
            "concept": datasets.ClassLabel(names=list("abcdef")),
            "style": datasets.Value("string"),
        }
    )
    cells = [Image.fromarray(array) for array in pixels[:10]]
    cells += [{"bytes": b"no image", "path": None}, None, Image.fromarray(pixels[12])]
    rows = {
        "picture": cells,
        "captions": [[f"a  thing {i}", f"it {i}"] for i in range(12)] + [[" ", None]],
        "concept": [i % 6 for i in range(13)],
        "style": ["plain", None] * 6 + ["plain"],
    }
    if split:
        held = {name: values[:4] for name, values in rows.items()}
        source = save(tmp_path / "saved", train=({n: v[4:] for n, v in rows.items()}, kinds), test=(held, kinds))
    else:
        source = str(tmp_path / "saved")
        datasets.Dataset.from_dict(rows, kinds).save_to_disk(source)
    pairs = image_pairs(source)
    order = [*range(4, 13), *range(4)] if split else list(range(13))
    for place, i in enumerate(order):
        assert pairs.images.where[place] == (
            f"{source}, {'test' if split and i < 4 else 'train'}, record {i + 1 - 4 * (split and i > 3)}"
        )
        if i < 12:
            assert (
                pairs.captions[place] == [f"a thing {i}", f"it {i}"] and pairs.images.labels[place] == "abcdef"[i % 6]
            )
        if i < 10:
            assert np.array_equal(np.asarray(pairs.images.open(place)), pixels[i])
        assert pairs.styles[place] == ("" if i % 2 else "plain")
    found = split_pairs(pairs, share=0.3)
    assert found.left_out.startswith("Left out 3 of 13 pairs: ") and found.left_out.count("has no image") == 1
    assert "has no caption" in found.left_out and "not an image that can be read" in found.left_out
    assert split_pairs(image_pairs(source), share=0.3).fingerprint == found.fingerprint
    held_out = {order[i] for part in found.parts.values() for i in part}
    assert not split or held_out == {0, 1, 2, 3}


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_label_that_is_none_is_named(value, tmp_path):
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Value("float64")})
    pixels = Image.new("L", (4, 4))
    rows = {"image": [pixels] * 4, "label": [0.5, 1.5, value, 0.5]}
    with pytest.raises(UserError, match="train, record 3: label is .*, which is no class"):
        read_labelled(save(tmp_path / "images", train=(rows, kinds)))
    several = datasets.Features({"image": datasets.Image(), "label": datasets.Sequence(datasets.Value("int64"))})
    with pytest.raises(UserError, match=r"train, record 1: label is \[1, 2\], which is no class"):
        rows = {"image": [pixels] * 4, "label": [[1, 2], [1], [1], [2]]}
        read_labelled(save(tmp_path / "lists", train=(rows, several)))
    rows = {"image": [pixels] * 4, "label": [0.5, 1.5, 1.5, 0.5]}
    assert read_labelled(save(tmp_path / "whole", train=(rows, kinds))).labels == ["0.5", "1.5", "1.5", "0.5"]


def test_what_is_no_data_set_is_one_line(tmp_path):
    assert not is_dataset(str(tmp_path)) and not is_dataset("none.tsv", {".tsv"}) and is_dataset("someone/sounds")
    (tmp_path / "dataset_dict.json").write_text("{")
    for read in (
        lambda: read_pairs(str(tmp_path), "en"),
        lambda: read_domains([str(tmp_path)]),
        lambda: image_pairs(str(tmp_path)),
    ):
        with pytest.raises(UserError, match="a data set that cannot be loaded") as error:
            read()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["a split", "a file", "a link", "a FIFO", "a list"])
def test_a_data_set_is_in_its_folder(what, tmp_path):
    """Nothing that it names elsewhere is read, and nothing blocks."""
    save(tmp_path / "other", train=({"text": ["secret"] * 3},))
    folder = tmp_path / "set"
    save(folder, train=({"text": ["a", "b"]},))
    assert len(read_domains([str(folder)])[0].documents) == 2
    data, state = folder / "train/data-00000-of-00001.arrow", folder / "train/state.json"
    elsewhere = tmp_path / "other/train/data-00000-of-00001.arrow"
    if what == "a split":
        (folder / "dataset_dict.json").write_text('{"splits": ["../other/train"]}')
    elif what == "a file":
        named = [{"filename": "../../other/train/data-00000-of-00001.arrow"}]
        state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": named}))
    elif what == "a list":
        state.write_text("[1]")
    else:
        data.unlink()
        data.symlink_to(elsewhere) if what == "a link" else os.mkfifo(data)
    says = {"a FIFO": "is a FIFO", "a list": "cannot be loaded"}.get(what, "outside")
    with pytest.raises(UserError, match=says) as caught:
        read_domains([str(folder)])
    assert "\n" not in str(caught.value)
