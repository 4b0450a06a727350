"""Campaign F: files of models and settings that lie; each is read or refused in a line, in bounded time and memory."""

import copy
import json
import os
import resource
import shutil
import signal
import sys
import warnings
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shunter.errors import UserError
from shunter.hf.checkpoints.folders import load_tokenizer, read_config
from shunter.hf.checkpoints.gguf import unpack
from shunter.hf.checkpoints.reading import Checkpoint
from shunter.recipes.config import dump_config, load_config
from shunter.recipes.text import TextConfig
from tests.campaigns.campaign import drawn
from tests.campaigns.processes import in_child
from tests.hf.checkpoints.models import save_tokenizer
from tests.hf.checkpoints.test_gguf import SIZES, write

SECONDS, BYTES = 2.0, 256_000_000
"""What a file may cost: seconds of the processor, and memory beyond the file's size."""
LIES = [
    0,
    -1,
    1,
    2**31,
    2**53,
    2**63,
    10**30,
    1e400,
    -1e400,
    float("nan"),
    True,
    None,
    "",
    "a",
    "../bait",
    "/etc/passwd",
]
LIES += ["\x1b[2J", "\ud800", "a" * 100_000, "__class__", [], {}, [[]], ["../bait"], {"../bait": "../bait"}, [0] * 5000]
LIES += [{"a": {"b": {"c": {}}}}, "F64", "model-00001-of-00002.safetensors", "os.system", "{{ x }}", "(a+)+$"]
YAML = [
    "!!python/object/apply:os.mkdir [marker]",
    "&a [*a, *a]",
    "{" * 3000,
    "- " * 3000,
    "? ? ? ?",
    "!!binary x",
    "0x" + "f" * 9000,
]
YAML += [
    "<<: {a: 1}",
    "\x00",
    "\u2028",
    "%YAML 9.9",
    "1e999999",
    "!!float x",
    "!!timestamp 9999-99-99",
    "&" * 99,
    "''': '",
]


def hostile(result, folder, cases, seed):
    """F: safetensors, index, configuration, tokenizer, GGUF and YAML files of which something is a lie."""
    sound, left = _sound(Path(folder)), list(cases)
    while left:
        ended = in_child(lambda given=tuple(left): _read_all(sound, given, seed))
        said = dict(line.split("\t", 2)[1:] for line in ended.said.splitlines() if line.startswith("case\t"))
        done = [case for case in left if str(case) in said]
        for case in done:
            fault = json.loads(said[str(case)])
            result.count(case, fault if fault != "refused" else "", detected=fault == "refused")
        left = left[len(done) :]
        if left:
            result.count(left[0], f"{_case(left[0], seed)[0]}: the process ended with {ended.code}: {ended.line}")
            left = left[1:]


def _sound(folder):
    """A folder of sound files, made once."""
    sound = folder / "sound"
    if sound.exists():
        return sound
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(sound / "model", max_shard_size="30KB")
    save_tokenizer(sound / "model")
    write(sound / "tiny.gguf", model)
    (sound / "settings.yaml").write_text(dump_config(TextConfig()))
    for read in (_read_folder, _read_gguf, _read_settings):  # what is imported late is loaded now
        read(sound, sound)
    shutil.rmtree(sound / "out")
    return sound


def _read_folder(place, out):
    tensors = Checkpoint(place / "model").tensors
    read_config(place / "model", tensors)
    load_tokenizer(place / "model")


def _read_gguf(place, out):
    unpack(place / "tiny.gguf", out / "out")


def _read_settings(place, out):
    load_config(TextConfig, place / "settings.yaml", [])


def _case(case, seed):
    """The file that lies, how it is read, and the random numbers of the lie."""
    draw = drawn(seed, case)
    kinds = ["tiny.gguf", "settings.yaml", *(f"model/{name}" for name in ("config.json", "tokenizer.json"))]
    kinds += ["model/tokenizer_config.json", "model/model.safetensors.index.json", "model/model-00001-of-"]
    name = draw.choice(kinds)
    read = {"tiny.gguf": _read_gguf, "settings.yaml": _read_settings}.get(name, _read_folder)
    return name, read, draw


def _read_all(sound, cases, seed):
    place = sound.parent / f"lies-{os.getpid()}"
    opened = []
    sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
    now = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line).split()[1])
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * now + BYTES + 20_000_000, -1))
    for case in cases:
        name, read, draw = _case(case, seed)
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(sound, place)
        (place / "bait").write_text('{"a": 1}')
        file = next(path for path in sorted(place.rglob("*")) if str(path.relative_to(place)).startswith(name))
        _lie(draw, file)
        opened.clear()
        signal.setitimer(signal.ITIMER_PROF, SECONDS * 1.5)  # which ends the process
        fault = _fault(read, place, name)
        signal.setitimer(signal.ITIMER_PROF, 0)
        outside = [path for path in opened if path == "/etc/passwd" or path.endswith("bait")]
        if outside or Path("marker").exists():
            fault = f"{name}: {outside} was opened, or its code was run"
        print("case", case, json.dumps(fault), sep="\t", flush=True)
    shutil.rmtree(place)
    return 0


def _fault(read, place, name):
    try:
        with warnings.catch_warnings(action="ignore"):
            read(place, place)
    except UserError as error:
        right = "\n" not in str(error) and "\x1b" not in str(error) and str(place) in str(error)
        return "refused" if right or (read is _read_settings and "\n" not in str(error)) else f"{name}: {str(error)!r}"
    except Exception as error:
        return f"{name}: {error!r}"[:300]
    return ""


def _lie(draw, file):
    content = file.read_bytes()
    how = draw.choice(["flip", "cut", "number", "value", "value", "value", "value"])
    if how == "value" and file.suffix == ".json":
        content = json.dumps(_with_lies(draw, json.loads(content))).encode()
    elif how == "value" and file.suffix == ".safetensors":
        length = int.from_bytes(content[:8], "little")
        header = json.dumps(_with_lies(draw, json.loads(content[8 : 8 + length]))).encode()
        content = len(header).to_bytes(8, "little") + header + content[8 + length :]
    elif how == "value" and file.suffix == ".yaml":
        lines = content.decode().splitlines()
        at = draw.randrange(len(lines))
        key = lines[at].partition(":")[0]
        value = draw.choice([*YAML, *(repr(lie) for lie in LIES)])
        lines[at] = draw.choice([f"{key}: {value}", value, f"{value}: 1", f"{key}:\n{lines[at]}\n{lines[at]}"])
        content = "\n".join(lines).encode(errors="surrogatepass")
    elif how == "cut":
        content = content[: draw.randrange(len(content))]
    elif how == "flip":
        content = bytearray(content)
        for _ in range(draw.randrange(1, 5)):
            content[draw.randrange(min(len(content), 9000))] ^= 1 << draw.randrange(8)
    else:
        size, at = draw.choice([4, 8]), draw.randrange(min(len(content), 9000) - 8)
        number = draw.choice([0, 2**31 - 1, 2**31, 2**32 - 1, 2**20, 2**62, 2**63, 2**64 - 1])
        content = content[:at] + number.to_bytes(8, "little")[:size] + content[at + size :]
    file.write_bytes(bytes(content))


def _with_lies(draw, tree):
    """A JSON value of which one to three parts are something else."""
    for _ in range(draw.randrange(1, 4)):
        parent = tree
        while True:
            key = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            below = parent[key]
            if not (isinstance(below, dict | list) and below) or draw.random() < 0.3:
                break
            parent = below
        if isinstance(parent, dict) and draw.random() < 0.2:
            parent[draw.choice(["../bait", "", "a\n", "__metadata__", "auto_map", "vocab_file", "_name_or_path"])] = (
                parent.pop(key)
            )
        elif draw.random() < 0.1:
            del parent[key]
        else:
            parent[key] = copy.deepcopy(draw.choice(LIES))  # or a lie would be told inside of itself
        if not tree:
            break
    return tree
