"""Sounds with texts: tables and folders, whole voices held out, what is left out counted, the same clips each time."""

import csv
import json
import random
import subprocess
import wave
from dataclasses import replace

import numpy as np
import pytest

from shunter.data import speech
from shunter.data.sounds import RATE, Sound
from shunter.data.speech import Clip, read_clips, split, synthesised, words_of
from shunter.errors import UserError
from tests.conftest import SEED


def hum(file, pitch=300, rate=8000, seconds=0.5):
    """A file of a tone, by the standard library."""
    file.parent.mkdir(parents=True, exist_ok=True)
    samples = (8000 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype("<i2")
    with wave.open(str(file), "wb") as stream:
        stream.setparams((1, 2, rate, 0, "NONE", ""))
        stream.writeframes(samples.tobytes())


def clip(text="one", language="en", speaker="a", held_out=None, name="x"):
    noise = np.random.default_rng(len(name)).uniform(-1, 1, RATE // 2).astype(np.float32)
    return Clip(
        name,
        text,
        language,
        speaker,
        held_out,
        lambda s: Sound(noise, RATE),
        lambda: iter([name.encode()]),
        "c",
        "l",
        "s",
    )


def cut(clips, share=0.3, most=10**6, **options):
    return split(clips, lambda sound, text: "", share=share, seconds=2, most=most, most_held_out=most, **options)


def test_texts_are_learned_without_what_is_not_said():
    assert words_of("  Hello,\tWORLD!  “Zéro”… l'eau – isn't x-ray 42 \n") == "hello world zéro l'eau isn't x-ray 42"
    assert words_of("e\u0301te\u0301 Ноль? — да. ' -") == "été ноль да"
    assert words_of("?!\u200b…") == ""


def test_no_voice_that_is_held_out_is_heard_in_any_language():
    draw = random.Random(SEED)
    for _ in range(30):
        voices = [f"v{n}" for n in range(draw.randint(2, 9))]
        languages = ["en", "fr", "ru"][: draw.randint(1, 3)]
        clips = []
        for language in languages:
            for speaker in draw.sample(voices, draw.randint(2, len(voices))):
                clips += [clip(language=language, speaker=speaker, name=f"{len(clips)}") for _ in range(3)]
        found = cut(clips, draw.uniform(0.1, 0.6))
        heard, out = ({clips[i].speaker for i in part} for part in (found.train, found.held_out))
        assert not heard & out and sorted(found.train + found.held_out) == list(range(len(clips)))
        assert {clips[i].language for i in found.train} == set(languages), "each language has a voice to learn from"
        assert f"all that {len(out)} of {len(heard | out)} voices say" in found.notes[0]


def held_out_slowly(speakers, share):
    """Which voices are held out, as it is defined: in turn, while a language has too few and none loses its last."""
    names = sorted({name for those in speakers.values() for name in those})
    random.Random(0).shuffle(names)
    held = set()
    for _, those in sorted(speakers.items()):
        wanted = max(1, round(share * len(those)))
        for name in names if len(those) > 1 else []:
            others = [some - held - {name} for some in speakers.values() if name in some]
            if name in those and len(those & held) < wanted and all(others):
                held.add(name)
    return held


def test_voices_are_held_out_as_defined_and_however_many_there_are():
    draw = random.Random(SEED)
    for _ in range(20):
        speakers = {f"l{n}": {f"v{v}" for v in draw.sample(range(30), draw.randint(1, 25))} for n in range(5)}
        clips = [clip(speaker=v, language=language) for language, those in speakers.items() for v in sorted(those)]
        (train, out), _ = speech._choose(clips, 0.3)
        held = held_out_slowly(speakers, 0.3)
        assert {clips[i].speaker for i in out} == held and not {clips[i].speaker for i in train} & held
    one = clip()
    many = [replace(one, speaker=f"v{n}") for n in range(30_000)]
    assert len(speech._choose(many, 0.2)[0][1]) == 6000, "where their square would take minutes"


def test_a_language_of_one_voice_is_held_out_by_clips_and_that_is_said():
    clips = [clip(speaker="a", name=f"{n}") for n in range(10)] + [
        clip(language="fr", speaker="", name="f") for _ in "12"
    ]
    found = cut(clips, 0.2)
    assert sorted(clips[i].language for i in found.held_out) == ["en", "en", "fr"]
    assert "Of en, fr one voice is known, or not whose voices they are" in found.notes[0]


def test_what_the_data_hold_out_is_held_out():
    clips = [clip(held_out=bool(n % 3), name=f"{n}") for n in range(9)]
    found = cut(clips)
    assert sorted(found.held_out) == [1, 2, 4, 5, 7, 8] and sorted(found.train) == [0, 3, 6] and not found.notes
    with pytest.raises(UserError, match="s: has no sound to train on"):
        cut([clip(held_out=True) for _ in range(3)])


def test_what_cannot_be_used_is_counted_and_named():
    clips = [clip(name=f"clip {n}", speaker=f"{n % 3}") for n in range(9)]
    clips[2] = replace(clips[2], text="?!")
    clips[5] = replace(clips[5], wrong="names no file", language="unknown", speaker="")

    def broken(seconds):
        raise UserError("clip 7: is cut short")

    clips[7] = replace(clips[7], read=broken)
    found = cut(clips)
    assert not {2, 5, 7} & {*found.train, *found.held_out}
    note = found.notes[-1]
    assert "unknown" not in found.notes[0], "who speaks is asked of what can be used"
    assert note.startswith("Left out 3 of 9 sounds: ")
    for part in ("clip 2: nothing says what is said in it", "clip 5: names no file", "clip 7: is cut short"):
        assert part in note and note.count(part.partition(":")[0]) == 1
    with pytest.raises(UserError, match=r"5 of 9 sounds cannot be read, the first: clip \d: nothing says"):
        cut([replace(one, text="") if n % 2 == 0 else one for n, one in enumerate(clips[:1] * 9)])


def test_the_fingerprint_is_of_sounds_texts_and_who_speaks():
    clips = [clip(name=f"{n}", speaker=f"{n % 3}") for n in range(9)]
    seen = {cut(clips).fingerprint}
    assert cut(list(clips)).fingerprint in seen
    for change in ({"text": "two"}, {"language": "fr"}, {"raw": lambda: iter([b"?"])}):
        for n in (0, 4):
            other = [replace(one, **change) if i == n else one for i, one in enumerate(clips)]
            assert (found := cut(other, most=10**6).fingerprint) not in seen
            seen.add(found)


def test_no_more_clips_than_are_wanted_of_each_language_alike():
    clips = [clip(name=f"{n}", speaker=f"{n % 5}", language="en" if n % 4 else "fr") for n in range(200)]
    found = cut(clips, most=40)
    train = [clips[i].language for i in found.train]
    assert len(train) <= 40 and 0.15 < train.count("fr") / len(train) < 0.35


ROWS = [
    {"file": "a/1.wav", "Sentence": "One, two!", "locale": "en", "client_id": "x", "split": "train"},
    {"file": "a/2.wav", "Sentence": "deux", "locale": "fr", "client_id": "y", "split": "test"},
    {"file": "", "Sentence": "no file", "locale": "fr", "client_id": "y", "split": "train"},
    {"file": "a/3.wav", "Sentence": "", "locale": "", "client_id": "", "split": "elsewhere"},
]


def write_table(file, rows):
    with open(file, "w", encoding="utf-8", newline="") as stream:
        if file.suffix == ".jsonl":
            stream.writelines(json.dumps(row) + "\n" for row in rows)
            return
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_a_table_names_files_texts_languages_voices_and_parts(suffix, tmp_path):
    pytest.importorskip("soundfile")
    for n in (1, 2, 3):
        hum(tmp_path / f"a/{n}.wav", 200 * n)
    write_table(tmp_path / f"metadata.{suffix}", ROWS)
    for source in (tmp_path, tmp_path / f"metadata.{suffix}"):
        clips = read_clips(str(source))
        assert [c.text for c in clips] == [row["Sentence"] for row in ROWS]
        assert [c.language for c in clips] == ["en", "fr", "fr", "unknown"]
        assert [c.speaker for c in clips] == ["x", "y", "y", ""]
        assert [c.held_out for c in clips][:3] == [False, True, False]
        assert clips[0].where.endswith(f"metadata.{suffix}, record 1")
        assert len(clips[1].read(1.0).samples) == RATE // 2 and b"".join(clips[1].raw())[:4] == b"RIFF"
        assert clips[2].wrong == "names no file" and "its split is 'elsewhere'" in clips[3].wrong


def test_a_line_of_json_may_say_what_the_first_does_not(tmp_path):
    rows = [
        {"text": "no file"},
        {"path": "1.wav", "text": "one", "split": "train"},
        {"path": "2.wav", "text": "two", "language": "fr", "split": "dev"},
    ]
    write_table(tmp_path / "t.jsonl", rows)
    clips = read_clips(str(tmp_path / "t.jsonl"))
    assert [c.wrong for c in clips] == ["names no file", "", ""] and clips[2].language == "fr"
    assert [c.held_out for c in clips[1:]] == [False, True]
    write_table(tmp_path / "t.jsonl", [{"text": "no file"}, {"text": "none either"}])
    with pytest.raises(UserError, match="t.jsonl: has no column path or file"):
        read_clips(str(tmp_path / "t.jsonl"))


def test_a_synthesiser_that_fails_is_one_line(monkeypatch):
    pytest.importorskip("espeakng_loader", reason="shunter[speech] has the synthesiser")

    def hangs(*_, timeout, **__):
        raise subprocess.TimeoutExpired("eSpeak", timeout)

    monkeypatch.setattr(speech.espeak.subprocess, "run", hangs)
    with pytest.raises(UserError, match="cannot be synthesised: eSpeak said 4 texts in no 604 seconds"):
        synthesised(2, 2, 1, languages=["en"], noise=(0, 20))


def test_quotes_hold_line_breaks_in_csv_and_are_letters_in_tsv(tmp_path):
    mark = "\N{ZERO WIDTH NO-BREAK SPACE}"
    (tmp_path / "t.csv").write_text(f'{mark}path,text\r\na.wav,"one\r\n""two"""\r\nb.wav,three\r\n', newline="")
    assert [clip.text for clip in read_clips(str(tmp_path / "t.csv"))] == ['one\r\n"two"', "three"]
    (tmp_path / "t.tsv").write_text(f'{mark}path\ttext\na.wav\t"one\nb.wav\t"two" three"\n')
    assert [clip.text for clip in read_clips(str(tmp_path / "t.tsv"))] == ['"one', '"two" three"']


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("t.csv", b"", "holds no record"),
        ("t.csv", b"a,b\n1,2\n", "has no column path or file or file_name"),
        ("t.csv", b"path,b\n1,2\n", "has no column text or transcript"),
        ("t.csv", b'path,text\na,b\nc,"d\ne,f\n', "cannot be read at record 2: unexpected end of data"),
        ("t.csv", b"path,text,Text\n1,2,3\n", "has 2 columns 'text'; give each its own name"),
        ("t.jsonl", b'{"path": "a", "text": "b"}\n[1]\n', "cannot be read at record 2: a line must be an object"),
        ("t.jsonl", b'{"path": "a", "text": "b"}\n{"path"', "cannot be read at record 2"),
        ("t.tsv", b"path\ttext\n\xff\xfe\t1\n", "cannot be read at record 1"),
        ("t.xlsx", b"", "a table that ends in .csv, .jsonl, .tsv"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(name, content, part, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_clips(str(tmp_path / name))
    assert part in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_a_folder_says_what_is_said_by_folders_or_by_texts(tmp_path):
    for part in ("train", "test"):
        for n in range(2):
            hum(tmp_path / f"words/{part}/yes_sir/ab{n}_nohash_0.wav")
    hum(tmp_path / "words/train/no/1.wav")
    hum(tmp_path / "words/dev/no/2.wav")
    (tmp_path / "words/train/no/1.txt").write_text("No, thanks")
    clips = read_clips(str(tmp_path / "words"))
    assert [(c.text, c.held_out, c.speaker) for c in clips] == [
        ("no", True, ""), ("yes sir", True, "ab0"), ("yes sir", True, "ab1"), ("No, thanks", False, ""),
        ("yes sir", False, "ab0"), ("yes sir", False, "ab1"),
    ]  # fmt: skip
    hum(tmp_path / "words/train/2.wav")
    with pytest.raises(UserError, match=r"2.wav: nothing says what is said in it; put 2.txt beside it"):
        read_clips(str(tmp_path / "words"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no file in this folder ends in"):
        read_clips(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no such file or folder"):
        read_clips(str(tmp_path / "nowhere"))


def test_the_digits_of_debian_are_held_out_with_their_words(tmp_path):
    for name in ("en_US_f_Allison", "ru_RU_f_IvrvoiceRU", "xx_XX_m_Nobody"):
        for n in range(10):
            hum(tmp_path / name / "digits" / f"{n}.wav")
        hum(tmp_path / name / "digits" / "thousand.wav")
    clips = read_clips(str(tmp_path))
    assert len(clips) == 20 and all(c.held_out for c in clips)
    assert [clips[7].text, clips[17].text, clips[17].language] == ["seven", "семь", "ru"]
    assert len({c.speaker for c in clips}) == 2 and {c.corpus for c in clips} == {"asterisk"}


def test_what_is_synthesised_is_the_same_each_time_and_another_for_another_voice():
    pytest.importorskip("espeakng_loader", reason="shunter[speech] has the synthesiser")
    made = [synthesised(3, 2, 2, languages=["en", "ru"], noise=(0, 20), seed=SEED % 7) for _ in range(2)]
    raw = [[b"".join(c.raw()) for c in clips] for clips in made]
    assert raw[0] == raw[1] and len(set(raw[0])) == 12 == len(made[0])
    for one in made[0]:
        assert set(one.text.split()) <= set(speech.DIGITS[one.language].split())
        sound = one.read(9.0)
        assert sound.rate == RATE and 0.1 < len(sound.samples) / RATE < 3 and 0.05 < np.abs(sound.samples).max() <= 1
    assert len({c.speaker for c in made[0]}) == 3 and len(set(speech.VOICES)) == len(speech.VOICES)
