"""GGUF files of dense Llama models as folders that transformers loads, so that they can be upcycled too.

Tensors pass one by one, dequantised to float32. What a file says that is not understood here is an error, never left
out: a scaled rope, a bias, a tensor of another kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig

from ...durable import aside, make_folder, new_folder
from ...errors import UserError, one_line
from .reading import Stored
from .writing import Writer

__all__ = ["unpack", "unpacked"]

_NAMES = {
    r"token_embd\.weight": "model.embed_tokens.weight",
    r"output_norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"blk\.(\d+)\.attn_norm\.weight": "model.layers.{}.input_layernorm.weight",
    r"blk\.(\d+)\.ffn_norm\.weight": "model.layers.{}.post_attention_layernorm.weight",
    r"blk\.(\d+)\.attn_([qkv])\.weight": "model.layers.{}.self_attn.{}_proj.weight",
    r"blk\.(\d+)\.attn_output\.weight": "model.layers.{}.self_attn.o_proj.weight",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.weight": "model.layers.{}.mlp.{}_proj.weight",
}


def unpack(file: str | Path, out: str | Path, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write the model in a GGUF file as a folder of transformers: weights in float32, configuration, tokenizer.

    Args:
        file: of a dense model of the architecture "llama", in any quantisation that the package gguf knows.
        out: the folder to make; it appears when it is whole.
        max_shard_bytes: of a file.

    Raises:
        UserError: for a damaged file, one that holds anything else, an `out` that exists, and where the package gguf
            is not installed.
    """
    file = Path(file)
    reader = _open(file)
    config = _config(file, reader)
    tensors = {_name(file, tensor.name): tensor for tensor in reader.tensors}
    specs = {name: Stored(torch.float32, tuple(map(int, tensor.shape[::-1]))) for name, tensor in tensors.items()}
    with new_folder(Path(out)) as folder:
        writer = Writer(folder, specs, max_shard_bytes)
        for name, tensor in tensors.items():
            writer.write(name, _values(file, name, tensor, config))
        writer.finish()
        config.save_pretrained(folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        except Exception as error:  # a vocabulary of a kind that transformers does not read
            raise UserError(f"{file}: transformers cannot read its tokenizer: {one_line(error)}") from None
        tokenizer.save_pretrained(folder)


@contextmanager
def unpacked(file: Path, beside: Path) -> Iterator[Path]:
    """A temporary folder in `beside` with the model of a GGUF file."""
    make_folder(beside)
    with aside(beside / file.name) as folder:
        unpack(file, folder / file.stem)
        yield folder / file.stem


def _open(file: Path) -> Any:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"{file}: reading GGUF needs the package gguf; pip install gguf") from None
    try:
        return GGUFReader(file)
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        raise UserError(f"{file}: is damaged or not a GGUF file: {one_line(error)}") from None


def _config(file: Path, reader: Any) -> LlamaConfig:
    def value(name: str, default: Any = None) -> Any:
        field = reader.fields.get(name)
        if field is None and default is None:
            raise UserError(f"{file}: lacks the field {name}")
        found = default if field is None else field.contents()
        # Its floats are float32: the shortest decimal number that is the same.
        return float(str(np.float32(found))) if isinstance(found, float) else found

    architecture = value("general.architecture")
    if architecture != "llama":
        raise UserError(f"{file}: is a {architecture} model; only llama is read. Convert it with transformers")
    if value("llama.expert_count", 0):
        raise UserError(f"{file}: is sparse already")
    if value("llama.rope.scaling.type", "none") != "none":
        raise UserError(f"{file}: scales its rotary embeddings, which is not read; convert it with transformers")
    heads, dim = value("llama.attention.head_count"), value("llama.embedding_length")
    names = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in names:
        raise UserError(f"{file}: lacks the tensor token_embd.weight")
    width = value("llama.attention.key_length", dim // heads)
    if value("llama.rope.dimension_count", width) != width:
        raise UserError(f"{file}: rotates a part of each head only, which is not read; convert it with transformers")
    begin, end = (value(f"tokenizer.ggml.{which}_token_id", -1) for which in ("bos", "eos"))
    try:
        return LlamaConfig(
            vocab_size=int(names["token_embd.weight"].shape[1]),
            hidden_size=dim,
            intermediate_size=value("llama.feed_forward_length"),
            num_hidden_layers=value("llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=value("llama.attention.head_count_kv", heads),
            head_dim=width,
            max_position_embeddings=value("llama.context_length"),
            rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
            rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base", 10000.0)},
            tie_word_embeddings="output.weight" not in names,
            architectures=["LlamaForCausalLM"],
            dtype="float32",
            bos_token_id=None if begin == -1 else begin,
            eos_token_id=None if end == -1 else end,
        )
    except (TypeError, ZeroDivisionError) as error:
        raise UserError(f"{file}: does not describe a model: {one_line(error)}") from None


def _name(file: Path, name: str) -> str:
    for pattern, ours in _NAMES.items():
        found = re.fullmatch(pattern, name)
        if found:
            return ours.format(*found.groups())
    raise UserError(f"{file}: has the tensor {name!r}, which a Llama model has no place for; it is left over")


def _values(file: Path, name: str, tensor: Any, config: LlamaConfig) -> torch.Tensor:
    from gguf import dequantize

    try:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    except NotImplementedError as error:
        raise UserError(f"{file}: {name}: {one_line(error)}") from None
    found = torch.from_numpy(values).reshape(tuple(map(int, tensor.shape[::-1])))
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return found
    # llama.cpp turns neighbouring pairs of a head's rows, transformers the first half with the second.
    return found.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(found.shape)
