"""The text: domains, splits without leaks, exact bytes, an order that depends on the seed and the index alone."""

import json
import random
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shunter.data import documents, spooled, windows
from shunter.data.documents import built_in_domains, read_domains
from shunter.data.windows import _split, predicted_bytes, prepare, sample, train_tokenizer
from shunter.errors import UserError
from shunter.recipes.text import RECIPE
from tests.campaigns.processes import in_child
from tests.conftest import SEED


def test_built_in_text_has_three_licensed_domains():
    domains = built_in_domains(50_000)
    assert [d.name for d in domains] == ["english", "code", "languages"]
    for domain in domains:
        size = sum(len(text.encode()) for text in domain.documents)
        assert 40_000 < size <= 50_000
        assert domain.license and domain.source
    assert "In the beginning God created" in domains[0].documents[0]


def test_the_same_configuration_gives_the_same_windows(small):
    one, two, other = RECIPE.prepare(small()), RECIPE.prepare(small()), RECIPE.prepare(small("seed=1"))
    assert one.fingerprint == two.fingerprint == other.fingerprint
    assert len(one.train) == 700 * 64 // 16
    rows = [torch.stack([data.train[i]["input_ids"] for i in range(60)]) for data in (one, two, other)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    assert torch.equal(one.train[37]["input_ids"], rows[0][37]), "an item does not depend on what was read before"


def test_domains_take_turns(small):
    data = RECIPE.prepare(small())
    letters = {name: set(text) for name, text in {"digits": "12345678", "letters": "abcdefgh"}.items()}
    for i in range(30):
        text = set(data.tokenizer.decode(data.train[i]["input_ids"], skip_special_tokens=True))
        expected = ["digits", "letters", "signs"][i % 3]
        assert expected == "signs" or text & letters[expected]
        for other in set(letters) - {expected}:
            assert not text & letters[other]


def test_every_window_of_a_domain_is_seen_before_any_again(small):
    data = RECIPE.prepare(small())
    windows = data.train.domains[0]
    seen = data.train.orders[0][: len(windows)]
    assert torch.equal(seen.sort().values, torch.arange(len(windows)))


def test_held_out_documents_are_not_trained_on(corpus):
    for domain in read_domains([str(corpus)], 10**6):
        train, held_out = (part.documents for part in _split(domain, 0.2))
        assert held_out and train
        assert sorted([*train, *held_out]) == sorted(domain.documents)


@settings(max_examples=60)
@given(texts=st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=5), kind=st.sampled_from(["bpe", "bytes"]))
def test_tokens_are_lossless_and_their_bytes_counted_exactly(texts, kind):
    texts = [t.encode("utf-8", "ignore").decode() or "a" for t in texts]
    tokenizer = train_tokenizer(texts, 300 if kind == "bpe" else None)
    assert kind == "bpe" or len(tokenizer) == 257
    for text in texts:
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
        assert predicted_bytes(torch.tensor([ids]), tokenizer) == len(text.encode())


def test_files_of_every_kind(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "domain": "mine"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["three"]}), tmp_path / "c.parquet")
    domains = {
        d.name: list(d.documents)
        for d in read_domains([str(tmp_path / f) for f in ("a.txt", "b.jsonl", "c.parquet")], 100)
    }
    assert domains == {"a": ["plain"], "b": ["one"], "mine": ["two"], "c": ["three"]}
    whole = {d.name: sorted(d.documents) for d in read_domains([str(tmp_path)], 100)}
    assert whole == {tmp_path.name: ["one", "plain", "three"], "mine": ["two"]}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"ok \xff", r"a.txt: not UTF-8 text \(byte 3\)"),
        ("a.txt", b"", "a.txt: holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}', "record 2: has no field 'text'"),
        ("a.jsonl", b'{"text": "x"}\nnot json', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "x", "domain": 3}', "record 1: 'domain' must be a name"),
        ("a.jsonl", b'{"text": "\\ud800"}', "record 1: holds a lone surrogate"),
        ("a.parquet", b"PAR1 cut short", "a.parquet: cannot be read"),
        ("a.xyz", None, "no such file or folder"),
    ],
)
def test_bad_files_name_the_file_and_the_record(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_domains([str(tmp_path / name)], 1000)
    assert "\n" not in str(error.value)


def test_folders_without_text_and_domains_too_small_are_named(tmp_path, small):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file in this folder ends in"):
        read_domains([str(tmp_path / "empty")], 1000)
    with pytest.raises(UserError, match="domain '.*' is too small"):
        RECIPE.prepare(small("data.sequence_length=4096", "training.batch_tokens=4096"))


def test_data_json_tells_what_was_read(small):
    described = json.loads(json.dumps(RECIPE.prepare(small()).describe()))
    assert described["vocab_size"] == 257 and described["tokenizer"] == "bytes"
    assert all(d["train_tokens"] > 0 and d["eval_bytes"] > 0 and d["passes"] > 0 for d in described["domains"])


def test_every_window_has_its_domain_and_every_token_the_language_of_its_document(tmp_path):
    """Each document is of one letter, which says its domain and its language; after it the end token is its own too."""
    letters = {"a": ("one", "fr"), "b": ("one", "de"), "c": ("two", None), "d": ("two", "de"), "e": ("one", None)}
    records = [
        {"text": letter * random.randint(30, 60), "domain": domain} | ({"language": language} if language else {})
        for letter, (domain, language) in letters.items()
        for _ in range(12)
    ]
    random.shuffle(records)
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = prepare([str(file)], sequence_length=16, num_windows=90, tokenizer="bytes", eval_share=0.3)
    assert data.languages == ["de", "fr", "unknown"] and data.label_counts == {"domain": 2, "language": 3}
    assert data.describe()["languages"] == data.languages
    names = [domain["name"] for domain in data.domains]
    rows = [data.train[i] for i in range(90)]
    rows += [
        {"input_ids": ids, "domain": domain, "language": language}
        for held_out in data.eval
        for ids, domain, language in zip(held_out.input_ids, *held_out.labels.values(), strict=True)
    ]
    ends = 0
    for row in rows:
        before = None
        for token, language in zip(row["input_ids"].tolist(), row["language"].tolist(), strict=True):
            letter = data.tokenizer.decode([token])
            if letter in letters:
                domain, spoken = letters[letter]
                assert names[int(row["domain"])] == domain and data.languages[language] == (spoken or "unknown")
            elif before is not None:
                assert language == before, "the end token is of the document that it ends"
                ends += 1
            before = language
    assert ends > 10
    (tmp_path / "plain.txt").write_text("abc " * 99)
    plain = prepare([str(tmp_path / "plain.txt")], sequence_length=16, num_windows=4, tokenizer="bytes")
    assert plain.languages == [] and set(plain.train[0]) == {"input_ids", "labels", "domain"}


def test_languages_stay_with_their_documents(tmp_path):
    records = [{"text": c * n, "language": c} for c, n in (("é", 400), ("語", 300), ("a", 900))] + [{"text": "b" * 500}]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    [whole] = read_domains([str(file)], 10**6)
    assert list(whole.languages) == ["é", "語", "a", None]
    [cut] = read_domains([str(file)], 1000)  # in the middle of a character
    assert [(set(d), language) for d, language in zip(cut.documents, cut.languages, strict=True)] == [
        ({"é"}, "é"),
        ({"語"}, "語"),
        ({"a"}, "a"),
    ]
    built_in = {domain.name: domain for domain in built_in_domains(10**6)}
    assert set(built_in["english"].languages) == {"en"} and not built_in["code"].languages
    some = built_in["languages"]
    assert len(some.languages) == len(some.documents) and len(set(some.languages)) > 1
    file.write_text('{"text": "a", "language": 3}\n')
    with pytest.raises(UserError, match="record 1: 'language' must be a name, not 3"):
        read_domains([str(file)], 1000)


NOTE = r"The tokenizer was trained on (\d+) of the (\d+) bytes evenly spread\."


def _words(draw, size):
    """Text of so many characters and some more, of words that hardly come twice, in several scripts."""
    letters, parts, have = "abcdefghijklmnopqrstuvwxyzäß語文字0123456789_'", [], 0
    while have < size:
        word = "".join(draw.choices(letters, k=draw.randint(1, 12))) + draw.choice(
            [" ", "  ", ", ", ".\n", "。", " \n\n "]
        )
        parts.append(word)
        have += len(word)
    return "".join(parts)


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_text_in_files_and_in_pieces_gives_the_tokens_of_whole_documents(kind, tmp_path, monkeypatch):
    draw = random.Random(SEED)
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps({"text": _words(draw, draw.choice([20, 3000]))}) + "\n" for _ in range(30)))

    def read():
        found = prepare([str(file)], sequence_length=16, num_windows=9, tokenizer=kind, vocab_size=400)
        return found, found.train.domains[0], [(row["input_ids"].tolist(), row["labels"].dtype) for row in found.train]

    whole = read()
    for module, name, size in ((spooled, "IN_MEMORY", 500), (windows, "PIECE", 256)):
        monkeypatch.setattr(module, name, size)
    found, rows, items = read()
    assert (found.fingerprint, items) == (whole[0].fingerprint, whole[2])
    assert rows.base is not None and np.array_equal(rows, whole[1])
    [domain] = read_domains([str(file)])
    for part, cut in zip(_split(domain, 0.05), (rows, found.eval[0].input_ids.numpy()), strict=True):
        encode = found.tokenizer.backend_tokenizer.encode
        ids = [i for text in part.documents for i in (*encode(text).ids, found.tokenizer.eos_token_id)]
        assert cut.ravel().tolist() == ids[: cut.size] and len(cut) in (len(ids) // 16, 48)
    assert found.notes == []


def test_a_tokenizer_is_trained_on_all_of_a_text_or_on_an_even_part(monkeypatch, tmp_path):
    draw = random.Random(SEED)
    texts = [f"{chr(ord('a') + i) * 4} " * draw.randint(1, 800) for i in range(26) for _ in range(40)]
    total = sum(map(len, texts))
    assert sample(texts) == texts
    monkeypatch.setattr(windows, "TRAINED_ON", most := total // 4)
    part = sample(texts)
    assert part == sample(texts) and abs(sum(map(len, part)) - most) <= most // 256
    whole, given = "".join(texts), "".join(part)
    for letter in set(whole) - {" "}:  # each stretch of the text gives its share
        assert abs(given.count(letter) - whole.count(letter) / 4) <= 2 * most // 256
    file = tmp_path / "some.txt"
    file.write_text(_words(draw, 3000))
    monkeypatch.setattr(windows, "TRAINED_ON", 10**9)
    monkeypatch.setattr(windows, "WORDS", 700)
    [_, note] = prepare([str(file)], sequence_length=16, num_windows=4, vocab_size=300).describe()["notes"]
    read, whole = map(int, re.fullmatch(NOTE, note.replace(",", "")).groups())
    assert whole / 16 < read < whole / 2 + 100


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_long_file_is_several_documents_which_miss_nothing(encoding, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK", 51)
    text = _words(random.Random(SEED), 700)
    file = tmp_path / "a.txt"
    file.write_bytes(text.encode(encoding))
    [domain] = read_domains([str(file)], 10**5)
    assert len(domain.documents) == -(-len(text.encode(encoding)) // 51) and "".join(domain.documents) == text
    [cut] = read_domains([str(file)], 500)
    assert text.startswith("".join(cut.documents))
    assert sum(len(part.encode()) for part in cut.documents) in range(498, 501)


def test_what_is_no_text_behind_the_first_part_of_a_file_is_found_at_its_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK", 50)
    (tmp_path / "a.txt").write_bytes("語".encode() * 40 + b"\xff" + b"a" * 100)
    with pytest.raises(UserError, match=r"a.txt: not UTF-8 text \(byte 120\)"):
        read_domains([str(tmp_path / "a.txt")], 10**5)
    (tmp_path / "b.txt").write_bytes("語".encode()[:-1])
    with pytest.raises(UserError, match=r"b.txt: not UTF-8 text \(byte 0\)"):
        read_domains([str(tmp_path / "b.txt")], 10**5)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read in /proc")
@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_memory_does_not_grow_with_the_text(kind, tmp_path, monkeypatch):
    """A document takes as little memory as a part of it: encoded whole, its tokens took 160 MB and more."""
    limits = ((spooled, "IN_MEMORY", 2**16), (windows, "PIECE", 2**14), (windows, "TRAINED_ON", 2**16))
    for module, name, size in (*limits, (documents, "CHUNK", 2**21)):
        monkeypatch.setattr(module, name, size)
    (tmp_path / "a.txt").write_text(_words(random.Random(SEED), 600_000))

    def peak(field):
        return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith(field))

    def work():
        prepare([str(tmp_path / "a.txt")], sequence_length=16, num_windows=4, tokenizer=kind, max_bytes=10_000)
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")  # the peak begins anew
        before = peak("VmRSS")
        prepare([str(tmp_path / "a.txt")], sequence_length=16, num_windows=4, tokenizer=kind)
        print(peak("VmHWM") - before)
        return 0

    ended = in_child(work)
    assert ended.code == 0, ended
    assert int(ended.said.split()[-1]) < 64, "MB"
