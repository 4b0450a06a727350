"""GGUF files of Llama, Mixtral, Qwen3-MoE and OLMoE models as folders that transformers loads.

Tensors pass one by one, dequantised to float32. What a file says of the model that is not understood here is an error,
never left out: a field, a scaling of the rope, a bias, a tensor of another kind.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from ...durable import aside, make_folder, new_folder
from ...errors import UserError, one_line
from ...untrusted import inside
from .folders import match_names, model_class, on_meta
from .gguf_header import check_header
from .reading import Stored
from .writing import Writer

__all__ = ["NAMES", "ROPE_FREQS", "unpack", "unpacked"]

# Regular expressions for names in a file, and the name in transformers with what their groups found.
NAMES = {
    r"token_embd\.weight": "model.embed_tokens.weight",
    r"output_norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"blk\.(\d+)\.attn_norm\.weight": "model.layers.{}.input_layernorm.weight",
    r"blk\.(\d+)\.ffn_norm\.weight": "model.layers.{}.post_attention_layernorm.weight",
    r"blk\.(\d+)\.attn_([qkv])\.weight": "model.layers.{}.self_attn.{}_proj.weight",
    r"blk\.(\d+)\.attn_([qk])_norm\.weight": "model.layers.{}.self_attn.{}_norm.weight",
    r"blk\.(\d+)\.attn_output\.weight": "model.layers.{}.self_attn.o_proj.weight",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.weight": "model.layers.{}.mlp.{}_proj.weight",
    r"blk\.(\d+)\.ffn_gate_inp\.weight": "model.layers.{}.mlp.gate.weight",
}
# All experts of a layer in one tensor, or, in older files, one by itself.
_EXPERTS = r"blk\.(\d+)\.ffn_(gate|up|down)(?:_exps|\.(\d+))\.weight"

ROPE_FREQS = "rope_freqs.weight"

# The fields of a model that are understood, behind the name of its architecture.
_FIELDS = {
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
    "attention.value_length", "block_count", "context_length", "embedding_length", "expert_count",
    "expert_feed_forward_length", "expert_used_count", "feed_forward_length", "rope.dimension_count", "rope.freq_base",
    "rope.scale_linear", "rope.scaling.factor", "rope.scaling.finetuned", "rope.scaling.original_context_length",
    "rope.scaling.type", "tensor_data_layout", "vocab_size",
}  # fmt: skip

_MOST_FILES = 99_999  # of a model
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def unpack(file: str | Path, out: str | Path, max_shard_bytes: int = 5_000_000_000, *, tokenizer: bool = True) -> None:
    """Write the model in a GGUF file as a folder of transformers: weights in float32, configuration, tokenizer.

    Args:
        file: of the architecture "llama", dense or with experts (Mixtral), "qwen3moe" or "olmoe", in any quantisation
            that the package gguf knows; of a model that is split into several files, the first.
        out: the folder to make; it appears when it is whole.
        max_shard_bytes: of a file.
        tokenizer: whether the file's is wanted; a file that says that it has none needs none.

    Raises:
        UserError: for a damaged file, one that holds anything else, an `out` that exists, and where the package gguf
            is not installed.
    """
    file = Path(file)
    fields, tensors = _open(file)
    config = _config(file, fields, tensors)
    tensors.pop(ROPE_FREQS, None)  # it is in the configuration
    specs: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        target, shape = _target(file, name, _shape(tensor), config)
        specs[target] = Stored(torch.float32, shape)
    match_names(file, on_meta(model_class(config, str(file)), config, file), specs)
    with new_folder(Path(out)) as folder:
        writer = Writer(folder, specs, max_shard_bytes)
        for name, tensor in tensors.items():
            for target, offset, values in _pieces(name, _values(file, name, tensor, config), config):
                writer.write(target, values, offset)
        writer.finish()
        config.save_pretrained(folder)
        if tokenizer and fields.get("tokenizer.ggml.model") not in ("no_vocab", "none"):
            _tokenizer(file).save_pretrained(folder)


def _tokenizer(file: Path) -> Any:
    """The tokenizer in a file, and nothing of what lies beside the file."""
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / file.name).symlink_to(file.resolve())
        try:
            return AutoTokenizer.from_pretrained(alone, gguf_file=file.name, trust_remote_code=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a vocabulary that transformers does not read, or a panic of its library
            raise UserError(f"{file}: transformers cannot read its tokenizer: {one_line(error)}") from None


@contextmanager
def unpacked(file: Path, beside: Path) -> Iterator[Path]:
    """A temporary folder in `beside` with the model of a GGUF file."""
    make_folder(beside)
    with aside(beside / file.name) as folder:
        unpack(file, folder / file.stem)
        yield folder / file.stem


def _open(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a model's first file, and the tensors of all of its files, by name."""
    first = _read(file)
    try:
        fields = {name: _plain(field.contents()) for name, field in first.fields.items() if not _is_vocabulary(name)}
    except Exception as error:  # a text that is none, and whatever else the reader left unread
        raise UserError(f"{file}: is damaged or not a GGUF file: {one_line(error)}") from None
    tensors = {tensor.name: tensor for tensor in first.tensors}
    count = fields.get("split.count", 1)
    if not isinstance(count, int) or not 0 <= count <= _MOST_FILES:
        raise UserError(f"{file}: the field split.count is {repr(count)[:80]}, not a number of files")
    if count > 1:  # 0 in files that were put together again
        found = _SPLIT.fullmatch(file.name)
        if not found or fields.get("split.no") != 0 or found[3] != f"{count:05}" or found[2] != "00001":
            raise UserError(
                f"{file}: is one of {count} files of a model; give the first, NAME-00001-of-{count:05}.gguf"
            )
        for number in range(2, count + 1):
            part = file.with_name(f"{found[1]}-{number:05}-of-{count:05}.gguf")
            for tensor in _read(inside(part)).tensors:
                if tensors.setdefault(tensor.name, tensor) is not tensor:
                    raise UserError(f"{part}: has the tensor {tensor.name!r} again, which another of the files has")
        total = fields.get("split.tensors.count", len(tensors))
        if total != len(tensors):
            raise UserError(f"{file}: its {count} files hold {len(tensors)} tensors, not the {total} that they should")
    return fields, tensors


def _is_vocabulary(name: str) -> bool:
    return name.startswith("tokenizer.ggml.") and not name.endswith(("_token_id", ".model"))


def _read(file: Path) -> Any:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"{file}: reading GGUF needs the package gguf; pip install gguf") from None
    check_header(file)
    try:
        return GGUFReader(file)
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        raise UserError(f"{file}: is damaged or not a GGUF file: {one_line(error)}") from None


def _plain(found: Any) -> Any:
    # Its floats are float32: the shortest decimal number that is the same.
    return float(str(np.float32(found))) if isinstance(found, float) else found


def _config(file: Path, fields: dict[str, Any], tensors: dict[str, Any]) -> PreTrainedConfig:
    architecture = fields.get("general.architecture")
    if architecture not in ("llama", "qwen3moe", "olmoe"):
        raise UserError(
            f"{file}: is a {str(architecture)[:40]} model; only llama, qwen3moe and olmoe are read. Convert it with "
            "transformers"
        )
    unknown = [name for name in fields if name.startswith(f"{architecture}.")]
    unknown = [name for name in unknown if name.partition(".")[2] not in _FIELDS]
    if unknown:
        raise UserError(f"{file}: has the field {unknown[0]}, which is not understood; convert it with transformers")

    def number(name: str, default: float | None = None, kind: Any = int) -> Any:
        found: Any = fields.get(f"{architecture}.{name}", default)
        if found is None:
            raise UserError(f"{file}: lacks the field {architecture}.{name}")
        if isinstance(found, bool) or not isinstance(found, int | kind) or not 0 <= found < 2**40:
            raise UserError(
                f"{file}: the field {architecture}.{name} is {repr(found)[:80]}, not one number of its kind"
            )
        return found

    if "token_embd.weight" not in tensors:
        raise UserError(f"{file}: lacks the tensor token_embd.weight")
    heads, dim, layers = number("attention.head_count"), number("embedding_length"), number("block_count")
    if not 0 < layers <= len(tensors) or not heads:
        raise UserError(
            f"{file}: has {layers} blocks and {heads} heads by its fields, but {len(tensors)} tensors in all"
        )
    width = number("attention.key_length", dim // heads)
    if number("attention.value_length", width) != width:
        raise UserError(f"{file}: its values are of another width than its keys, which is not read")
    if number("rope.dimension_count", width) != width:
        raise UserError(f"{file}: rotates a part of each head only, which is not read; convert it with transformers")
    context, experts = number("context_length"), number("expert_count", 0)
    begin, end = (fields.get(f"tokenizer.ggml.{which}_token_id", -1) for which in ("bos", "eos"))
    values: dict[str, Any] = {
        "vocab_size": _shape(tensors["token_embd.weight"])[0],
        "hidden_size": dim,
        "intermediate_size": number("feed_forward_length", 0 if experts else None),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": width,
        "max_position_embeddings": context,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon", None, float),
        "rope_parameters": _rope(file, fields, architecture, number, tensors.get(ROPE_FREQS), width),
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "float32",
        "bos_token_id": None if begin == -1 else begin,
        "eos_token_id": None if end == -1 else end,
    }
    family = "llama"
    if experts:
        family = {"llama": "mixtral", "qwen3moe": "qwen3_moe", "olmoe": "olmoe"}[architecture]
        values["num_experts_per_tok"] = number("expert_used_count")
        per_expert = number("expert_feed_forward_length", values["intermediate_size"])
        if family == "mixtral":
            values |= {"num_local_experts": experts, "intermediate_size": per_expert, "sliding_window": None}
        elif family == "olmoe":
            if width != dim // heads:
                raise UserError(f"{file}: its heads are {width} wide; those of OLMoE divide the model's width")
            values |= {"num_experts": experts, "intermediate_size": per_expert, "norm_topk_prob": False}
        else:
            # Both divide a token's weights by their sum.
            values |= {"num_experts": experts, "moe_intermediate_size": per_expert, "norm_topk_prob": True}
    elif architecture != "llama":
        raise UserError(f"{file}: is a {architecture} model without experts")
    name = {"llama": "Llama", "mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe", "olmoe": "Olmoe"}[family]
    try:
        return AutoConfig.for_model(family, architectures=[f"{name}ForCausalLM"], **values)
    except Exception as error:  # as many ways to fail as there are fields
        raise UserError(f"{file}: does not describe a model: {one_line(error)}") from None


def _rope(file: Path, fields: dict[str, Any], architecture: str, number: Any, freqs: Any, width: int) -> dict[str, Any]:
    """The rotary embeddings as llama.cpp reads them: a factor without a type, or by its old name, is linear."""
    kind = fields.get(f"{architecture}.rope.scaling.type", "linear")
    factor = number("rope.scaling.factor", 0.0, float) or number("rope.scale_linear", 0.0, float) or 1.0
    base = {"rope_theta": number("rope.freq_base", 10000.0, float)}
    if kind not in ("none", "linear"):
        raise UserError(
            f"{file}: scales its rotary embeddings by {str(kind)[:40]}, which is not read; convert it with transformers"
        )
    linear = kind == "linear" and factor != 1
    if freqs is None:
        return {"rope_type": "linear", "factor": factor, **base} if linear else {"rope_type": "default", **base}
    found = _llama3(np.asarray(freqs.data, dtype=np.float64).reshape(-1), base["rope_theta"], width)
    if found is None or linear:
        raise UserError(
            f"{file}: has the tensor {ROPE_FREQS!r}, which a Llama model has no place for: it scales the rotary "
            "embeddings as no Llama of transformers does"
        )
    return found | base


def _llama3(given: Any, theta: float, width: int) -> dict[str, Any] | None:
    """Llama 3's scaling that has these factors (width / 2,) by which frequencies are divided; None where none has."""
    if given.shape != (width // 2,) or not np.isfinite(given).all() or given.max() < 1:
        return None
    if np.all(given == 1):
        return {"rope_type": "default"}
    factor, low, high = float(given.max()), 1.0, 4.0
    turns = 2 * math.pi * theta ** (np.arange(0, width, 2) / width)  # tokens of a full turn
    for original in (2**power for power in range(8, 21)):
        smooth = np.clip((original / turns - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), given, rtol=1e-4, atol=0):
            scaling = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            return {"rope_type": "llama3", **scaling, "original_max_position_embeddings": original}
    return None


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(map(int, tensor.shape[::-1]))


def _num_experts(config: PreTrainedConfig) -> int:
    names = ("num_local_experts", "num_experts")
    return next((int(getattr(config, name)) for name in names if hasattr(config, name)), 0)


def _sizes(config: PreTrainedConfig) -> tuple[int, int, int]:
    """E, f and d."""
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return _num_experts(config), width, config.hidden_size


def _target(file: Path, name: str, shape: tuple[int, ...], config: PreTrainedConfig) -> tuple[str, tuple[int, ...]]:
    """The name in transformers of the tensor that one of the file is, or is a part of; and its shape."""
    for pattern, ours in NAMES.items():
        if plain := re.fullmatch(pattern, name):
            return ours.format(*plain.groups()), shape
    found = re.fullmatch(_EXPERTS, name)
    experts, width, dim = _sizes(config)
    if not found or not experts:
        raise UserError(f"{file}: has the tensor {name!r}, which such a model has no place for; it is left over")
    layer, part, one = found.groups()
    expected = (dim, width) if part == "down" else (width, dim)
    if shape != (expected if one else (experts, *expected)) or (one and int(one) >= experts):
        raise UserError(f"{file}: {name!r} has shape {list(shape)}; its fields ask for {experts} of {list(expected)}")
    path = f"model.layers.{layer}.mlp.experts"
    if part == "down":
        return f"{path}.down_proj", (experts, dim, width)
    return f"{path}.gate_up_proj", (experts, 2 * width, dim)


def _pieces(name: str, values: Tensor, config: PreTrainedConfig) -> Iterator[tuple[str, int, Tensor]]:
    """Where the values of a tensor of the file come to lie: in which tensor, behind how many of its elements."""
    target, _ = _target(Path(), name, tuple(values.shape), config)
    found = re.fullmatch(_EXPERTS, name)
    if found is None:
        yield target, 0, values
        return
    _, width, dim = _sizes(config)
    _, part, one = found.groups()
    for e, expert in enumerate(values) if one is None else [(int(one), values)]:
        size = width * dim
        yield target, e * size if part == "down" else (2 * e + (part == "up")) * size, expert


def _values(file: Path, name: str, tensor: Any, config: PreTrainedConfig) -> Tensor:
    from gguf import dequantize

    try:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    except Exception as error:  # a kind that is not known, or sizes that are none
        raise UserError(f"{file}: {name}: {one_line(error)}") from None
    found = torch.from_numpy(values).reshape(_shape(tensor))
    if not bool(found.isfinite().all()):
        raise UserError(f"{file}: {name!r} holds NaN or infinity; the model is broken, take an earlier one")
    turned = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    heads = turned.get(name.split(".")[-2])
    if heads is None or config.model_type in ("qwen3_moe", "olmoe"):
        return found
    # llama.cpp turns neighbouring pairs of a head's rows, transformers the first half with the second.
    return found.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(found.shape)
