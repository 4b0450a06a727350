"""Sound files: any rate and number of channels to one kind of samples; what cannot be used, each in one line."""

import math
import os
import random
import struct
import tracemalloc

import numpy as np
import pytest
import scipy.signal

pytest.importorskip("soundfile", reason="shunter[speech] reads sounds")

import soundfile

from shunter.data import sounds
from shunter.data.sounds import RATE, read_sound
from shunter.errors import UserError
from tests.conftest import SEED


def tone(seconds, rate, pitch=440.0):
    return 0.3 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("suffix", ["wav", "flac", "aiff", "au", "ogg"])
def test_any_rate_and_any_channels_are_one_kind_of_samples(suffix, tmp_path):
    draw = random.Random(SEED)
    rate, pitch = draw.choice([8000, 11025, 16000, 22050, 44100, 48000]), draw.uniform(300, 2000)
    wave = tone(0.5, rate, pitch)
    weights = [draw.uniform(0.2, 1) for _ in range(draw.randint(1, 3))]
    soundfile.write(tmp_path / f"a.{suffix}", np.stack([w * wave for w in weights], 1), rate)
    sound = read_sound(tmp_path / f"a.{suffix}", 1.0)
    assert sound.rate == rate and sound.samples.dtype == np.float32
    assert abs(len(sound.samples) - 0.5 * RATE) <= 2
    expected = np.mean(weights) * tone(0.5, RATE, pitch)
    middle = slice(RATE // 10, 4 * RATE // 10)  # filters and codecs have edges
    off = np.abs(sound.samples[middle] - expected[middle]).max()
    assert off < (0.06 if suffix == "ogg" else 0.01), (rate, pitch)


def test_a_rate_that_no_device_has_takes_no_filter_of_its_size(tmp_path, monkeypatch):
    """Rates without a common factor: a filter of 7,680,000 taps, 360 MB and more than a second for a sound."""
    terms = []
    filtering = scipy.signal.resample_poly
    monkeypatch.setattr(
        scipy.signal, "resample_poly", lambda x, up, down: terms.append(max(up, down)) or filtering(x, up, down)
    )
    draw = random.Random(SEED)
    for rate in (383_999, draw.randrange(100_001, 384_000, 2), draw.randint(1000, 8000)):
        pitch = draw.uniform(50, 300)
        sound = tone(0.5, rate, pitch)
        soundfile.write(tmp_path / "a.wav", sound, rate, subtype="FLOAT")
        samples = read_sound(tmp_path / "a.wav", 1.0).samples
        middle = slice(RATE // 10, 4 * RATE // 10)
        assert abs(len(samples) - len(sound) * RATE / rate) <= 2 and terms.pop() <= 16_384
        assert np.abs(samples[middle] - tone(0.5, RATE, pitch)[middle]).max() < 0.01, (rate, pitch)


def test_many_channels_are_decoded_some_samples_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(sounds, "_AT_A_TIME", 2**14)
    noise = np.random.default_rng(SEED).uniform(-0.5, 0.5, (RATE, 64)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, RATE, subtype="FLOAT")
    tracemalloc.start()
    try:
        sound = read_sound(tmp_path / "a.wav", 1.0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(sound.samples, noise.mean(1), atol=1e-6)
    assert peak < 2**20, "of 4 MiB"


def cut(file):
    whole = file.read_bytes()
    file.write_bytes(whole[: random.Random(SEED).randint(len(whole) // 3, 2 * len(whole) // 3)])


@pytest.mark.parametrize("suffix", ["wav", "flac", "aiff", "au", "ogg"])
def test_a_sound_that_is_cut_is_never_taken_for_a_whole_one(suffix, tmp_path):
    noise = np.random.default_rng(SEED).uniform(-0.5, 0.5, RATE)
    soundfile.write(tmp_path / f"a.{suffix}", noise, RATE)
    read_sound(tmp_path / f"a.{suffix}", 2.0)
    cut(tmp_path / f"a.{suffix}")
    with pytest.raises(UserError, match=f"a.{suffix}: (is cut short|not a sound|lasts 0.000 s)"):
        read_sound(tmp_path / f"a.{suffix}", 2.0)


def test_a_sound_whose_writer_left_its_length_open_is_whole(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.5, RATE), RATE)
    raw = bytearray((tmp_path / "a.wav").read_bytes())
    place = raw.index(b"data") + 4
    raw[4:8] = raw[place : place + 4] = struct.pack("<I", 2**32 - 1)
    (tmp_path / "a.wav").write_bytes(raw)
    assert len(read_sound(tmp_path / "a.wav", 1.0).samples) == RATE // 2


def bad(what, file):
    rate, samples = RATE, tone(0.5, RATE)
    match what:
        case "no bytes":
            file.write_bytes(b"")
            return
        case "text":
            file.write_bytes(b"no sound\n" * 99)
            return
        case "a folder":
            file.mkdir()
            return
        case "a pipe":
            os.mkfifo(file)
            return
        case "nothing":
            return
        case "no samples":
            samples = samples[:0]
        case "short":
            samples = samples[:100]
        case "long":
            samples = tone(1.5, RATE)
        case "silent":
            samples = np.full(RATE // 2, 0.25)
        case "slow":
            rate = 100
        case "not finite":
            samples[7] = math.nan
    soundfile.write(file, samples, rate, subtype="FLOAT")


@pytest.mark.parametrize(
    "what, part",
    [
        ("no bytes", "not a sound that can be read"),
        ("text", "not a sound that can be read"),
        ("a folder", "is a folder, not a file"),
        ("a pipe", "is a FIFO, not a file"),
        ("nothing", "No such file"),
        ("no samples", "lasts 0.000 s; a sound needs 0.05 at least"),
        ("short", "lasts 0.006 s"),
        ("long", "lasts 1.50 s, longer than data.seconds=1"),
        ("silent", "is silent"),
        ("slow", "has 100 samples a second"),
        ("not finite", "not finite"),
    ],
)
def test_what_cannot_be_used_is_one_line_that_names_the_file(what, part, tmp_path):
    bad(what, tmp_path / "a.wav")
    with pytest.raises(UserError) as error:
        read_sound(tmp_path / "a.wav", 1.0)
    assert part in str(error.value) and "a.wav: " in str(error.value) and "\n" not in str(error.value)
