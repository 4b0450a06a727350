"""Campaign O: data files that are damaged or lie; each is read, or refused in one line that names it."""

import bz2
import gzip
import json
import lzma
import os
import signal
import warnings

from shunter.data.documents import read_domains
from shunter.errors import UserError
from tests.campaigns.campaign import drawn
from tests.campaigns.runs import fresh

RECORDS = [{"text": "première ligne"}, {"text": "二", "domain": "mine", "language": "ja"}, {"text": "third " * 30}]
PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
ODD = [b"", b"\0" * 50, b"\xff\xfe\xfd", b"\xef\xbb\xbf", b"[" * 5000, b"9" * 5000, b"NaN", b"\r\r\r", b"{}" * 999]
ODD += [b'"\\ud800"', b'{"text": "\\ud800"}', b'{"text": 3}', b'{"text": null}', b'{"text": ["a"]}']
ODD += [b'{"text": {"text": "a"}}', b'{"text": "a", "text": "b"}', b'{"text": "a", "domain": 7}']
ODD += [b'{"text": "a", "domain": "\\u001b[2J"}', b'{"text": "a", "language": [1]}']
ODD += [b"\x1f\x8b\x08", b"PAR1", b"PAR1" + b"\xff" * 40 + b"PAR1", b"BZh9", b"\xfd7zXZ\0"]
MOST, LIMIT = 10_000, 20


def data(result, folder, cases, seed):
    """O: a file of text, JSON or Parquet, packed or not, that is cut, flipped, exchanged, or no file."""
    for case in cases:
        draw = drawn(seed, case)
        with fresh(folder) as run:
            file = run.parent / _name(draw)
            _make(draw, file)
            fault, refused = _read(file if draw.random() < 0.7 else run.parent)
            result.count(case, fault, detected=refused)


def _name(draw):
    stem, kind = draw.choice(["a", "a\x1b[31m", "naïve"]), draw.choice([".txt", ".json", ".jsonl", ".parquet"])
    return stem + kind + draw.choice(list(PACKED))


def _make(draw, file):
    how = draw.choice(["flip", "flip", "cut", "odd", "odd", "joined", "exchanged", "fifo", "folder", "device"])
    if how == "fifo":
        return os.mkfifo(file)
    if how == "folder":
        return file.mkdir()
    if how == "device":
        return file.symlink_to("/dev/zero")
    content = bytearray(_sound(file.name if how != "exchanged" else _name(draw)))
    if how == "flip":
        for _ in range(draw.randrange(1, 5)):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del content[draw.randrange(len(content)) :]
    elif how == "odd":
        content = draw.choice(ODD)
        content = PACKED.get(file.suffix, bytes)(content) if draw.random() < 0.5 else content
    elif how == "joined":
        at = draw.randrange(len(content))
        content[at:at] = draw.choice(ODD)
    return file.write_bytes(content)


def _sound(name):
    packed = next((ending for ending in PACKED if ending and name.endswith(ending)), "")
    kind = name.removesuffix(packed).rsplit(".")[-1]
    if kind == "parquet":
        import io

        import pyarrow
        import pyarrow.parquet

        stream = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), stream)
        content = stream.getvalue()
    elif kind == "txt":
        content = "première\n二\n".encode() * 9
    elif kind == "json":
        content = json.dumps(RECORDS).encode()
    else:
        content = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    return PACKED[packed](content)


def _read(path):
    """What is wrong with how it is read, and whether it was refused."""

    def late(*given):
        raise TimeoutError(f"more than {LIMIT} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is left out
            domains = read_domains([str(path)], MOST)
        sizes = [sum(len(text.encode()) for text in domain.documents) for domain in domains]
        return "" if all(size <= MOST for size in sizes) else f"domains of {sizes} bytes", False
    except UserError as error:
        right = "\n" not in str(error) and path.parent.name in str(error)
        return "" if right else f"{path.name!r}: {str(error)!r}", True
    except Exception as error:
        return f"{path.name!r}: {error!r}", False
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
