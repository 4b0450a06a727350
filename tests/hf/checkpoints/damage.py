"""What can be wrong with a model folder: (folder, marker) damages it; code in it that ran would make the marker."""

import json
import os
import pickle
import struct

import torch
from safetensors.torch import load_file, save_file


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def header_of(file):
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(file, header, data):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def tensors(change):
    """A damage that changes the tensors of model.safetensors."""

    def damage(folder, marker):
        found = load_file(folder / "model.safetensors")
        change(found, next(name for name in found if name.endswith("embed_tokens.weight")))
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return damage


def config(**changes):
    def damage(folder, marker):
        found = json.loads((folder / "config.json").read_text()) | changes
        kept = {name: value for name, value in found.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return damage


def index_to(where):
    """Weights that an index places elsewhere, where they lie indeed."""

    def damage(folder, marker):
        file = folder / "model.safetensors"
        names = list(load_file(file))
        outside = marker.parent / "outside.safetensors"
        file.rename(outside)
        target = {"relative": "../outside.safetensors", "absolute": str(outside), "link": "link.safetensors"}[where]
        if where == "link":
            (folder / target).symlink_to(outside)
        weight_map = dict.fromkeys(names, target)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return damage


def linked(folder, marker):
    outside = marker.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)


def pickled(folder, marker):
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Evil(marker)))


def remote_code(folder, marker):
    (folder / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    names = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"}
    config(model_type="evil", auto_map=names)(folder, marker)


def short(folder, marker):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def header(change):
    def damage(folder, marker):
        file = folder / "model.safetensors"
        write_header(file, *change(*header_of(file)))

    return damage


def overlapping(found, data):
    names = [name for name in found if name != "__metadata__"]
    found[names[0]]["data_offsets"] = found[names[1]]["data_offsets"]
    return found, data


def text(name, content):
    def damage(folder, marker):
        (folder / name).write_text(content)

    return damage


def without(name):
    def damage(folder, marker):
        (folder / name).unlink()

    return damage


DAMAGE = {
    "huge header": lambda folder, marker: (folder / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}"),
    "empty file": lambda folder, marker: (folder / "model.safetensors").write_bytes(b""),
    "header not JSON": header(lambda found, data: (b"{{{{", data)),
    "deep header": header(lambda found, data: (b"[" * 100_000, data)),
    "overlapping tensors": header(overlapping),
    "truncated": short,
    "index up": index_to("relative"),
    "index absolute": index_to("absolute"),
    "index to a link": index_to("link"),
    "link": linked,
    "pickles only": pickled,
    "wrong shape": tensors(lambda found, name: found.update({name: found[name][:-1].clone()})),
    "NaN": tensors(lambda found, name: found[name][0].fill_(float("nan"))),
    "missing tensor": tensors(lambda found, name: found.pop(name)),
    "extra tensor": tensors(lambda found, name: found.update({"model.layers.0.evil": torch.zeros(3)})),
    "no config": without("config.json"),
    "config not JSON": text("config.json", "{'a': 1"),
    "config a list": text("config.json", "[]"),
    "unknown model": config(model_type="evil"),
    "no model type": config(model_type=None),
    "no architecture": config(architectures=None),
    "unknown architecture": config(architectures=["EvilForCausalLM"]),
    "architecture a number": config(architectures=[3]),
    "a module as architecture": config(architectures=["os"]),
    "absurd size": config(hidden_size=10**12),
    "absurd layers": config(num_hidden_layers=10**6),
    "negative size": config(num_attention_heads=-4),
    "text for a number": config(hidden_size="many"),
    "remote code": remote_code,
}
LAYER = {"name": "model.layers.0.mlp", "num_experts": 4, "hidden": 48, "router": "topk", "options": {}}


def layers(*entries):
    return config(shunter={"layers": list(entries)})


SPARSE = {
    "spec not an object": config(shunter=3),
    "spec empty": config(shunter={}),
    "spec absurd": config(shunter={"num_experts": -1, "router": "topk"}),
    "spec of unknown words": config(shunter={"num_experts": 4, "router": "topk", "evil": 1}),
    "spec of an unknown layout": config(shunter={"num_experts": 4, "router": "topk", "layout": "(d, f, E)"}),
    "layers a number": config(shunter={"layers": 3}),
    "layers of numbers": layers(3),
    "a layer without a name": layers({"num_experts": 4}),
    "a layer that is nowhere": layers({**LAYER, "name": "model.layers.9.mlp"}),
    "a layer named by a list": layers({**LAYER, "name": ["model"]}),
    "a layer twice": layers(LAYER, LAYER, {**LAYER, "name": "model.layers.1.mlp"}),
    "a layer without a size": layers({name: LAYER[name] for name in ("name", "router", "options")}),
    "a layer absurd": layers({**LAYER, "hidden": 10**12}),
    "a layer of unknown words": layers({**LAYER, "evil": 1}),
    "options of unknown words": layers({**LAYER, "options": {"evil": 1}}),
    "options a number": layers({**LAYER, "options": 3}),
    "an unknown router": layers({**LAYER, "router": "os.system"}),
}
# Of a sound model, but not of the one whose tensors stand beside.
OTHER = {
    "a layer missing": layers(LAYER),
    "a layer of another size": layers({**LAYER, "hidden": 47}, {**LAYER, "name": "model.layers.1.mlp"}),
}


def fifo(name):
    def damage(folder, marker):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def link_to(name, target):
    """A link in place of a file: to a file outside, which would do, or to a device."""

    def damage(folder, marker):
        outside = marker.parent / f"outside-{name}"
        if target is None:
            (folder / name).rename(outside)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target or outside)

    return damage


def integers(folder, marker):
    found = load_file(folder / "model.safetensors")
    save_file({name: t.to(torch.int32) for name, t in found.items()}, folder / "model.safetensors", {"format": "pt"})


def many_tensors(folder, marker):
    """A small header for each of a million tensors without elements."""
    names = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(10**6))
    raw = b"{" + names.encode() + b"}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)


def bytes_of(name, content):
    def damage(folder, marker):
        (folder / name).write_bytes(content)

    return damage


def extra(**changes):
    """Fields of config.json, and of what it says of each sparse layer, made huge."""

    def damage(folder, marker):
        found = json.loads((folder / "config.json").read_text())
        for layer in found.get("shunter", {}).get("layers", []):
            layer.update({name: value for name, value in changes.items() if name in layer})
        (folder / "config.json").write_text(json.dumps(found | changes))

    return damage


HOSTILE = {
    "weights a FIFO": fifo("model.safetensors"),
    "config a FIFO": fifo("config.json"),
    "generation settings a FIFO": fifo("generation_config.json"),
    "generation settings of lists": bytes_of("generation_config.json", b'{"a": [' + b"[]," * 3_000_000 + b"[]]}"),
    "generation settings with a million beams": text("generation_config.json", '{"num_beams": 1000000}'),
    "tokenizer a FIFO": fifo("tokenizer.json"),
    "config a device": link_to("config.json", "/dev/zero"),
    "config a link": link_to("config.json", None),
    "tokenizer a link": link_to("tokenizer.json", None),
    "templates a link": link_to("additional_chat_templates", "/etc"),
    "tokenizer elsewhere": text("tokenizer_config.json", '{"tokenizer_file": "/etc/passwd"}'),
    "tokenizer up": text("tokenizer_config.json", '{"vocab_file": "../../../../../../../../etc/passwd"}'),
    "an adapter": text("adapter_config.json", '{"base_model_name_or_path": "/etc"}'),
    "a distributed checkpoint": text("shard-00000-model-00001-of-00001.safetensors", ""),
    "config deep": bytes_of("config.json", b'{"a":' * 200_000),
    "config of lists": bytes_of("config.json", b'{"model_type": [' + b"[]," * 3_000_000 + b"[]]}"),
    "config of 200 MB": bytes_of("config.json", b" " * 200_000_000),
    "config with a number of many digits": bytes_of("config.json", b'{"hidden_size": ' + b"9" * 10_000 + b"}"),
    "a million tensors": many_tensors,
    "weights of integers": integers,
    "huge vocabulary": config(vocab_size=2**31 - 1),
    "huge positions": config(max_position_embeddings=2**31 - 1),
    "huge lists of layers": config(layer_types=None, num_hidden_layers=2**30),
    "huge sizes within": config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "size": 2**30}),
    "huge experts": extra(num_experts=2**30, num_local_experts=2**30),
    "huge width": extra(hidden=2**30, intermediate_size=2**30),
}
