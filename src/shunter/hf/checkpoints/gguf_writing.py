"""Sparse models in memory to GGUF files for llama.cpp: Mixtral, Qwen3-MoE, OLMoE, and what they can express.

A layer's experts lie in three stacked tensors, (E, f, d), (E, f, d) and (E, d, f). Codes of 8 and 4 bits keep theirs:
Q8_0, Q4_0 and Q4_1 have blocks of 32 neighbours, each with a float16 scale, in the order that `experts.quantised` has.
Where the experts of a layer have codes of both kinds, all are in Q8_0, which holds 4-bit codes exactly. Norms and
routers are in float32, all else in the model's dtype. What the file cannot say of the model is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ...durable import writing
from ...errors import UserError
from ...experts import Experts, Weights
from ...experts.quantised import STEP, Packed, QuantisedWeights
from ..backend import coded_of, layout_of
from .gguf import NAMES, ROPE_FREQS
from .layouts import layers_of, must_be_blocks
from .native import FAMILIES, family_for

__all__ = ["ARCHITECTURES", "write_gguf"]

ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe", "olmoe": "olmoe"}
"""By family of transformers what llama.cpp calls it."""

_FLOATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class _Entry(NamedTuple):
    """A tensor of the file: its kind, shape, the name it had, how much its values moved; its bytes when asked for."""

    kind: str
    shape: tuple[int, ...]
    source: str
    error: float
    data: Callable[[], Any]


@torch.no_grad()
def write_gguf(model: PreTrainedModel, file: str | Path, tokenizer: Any = None) -> dict[str, Any]:
    """Write a sparse model as a GGUF file of the architecture "llama" (Mixtral), "qwen3moe" or "olmoe".

    Args:
        model: Mixtral, Qwen3-MoE or OLMoE of transformers, or a model of `shunter.sparsify` that one of them can be;
            its experts may be in codes of `shunter.quantize`.
        file: the file to make; it appears when it is whole.
        tokenizer: of transformers. One that is no byte-level BPE with splits that llama.cpp has a name for is left out,
            as None is: the file then takes token ids alone.

    Returns:
        For JSON: `architecture`, `tokenizer` (the name of its splits, or why there is none), and `tensors` by name in
        the file, each with `type`, the name `from` which it came, and `error`: by how much its values moved, relative,
        which is not 0 where a scale is no number of float16.

    Raises:
        UserError: where the model is of no such family or the file has no field for what it computes.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    config, parameters, experts = _as_family(model)
    architecture = ARCHITECTURES[config.model_type]
    _must_be_plain(config, len(experts))
    entries = dict(_entries(config, architecture, parameters, experts))
    if (freqs := _rope_freqs(config, model)) is not None:
        if architecture != "llama":
            raise UserError(f"export: llama.cpp has no place for the scaled rope of a {config.model_type} model")
        entries[ROPE_FREQS] = _Entry("F32", tuple(freqs.shape), "rope_parameters", 0.0, freqs.numpy)
    with writing(Path(file)) as part:
        writer = GGUFWriter(part, architecture)
        _add_fields(writer, config)
        said = _add_tokenizer(writer, tokenizer, config)
        for name, entry in entries.items():
            kind = GGMLQuantizationType[entry.kind]
            # Of uint8, the package would take the shape for one in bytes.
            writer.add_tensor_info(name, entry.shape, np.dtype(np.int8), _nbytes(entry), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries.values():
            writer.write_tensor_data(np.ascontiguousarray(entry.data()))
        writer.close()
    tensors = {n: {"type": e.kind, "from": e.source, "error": e.error} for n, e in entries.items()}
    return {"architecture": architecture, "tokenizer": said, "tensors": tensors}


def _nbytes(entry: _Entry) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[entry.kind]]
    return int(np.prod(entry.shape)) // block * size


def _as_family(
    model: PreTrainedModel,
) -> tuple[PreTrainedConfig, dict[str, Tensor], dict[str, Weights | QuantisedWeights]]:
    """A model as one of a family: configuration, parameters outside of experts by name, experts by layer's number."""
    name, parameters = type(model).__name__, {n: p.detach() for n, p in model.named_parameters()}
    experts: dict[str, Weights | QuantisedWeights] = {}
    if layers := layers_of(model):
        must_be_blocks(model)
        config = family_for(model.config, name).write(model).config
        for path, layer in layers.items():
            number = path.split(".")[-2]
            found: Any = layer.experts
            experts[number] = found.weights if isinstance(found, Experts) else found.weights(torch.float32)
            parameters[f"model.layers.{number}.mlp.gate.weight"] = parameters.pop(f"{path}.router.weight")
            parameters = {n: p for n, p in parameters.items() if not n.startswith(f"{path}.experts.")}
    else:
        config = model.config
        if config.model_type in FAMILIES and FAMILIES[config.model_type].architecture != name:
            raise UserError(f"export: {name} is not a causal language model")
        for path, module in model.named_modules():
            coded = coded_of(module)
            weights = layout_of(module) if coded is None else coded.weights(torch.float32)
            if weights is not None:
                experts[path.split(".")[-3]] = weights
                parameters = {n: p for n, p in parameters.items() if not n.startswith(f"{path}.")}
    if config.model_type not in ARCHITECTURES or not experts:
        known = ", ".join(FAMILIES[family].architecture for family in ARCHITECTURES)
        raise UserError(f"export: GGUF is written of {known} and of what they can express; this is a {name}")
    return config, parameters, experts


def _must_be_plain(config: PreTrainedConfig, layers: int) -> None:
    """Raises UserError where the configuration says what llama.cpp computes otherwise."""
    sums = {"qwen3_moe": True, "olmoe": False}.get(config.model_type)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    odd = {
        f"norm_topk_prob={not sums}": sums is not None and config.norm_topk_prob != sums,
        f"hidden_act={config.hidden_act!r}": config.hidden_act not in ("silu", "swish"),
        f"clip_qkv={getattr(config, 'clip_qkv', None)}": getattr(config, "clip_qkv", None) is not None,
        f"sliding_window={window}": window is not None and window < config.max_position_embeddings,
        f"{config.num_hidden_layers - layers} dense layers": layers != config.num_hidden_layers,
        f"heads of {width}": width % 2 == 1,
        "fewer heads of keys than of queries": config.model_type == "olmoe"
        and config.num_key_value_heads != config.num_attention_heads,
    }
    for what, is_so in odd.items():
        if is_so:
            raise UserError(f"export: llama.cpp has no {config.model_type} with {what}; keep transformers' format")


def _entries(
    config: PreTrainedConfig,
    architecture: str,
    parameters: dict[str, Tensor],
    experts: dict[str, Weights | QuantisedWeights],
) -> Iterator[tuple[str, _Entry]]:
    turned = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for source, value in parameters.items():
        name = _name(source)
        if name is None:
            raise UserError(f"export: llama.cpp has no place for {source!r} of a {config.model_type} model")
        heads = turned.get(source.split(".")[-2])
        if heads is not None and architecture == "llama":
            # llama.cpp turns neighbouring pairs of a head's rows, transformers the first half with the second.
            value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(value.shape)
        if value.dim() == 1 or source.endswith(".mlp.gate.weight"):
            value = value.float()
        yield name, _floats(value, source)
    for number, weights in experts.items():
        f, source = weights.hidden, f"model.layers.{number}.mlp.experts"
        if weights.up_bias is not None or weights.activation != "swiglu":
            raise UserError(f"export: llama.cpp has no {config.model_type} whose experts have biases or do not gate")
        for part, side, rows in (("gate", "up", slice(0, f)), ("up", "up", slice(f, 2 * f)), ("down", "down", None)):
            name = f"blk.{number}.ffn_{part}_exps.weight"
            if isinstance(weights, QuantisedWeights):
                packed: Packed = getattr(weights, side)
                yield name, _codes(packed, rows or slice(0, packed.rows), f"{source}.coded.{side}_codes")
            else:
                stacked: Tensor = getattr(weights, side).detach()
                yield name, _floats(stacked[:, rows] if rows else stacked, f"{source}.{side}")


def _name(source: str) -> str | None:
    """The name in a file of a model's parameter, by the table that reading uses."""
    for pattern, template in NAMES.items():
        groups = re.findall(r"\(.*?\)", pattern)
        if found := re.fullmatch(template.replace(".", r"\.").format(*groups), source):
            return re.sub(r"\(.*?\)", "{}", pattern).replace("\\", "").format(*found.groups())
    return None


def _floats(value: Tensor, source: str) -> _Entry:
    kind = _FLOATS.get(value.dtype)
    if kind is None:
        raise UserError(f"export: {source} is of {value.dtype}; GGUF has float32, bfloat16 and float16")

    def data() -> Any:
        plain = value.contiguous().cpu()
        return (plain.view(torch.int16) if kind == "BF16" else plain).numpy()

    return _Entry(kind, tuple(value.shape), source, 0.0, data)


def _codes(packed: Packed, rows: slice, source: str) -> _Entry:
    """Rows of each expert's matrix in the blocks of the kind that holds its codes; float32 where none does."""
    coding, experts = packed.coding, len(packed.coding.bits)
    shape = experts, rows.stop - rows.start, packed.columns
    zeros = "Q4_1" if coding.zero_point else "Q4_0"
    kind = zeros if set(coding.bits) == {4} else "Q8_0"
    scales = packed.scale.view(torch.bfloat16).float()
    if packed.columns % STEP or bool(scales.half().isinf().any()):
        decoded = lambda: torch.stack([packed.matrix(e)[rows] for e in range(experts)]).cpu().numpy()  # noqa: E731
        return _Entry("F32", shape, source, 0.0, decoded)
    lost = total = 0.0
    for e in range(experts):
        blocks, exact = _Blocks.of(packed, e, rows), packed.matrix(e)[rows]
        lost += float((blocks.values(kind).view(exact.shape) - exact).double().square().sum())
        total += float(exact.double().square().sum())
    error = (lost / total) ** 0.5 if total else 0.0
    return _Entry(kind, shape, source, error, lambda: _joined(packed, rows, kind))


def _joined(packed: Packed, rows: slice, kind: str) -> Any:
    return np.stack([_Blocks.of(packed, e, rows).bytes(kind) for e in range(len(packed.coding.bits))])


class _Blocks(NamedTuple):
    """Rows of an expert's matrix by blocks of 32: codes (B, 32) in int16, scale and zero (B, 1) in float32."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, packed: Packed, e: int, rows: slice) -> _Blocks:
        coding, columns = packed.coding, packed.columns
        codes_at, scales_at = coding.starts(packed.rows, columns)
        raw = packed.codes[codes_at[e] : codes_at[e + 1]].view(packed.rows, -1)[rows]
        scale = packed.scale[scales_at[e] : scales_at[e + 1]].view(torch.bfloat16).float().view(packed.rows, -1)[rows]
        count = columns // STEP
        if coding.bits[e] == 8:
            codes = raw.view(torch.int8).unflatten(1, (-1, STEP))[:, :count]
            scale, zero = scale.expand(-1, count), torch.zeros(rows.stop - rows.start, count)
        else:
            pairs = raw.unflatten(1, (-1, STEP // 2))[:, :count]
            codes = torch.cat([pairs & 15, pairs >> 4], 2)
            zero = torch.full_like(scale, 8)
            if coding.zero_point:
                zero = packed.zero[scales_at[e] : scales_at[e + 1]].view(packed.rows, -1)[rows].float()
            # A group of 64 is two blocks of the same scale.
            scale, zero = (s.repeat_interleave(coding.group // STEP, 1)[:, :count] for s in (scale, zero))
        return cls(codes.short().reshape(-1, STEP), scale.reshape(-1, 1), zero.reshape(-1, 1).to(scale.device))

    def values(self, kind: str) -> Tensor:
        """What a reader of the file makes of the blocks, in float32."""
        scale, codes = self.scale.half().float(), self.codes.float()
        if kind == "Q4_1":
            return codes * scale + self.lowest().float()
        return (codes - self.zero) * scale

    def lowest(self) -> Tensor:
        """What the code 0 stands for, (B, 1) in float16."""
        return (-self.zero * self.scale).half()

    def bytes(self, kind: str) -> Any:
        """The blocks, (B, n) in uint8."""
        head = [self.scale.half(), *([self.lowest()] if kind == "Q4_1" else [])]
        if kind == "Q8_0":
            body = (self.codes - self.zero.short()).to(torch.int8).view(torch.uint8)
        else:
            low, high = self.codes.to(torch.uint8).view(-1, 2, STEP // 2).unbind(1)
            body = low | (high << 4)
        return torch.cat([*(part.view(torch.uint8) for part in head), body], 1).cpu().numpy()


def _rope_freqs(config: PreTrainedConfig, model: PreTrainedModel) -> Tensor | None:
    """By what llama.cpp is to divide each frequency of the rope, (width / 2,); None where it divides by none."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"export: the rope's scaling {kind!r} is not written to GGUF; keep transformers' format")
    if rope.get("partial_rotary_factor", 1.0) != 1:
        raise UserError("export: a rope that turns a part of each head is not written to GGUF")
    if kind != "llama3":
        return None
    decoder: Any = model.get_decoder()
    found = decoder.rotary_emb.inv_freq.detach().float().cpu()
    plain = rope["rope_theta"] ** (-torch.arange(0, 2 * len(found), 2).double() / (2 * len(found)))
    return (plain / found.double()).float()


def _add_fields(writer: Any, config: PreTrainedConfig) -> None:
    """What llama.cpp reads of a model's sizes."""
    from gguf import RopeScalingType

    mixtral, rope = config.model_type == "mixtral", config.rope_parameters
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_local_experts if mixtral else config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


_CLITICS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_CLITICS + r"\p{N}" + _REST: "qwen2", _CLITICS + r"\p{N}{1,3}" + _REST: "llama-bpe"}
"""Regular expressions by which texts are cut before merging, and what llama.cpp calls each."""


def _cut(found: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer cuts texts before it merges bytes, or None."""
    before = found.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    *first, last = steps
    plain = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    if not plain or found["model"].get("type") != "BPE" or found["model"].get("byte_fallback"):
        return None
    if (found.get("normalizer") or {"type": "NFC"}).get("type") != "NFC":
        return None
    if last.get("use_regex", True):
        digits = [{"type": "Digits", "individual_digits": True}]
        return "gpt-2" if not first else "smollm" if first == digits else None
    if len(first) == 1 and first[0].get("type") == "Split" and first[0].get("behavior") == "Isolated":
        return _SPLITS.get(first[0]["pattern"].get("Regex"))
    return None


def _add_tokenizer(writer: Any, tokenizer: Any, config: PreTrainedConfig) -> str:
    """Write a tokenizer that llama.cpp knows, or that there is none; what was written, in words."""
    from gguf import TokenType

    backend = getattr(tokenizer, "backend_tokenizer", None)
    found = {} if backend is None else json.loads(backend.to_str())
    cut = _cut(found) if found else None
    if cut is None or len(tokenizer) > config.vocab_size:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(config.vocab_size)
        return "none was given" if tokenizer is None else "left out: llama.cpp has no name for how it cuts texts"
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    kinds = [TokenType.UNUSED] * config.vocab_size
    for token, i in found["model"]["vocab"].items():
        tokens[i], kinds[i] = token, TokenType.NORMAL
    for added in found.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in found["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for name, number in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)):
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    begins = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins and tokenizer.bos_token_id is not None)
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(tokenizer.chat_template)
    return cut
