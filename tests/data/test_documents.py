"""Text of others: every kind is read or named, what is broken or hostile ends in one line."""

import bz2
import gzip
import json
import lzma
import os
import warnings

import pytest

from shunter.data.documents import MAX_DOMAINS, MAX_LINE, read_domains
from shunter.errors import UserError

RECORDS = [{"text": "première"}, {"text": "二", "domain": "mine", "language": "ja"}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def texts(source, max_bytes=10**6):
    return {domain.name: list(domain.documents) for domain in read_domains([str(source)], max_bytes)}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", ["", *PACKED])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json"])
def test_marks_of_byte_order_and_compression_are_read(kind, suffix, encoding, tmp_path):
    content = {".txt": "première", ".jsonl": LINES, ".json": json.dumps(RECORDS)}[kind].encode(encoding)
    file = tmp_path / f"name{kind}{suffix}"
    file.write_bytes(PACKED.get(suffix, bytes)(content))
    expected = {"name": ["première"]} if kind == ".txt" else {"name": ["première"], "mine": ["二"]}
    assert texts(file) == expected
    folder = {tmp_path.name: expected.pop("name"), **expected}
    assert texts(tmp_path) == folder


def test_domains_have_the_names_of_their_files(tmp_path):
    for name, domain in (("my.notes.txt", "my.notes"), ("my.notes.txt.gz", "my.notes"), ("README", "README")):
        (tmp_path / name).write_bytes(gzip.compress(b"text") if name.endswith(".gz") else b"text")
        assert texts(tmp_path / name) == {domain: ["text"]}
    (tmp_path / "a.ndjson").write_text(LINES)
    assert texts(tmp_path / "a.ndjson") == {"a": ["première"], "mine": ["二"]}


@pytest.mark.parametrize(
    "content, expected",
    [
        (["one", "two"], ["one", "two"]),
        ({"text": "alone"}, ["alone"]),
        ([{"text": "one"}, "two"], ["one", "two"]),
    ],
)
def test_json_in_its_forms(content, expected, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert texts(tmp_path / "a.json") == {"a": expected}
    (tmp_path / "b.json").write_text(LINES)
    assert texts(tmp_path / "b.json")["mine"] == ["二"]


def test_what_a_folder_holds_besides_is_named(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    folder = tmp_path / "data"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "HEAD.txt").write_text("ref")
    (folder / "good.txt").write_text("text")
    (folder / "._good.txt").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (folder / "settings.json").write_text('{"indent": 4}')
    (folder / "picture.png").write_bytes(b"png")
    (folder / "link.txt").symlink_to(outside)
    os.mkfifo(folder / "pipe.txt")
    with pytest.warns(UserWarning, match="left out") as told:
        assert texts(folder) == {"data": ["text"]}
    said = str(told[0].message)
    named = [name in said for name in (".git", "._good.txt", "settings.json", "picture.png", "link.txt", "pipe.txt")]
    assert sum(named) == 5 and "and 1 more" in said and "\n" not in said
    for file in ("settings.json", "link.txt", "pipe.txt", "._good.txt", "picture.png"):
        (folder / file).unlink()
    with pytest.warns(UserWarning, match=r"left out \.git:"):
        texts(folder)
    (folder / ".git" / "HEAD.txt").unlink()
    (folder / ".git").rmdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts(folder)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.jsonl", b"[" * 10**6, "line 1: not JSON"),
        ("a.json", b'{"text": ' + b"[" * 10**6, "not JSON|nested too deep"),
        ("a.json", b"[" + b"1," * (10**7) + b"1]", "values"),
        ("a.jsonl", b'{"text": "a", "domain": "x\\u001b[31m"}', "'domain' must be a name"),
        ("a.jsonl", b'{"text": "a", "language": "x\\u001b[31m"}', "'language' must be a name"),
        ("a.jsonl", b'{"text": "a", "domain": "' + b"x" * 10**6 + b'"}', "'domain' must be a name"),
        ("a.jsonl.gz", gzip.compress(b"x" * (MAX_LINE + 9)), "line 1: is longer than"),
        ("a.txt.gz", b"not packed", "a.txt.gz: cannot be read"),
        ("a.parquet", b"PAR1" + b"\xff" * 100 + b"PAR1", "a.parquet: cannot be read"),
    ],
)
def test_hostile_files_end_in_one_line(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read_domains([str(tmp_path / name)])
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 600


def test_too_many_domains_are_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": "t", "domain": f"d{i}"}) + "\n" for i in range(20_000)))
    with pytest.raises(UserError, match=f"record {MAX_DOMAINS + 1}: begins domain .*broader"):
        read_domains([str(file)])


def test_long_lines_and_texts_are_read_up_to_the_bytes_of_a_domain(tmp_path):
    (tmp_path / "line.jsonl").write_text(json.dumps({"text": "é" * 3_000_000}) + "\n")
    assert len(texts(tmp_path / "line.jsonl", 1001)["line"][0]) == 500
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"a" * 50_000_000))
    assert texts(tmp_path / "bomb.txt.gz", 1000)["bomb"] == ["a" * 1000]
    with open("/dev/zero", "rb"), pytest.raises(UserError, match="is a device"):
        read_domains(["/dev/zero"])
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="is a FIFO"):
        read_domains([str(tmp_path / "pipe.txt")])


def test_names_of_folders_are_escaped(tmp_path):
    (tmp_path / "a\x1b[31mred").mkdir()
    (tmp_path / "a\x1b[31mred" / "x.txt").write_text("text")
    assert list(texts(tmp_path)) == ["a\\x1b[31mred"]


def test_long_texts_of_a_small_parquet_file_are_not_in_memory_at_once(tmp_path, monkeypatch):
    import pyarrow.parquet

    size, count = 1_000_000, 40
    table = pyarrow.table({"text": [chr(97 + i % 26) * size for i in range(count)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    read, sizes = pyarrow.parquet.ParquetFile.iter_batches, []
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "iter_batches",
        lambda *given, **how: (sizes.append(batch.nbytes) or batch for batch in read(*given, **how)),
    )
    assert [len(text) for text in texts(tmp_path / "a.parquet", 10**8)["a"]] == [size] * count
    assert len(sizes) > 1 and max(sizes) < 16_000_000 and (tmp_path / "a.parquet").stat().st_size < 100_000
