"""What `sparsify` makes of every architecture of the installed transformers, printed as docs/architectures.md.

python tools/architectures.py > docs/architectures.md

A tiny random model of each is built from its default configuration with smaller numbers, called with random inputs,
made sparse with copies of its blocks as experts, and called again. It takes half an hour.
"""

from __future__ import annotations

import inspect
import itertools
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, logging
from transformers.models.auto import modeling_auto

from shunter import moe_layers, sparsify
from shunter.errors import UserError
from shunter.hf.blocks import find_feed_forwards

_MAPPINGS = [
    "MODEL_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "MODEL_FOR_CTC_MAPPING", "MODEL_FOR_OBJECT_DETECTION_MAPPING",
    "MODEL_FOR_BACKBONE_MAPPING", "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING",
]  # fmt: skip

_LAYERS = re.compile(r"(^|_)(n_?layers?|num_.*layers?|.*_layers|num_blocks|depth)$")
_WIDTH = re.compile(
    r"size|dim|width|channels|d_model|d_ff|d_kv|d_inner|embd|inner|rank|ffn|features|hidden|filter|d_head|head_v|units"
)
_NOT_WIDTH = re.compile(
    r"vocab|image|patch|kernel|window|groups?$|bucket|num_channels|stride|pool|chunk|block_size|in_chans|crop|codebook_"
    r"size|batch|context|position|tubelet|tile|merge|num_mel|layers?$|heads?$|input_size|num_labels|act|grid|sample"
)


def tiny(kind: type[PreTrainedConfig], factor: int, way: str = "few", **changes: Any) -> PreTrainedConfig:
    """A configuration whose widths are a factor smaller than by default, in a way: with two layers a stack, or all."""
    extra = OVERRIDES.get(kind.model_type, {})
    default = kind(**{k: v for k, v in extra.items() if k == "prediction_length"})
    given = {}
    names = [n for n in inspect.signature(kind.__init__).parameters if n not in ("self", "kwargs", "args")]
    for name in dict.fromkeys([*names, *kind.sub_configs]):
        try:
            value = getattr(default, name)
        except Exception:
            continue
        if isinstance(value, PreTrainedConfig):
            if value.model_type in CONFIG_MAPPING or type(value) is not PreTrainedConfig:
                given[name] = tiny(type(value), factor, way)
        else:
            new = shrunk(name, value, factor, way)
            if new is not value:
                given[name] = new
    given |= extra
    given |= changes
    return kind(**given)


def shrunk(name: str, value: Any, factor: int, way: str) -> Any:
    """A field of a configuration, smaller where it is a width, a number of layers or of words."""
    if isinstance(value, bool) or value is None:
        return value
    if name == "layer_types" or name.endswith("_layer_types") or name == "layers_block_type":
        return {"few": None, "slice": value[:2], "all": value}[way]
    if isinstance(value, dict) and "mrope_section" in value:
        first, *rest = value["mrope_section"]
        small = [max(v // factor, 1) for v in rest]
        return {**value, "mrope_section": [(first + sum(rest)) // factor - sum(small), *small]}
    if isinstance(value, int):
        if name.endswith("token_id") or name.endswith("token_index"):
            return value if value < 90 else 90 + value % 10
        if "vocab_size" in name:
            return min(value, 100)
        if _LAYERS.search(name):
            return value if way == "all" else min(value, 2)
        if name == "image_size":
            return value if way == "all" else min(value, 64)
        if EXPERTS.search(name):
            return min(value, 4)
        if _WIDTH.search(name) and not _NOT_WIDTH.search(name) and value >= 64:
            return max(value // factor, 4)
        return value
    if isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
        if name in ("depths", "layers_to_use"):
            return type(value)(min(v, 2) for v in value)
        if _WIDTH.search(name) and not _NOT_WIDTH.search(name) and min(value) >= 16:
            return type(value)(max(v // factor, 4) for v in value)
    return value


EXPERTS = re.compile(r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$")


def _resnet() -> dict[str, Any]:
    from transformers import ResNetConfig

    small = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 16, 32, 32],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    return {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": small}


OVERRIDES: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 8, "context_length": 16},
    "informer": {"prediction_length": 8, "context_length": 16},
    "time_series_transformer": {"prediction_length": 8, "context_length": 16},
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8}, "hunyuan_v1_moe": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 4, "num_attention_heads": 4},
    "ministral": {"head_dim": 8},
    "detr": _resnet(), "conditional_detr": _resnet(), "dab-detr": _resnet(), "deformable_detr": _resnet(),
    "table-transformer": _resnet(),
    "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "gemma3n_text": {"intermediate_size": 64},
    "xmod": {"default_language": "en_XX"},
    "mobilenet_v2": {}, "dinov3_vit": {"hidden_size": 32, "num_attention_heads": 4},
    "hunyuan_vl_text": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["full_attention"] * 2, "num_dense_layers": 1},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 2},
}  # fmt: skip


@cache
def kinds() -> dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]]:
    """model_type -> its configuration and its model, that without a head where there is one."""
    found: dict[str, Any] = {}
    for mapping in _MAPPINGS:
        table = getattr(modeling_auto, mapping)
        for name in getattr(modeling_auto, mapping + "_NAMES"):
            if name in found or name not in CONFIG_MAPPING:
                continue
            try:
                kind = table[CONFIG_MAPPING[name]]
            except Exception as error:  # a package that is not installed
                print("no class", name, repr(error)[:100], file=sys.stderr)
                continue
            found[name] = (CONFIG_MAPPING[name], kind[0] if isinstance(kind, tuple) else kind)
    return found


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Weights large enough that every block matters."""
    for name, p in model.named_parameters():
        if not p.is_floating_point():
            continue
        if p.dim() >= 2:
            fan = p.shape[-1] if p.dim() == 2 else p[0].numel()
            p.normal_(0, fan**-0.5)
        elif "bias" in name:
            p.normal_(0, 0.2)
        else:
            p.copy_(1 + 0.1 * torch.randn_like(p))


def batches(model: PreTrainedModel) -> Any:
    """What a model may be called with, the simplest first."""
    config = model.config
    names = inspect.signature(model.forward).parameters
    needed = {n for n, p in names.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}

    def of(*attributes: str, default: Any) -> Any:
        for holder in (
            config,
            *(
                getattr(config, n, None)
                for n in ("text_config", "vision_config", "audio_config", "encoder", "encoder_config")
            ),
        ):
            for attribute in attributes:
                try:
                    value = getattr(holder, attribute, None)
                except Exception:
                    value = None
                if isinstance(value, int | list | tuple) and value:
                    return value
        return default

    vocab = min(of("vocab_size", default=50), 90)
    size = of("image_size", default=64)
    size = tuple(size) if isinstance(size, list | tuple) else (size, size)
    channels = of("num_channels", "in_channels", "in_chans", default=3)
    hidden = of("hidden_size", "d_model", default=32)
    bins = of("num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim", "input_size", default=80)
    ids = {"input_ids": torch.randint(3, vocab, (2, 8))} if "input_ids" in names else {}
    if "attention_mask" in names and ids:
        ids["attention_mask"] = torch.ones(2, 8, dtype=torch.long)
    if "decoder_input_ids" in names:
        ids_out = {"decoder_input_ids": torch.randint(3, vocab, (2, 6))}
    else:
        ids_out = {}
    if "bbox" in names and ids:
        ids["bbox"] = torch.randint(0, 50, (2, 8, 4)).sort(-1).values
    if "query_embeds" in needed:
        yield {"query_embeds": torch.randn(2, 4, hidden)}
    if "grid_thw" in needed or "image_grid_thw" in needed:
        name = "grid_thw" if "grid_thw" in needed else "image_grid_thw"
        first = next(iter(names))
        widths = {m.weight[0].numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d | nn.Linear)}
        for width in widths:
            yield {first: torch.randn(32, width), name: torch.tensor([[2, 4, 4]])}
            yield {first: torch.randn(16, width), name: torch.tensor([[1, 4, 4]])}
    pixels = [torch.randn(2, channels if isinstance(channels, int) else 3, *s) for s in (size, (64, 64), (224, 224))]
    if ids:
        if ids_out:
            yield {**ids, **ids_out}
        yield dict(ids)
        if "visual_feats" in names:
            yield {
                **ids,
                "visual_feats": torch.randn(2, 3, of("visual_feat_dim", default=32)),
                "visual_pos": torch.rand(2, 3, of("visual_pos_dim", default=4)),
            }
    if "pixel_values" in names:
        for p in pixels:
            if not ids:
                yield {"pixel_values": p, **ids_out}
            yield {**ids, "pixel_values": p}
            if "pixel_mask" in names:
                yield {**ids, "pixel_values": p, "pixel_mask": torch.ones(2, *p.shape[2:], dtype=torch.long)}
            if "qformer_input_ids" in names:
                yield {**ids, "pixel_values": p, "qformer_input_ids": ids["input_ids"]}
            yield {"pixel_values": p[:, None].expand(-1, 2, -1, -1, -1)}
            yield {"pixel_values": p[:, None].expand(-1, of("num_frames", default=2), -1, -1, -1)}
            if "prompt_pixel_values" in names:
                yield {"pixel_values": p, "prompt_pixel_values": p + 1, "prompt_masks": p - 1}
    if "pixel_values_videos" in names:
        yield {"pixel_values_videos": torch.randn(1, of("frames_per_clip", default=4), 3, *size)}
    if "input_features" in names:
        for shape in ((2, bins, 3000), (2, 64, bins), (2, bins, 64), (2, 1, 1001, bins)):
            yield {**ids, **ids_out, "input_features": torch.randn(shape)}
            if "input_features_mask" in names:
                yield {
                    "input_features": torch.randn(shape),
                    "input_features_mask": torch.ones(2, max(shape[1:]), dtype=torch.long),
                }
            if "attention_mask" in names:
                yield {
                    "input_features": torch.randn(shape),
                    "attention_mask": torch.ones(2, max(shape[1:]), dtype=torch.long),
                    **ids_out,
                }
    if "input_values" in names:
        for shape in (
            (2, 4000),
            (2, 1, 4000),
            (2, of("max_length", default=1024), bins),
            (2, 9, of("num_mel_bins", default=80)),
        ):
            yield {**ids, "input_values": torch.randn(shape), **ids_out}
            if "decoder_input_values" in names:
                yield {"input_values": torch.randint(3, 40, (2, 8)), "decoder_input_values": torch.randn(2, 6, 80)}
    for name in ("hidden_states", "inputs_embeds"):
        if name in names:
            yield {name: torch.randn(2, 8, hidden)}
    if "past_values" in names:
        length = of("context_length", default=16)
        width = of("num_input_channels", default=1)
        yield {"past_values": torch.randn(2, length, width)}
        lags = max(getattr(config, "lags_sequence", None) or [0])
        past, future = length + lags, of("prediction_length", default=8)
        one = {
            "past_values": torch.randn(2, past).abs(),
            "past_time_features": torch.randn(
                2, past, config.num_time_features if hasattr(config, "num_time_features") else 0
            ),
            "past_observed_mask": torch.ones(2, past),
            "future_values": torch.randn(2, future).abs(),
            "future_time_features": torch.randn(
                2, future, config.num_time_features if hasattr(config, "num_time_features") else 0
            ),
        }
        yield one
        yield {
            "past_values": torch.randn(2, length),
            "freq": torch.zeros(2, 1, dtype=torch.long),
            "past_values_padding": torch.zeros(2, length + 8),
        }
    if "states" in names:
        yield {
            "states": torch.randn(2, 4, config.state_dim),
            "actions": torch.randn(2, 4, config.act_dim),
            "rewards": torch.randn(2, 4, 1),
            "returns_to_go": torch.randn(2, 4, 1),
            "timesteps": torch.arange(4).expand(2, 4),
            "attention_mask": torch.ones(2, 4),
        }
    if "inputs" in names:
        yield {"inputs": torch.randint(3, vocab, (2, 8))}


class _Late(BaseException):
    """The time of an architecture is over."""


def _alarm(*args: Any) -> None:
    raise _Late


def built(name: str, limit: int = 30_000_000) -> Any:
    """Tiny models of an architecture, or errors."""
    config_class, kind = kinds()[name]
    for factor, way in itertools.product((16, 8, 4), ("few", "slice", "all")):
        try:
            torch.manual_seed(0)
            with torch.device("meta"):
                config = tiny(config_class, factor, way)
                for part in (config, *(getattr(config, n) for n in config.sub_configs)):
                    if hasattr(part, "use_cache"):
                        part.use_cache = False
                meta = kind(config)
            numbers = sum(p.numel() for p in meta.parameters())
            if numbers > limit:
                raise ValueError(f"too large at {factor}: {numbers}")
            model = kind(config)
        except _Late:
            raise
        except Exception as error:
            yield error
            continue
        draw(model)
        yield model.eval()


def prepare(name: str) -> tuple[PreTrainedModel, dict[str, Tensor] | None, str]:
    """The first model that runs, and on what; or the first at all and why it does not."""
    first: Any = None
    why = error = None
    begin = time.time()
    for model in built(name):
        if isinstance(model, Exception):
            error = error or model
            continue
        if first is None:
            first = model
        elif time.time() - begin > 40:
            break
        for batch in batches(model):
            try:
                out = run(model, batch)
                if out and all(torch.equal(a, b) for a, b in zip(out, run(model, batch), strict=True)):
                    return model, batch, ""
                why = why or "not deterministic"
            except _Late:
                raise
            except Exception as problem:
                why = why or f"{type(problem).__name__}: {problem}"
                if half := re.search(r"split_sizes to sum exactly to (\d+)", str(problem)):
                    resection(model, int(half[1]))
    if first is None:
        raise error
    return first, None, why or "nothing to call it with"


def resection(model: PreTrainedModel, half: int) -> None:
    """Rotary positions in sections that fit the tiny heads."""
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, dict) and "mrope_section" in value:
                value["mrope_section"] = sections
        if hasattr(module, "mrope_section"):
            module.mrope_section = sections
    for config in (model.config, *(getattr(model.config, n) for n in model.config.sub_configs)):
        for field in ("rope_parameters", "rope_scaling"):
            if isinstance(getattr(config, field, None), dict) and "mrope_section" in getattr(config, field):
                getattr(config, field)["mrope_section"] = sections


def run(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """Every floating tensor of a model's output; random numbers in it are the same each time."""
    torch.manual_seed(1)
    with torch.no_grad():
        out = model(**batch)
    found: list[Tensor] = []

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                found.append(value)
        elif isinstance(value, dict):
            for v in value.values():
                walk(v)
        elif isinstance(value, list | tuple):
            for v in value:
                walk(v)

    walk(out.to_tuple() if hasattr(out, "to_tuple") else out)
    return found


class Outcome(NamedTuple):
    """What becomes of an architecture: one of WORDS, where its blocks are, and why not."""

    word: str
    blocks: str = ""
    why: str = ""


WORDS = {
    "exact": "the outputs of a tiny random model are the same with copies in the place of its blocks",
    "found": "the blocks are found and proved, but no tiny model of it ran here, so no outputs were compared",
    "refused": "there are maps of fitting sizes, and more between them than an activation that the experts have",
    "none": "no block of linear maps was seen at work: convolutions, recurrences, or layers that do not run alone",
    "sparse": "it has experts already",
    "not built": "no model of it could be built here",
    "wrong": "the outputs differ",
}


def outcome(name: str, seconds: int = 90) -> Outcome:
    """What `sparsify` makes of an architecture, within a time."""
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(seconds)
    try:
        return _outcome(name)
    except _Late:
        pass
    finally:
        signal.alarm(0)
    return on_meta(name, "its tiny model took too long")


def _outcome(name: str) -> Outcome:
    try:
        model, batch, why = prepare(name)
    except Exception as error:
        return on_meta(name, f"{type(error).__name__}: {error}")
    dense = [] if batch is None else run(model, batch)
    try:
        found = patterns(block.path for stack in find_feed_forwards(model) for block in stack)
        sparse = sparsify(model, 2, "topk", top_k=2, init="copy")
    except UserError as error:
        return refusal(error)
    if batch is None:
        return Outcome("found", found, why)
    try:
        error = distance(run(sparse, batch), dense)
        for layer in moe_layers(sparse).values():
            layer.experts.down_proj.data.normal_(0, layer.experts.hidden**-0.5)
        moved = distance(run(sparse, batch), dense)
    except Exception as problem:
        return Outcome("wrong", found, f"{type(problem).__name__}: {problem}")
    if error > 1e-4:
        return Outcome("wrong", found, f"by {error:.1e} of the largest output")
    return Outcome("exact", found) if moved > 1e-3 else Outcome("found", found, "no output depends on them")


def on_meta(name: str, why: str) -> Outcome:
    """What is found in an architecture of its default size, without memory, where no tiny one could be built."""
    config, kind = kinds()[name]
    try:
        with torch.device("meta"):
            model = kind(config())
    except Exception:
        return Outcome("not built", why=why)
    try:
        stacks = find_feed_forwards(model)
    except UserError as error:
        return refusal(error)
    return Outcome("found", patterns(block.path for stack in stacks for block in stack), why)


def refusal(error: UserError) -> Outcome:
    """What the error of a model that is refused says."""
    words = str(error)
    if "already has experts" in words:
        return Outcome("sparse")
    first = re.search(r"Looked at: \S+ \((\w+: .*?)(, not just|\))", words)
    return Outcome("refused", why=first[1]) if first else Outcome("none")


def patterns(paths: Iterable[str]) -> str:
    """Where blocks are, each number a star."""
    starred = [re.sub(r"\b\d+\b", "*", path) for path in paths]
    return ", ".join(f"`{path}`" for path in dict.fromkeys(starred))


def distance(values: list[Tensor], exact: list[Tensor]) -> float:
    """The largest difference of outputs, in multiples of the largest number in each."""
    return max(relative(*pair) for pair in zip(values, exact, strict=True))


def relative(value: Tensor, exact: Tensor) -> float:
    """The largest difference, in multiples of the largest number."""
    finite = exact.isfinite()
    if value.shape != exact.shape or not torch.equal(value.isfinite(), finite):
        return float("inf")
    if not finite.any():
        return 0.0
    return float((value - exact)[finite].abs().max() / exact[finite].abs().max().clamp_min(1e-6))


def row(name: str, found: Outcome) -> str:
    """Of the table."""
    why = " ".join(found.why.replace("|", "/").split())
    return f"| {name} | {found.word} | {found.blocks or (why[:200] if found.word != 'sparse' else '')} |"


def page(rows: dict[str, Outcome]) -> str:
    """The page of all architectures."""
    counts = Counter(found.word for found in rows.values())
    shaped = counts["exact"] + counts["refused"] + counts["wrong"]
    unlisted = ("sparse", "none", "not built")
    listed = "\n".join(row(name, found) for name, found in rows.items() if found.word not in unlisted)
    words = "\n".join(f"- {word}: {counts[word]}; {meaning}." for word, meaning in WORDS.items())
    others = "\n\n".join(
        f"{word.capitalize()}: {', '.join(name for name, found in rows.items() if found.word == word)}."
        for word in ("sparse", "none", "not built")
    )
    return PAGE.format(
        version=transformers.__version__, total=len(rows), words=words, exact=counts["exact"], shaped=shaped,
        share=100 * counts["exact"] / shaped, rows=listed, others=others,
    )  # fmt: skip


PAGE = """\
# Architectures whose feed-forward blocks become sparse

`shunter.sparsify` and `shunter upcycle` find feed-forward blocks by what a model computes: a linear map down of an
activation of a linear map up, or of two maps and a gate, be they a module of their own, spread over a layer, or one
map for both. They replace that and nothing else: norms, residuals, scales, attention and dropout behind the block stay.
Each kind of layer is run, with random numbers for its weights, before it is touched; what is not exactly such a block
is refused in a line that names it.

This page is the output of `python tools/architectures.py` with transformers {version}: its {total} architectures, in
tiny random models where such could be built and called without their processors.

{words}

So {exact} of the {shaped} architectures with blocks that ran here are exact, {share:.1f} %.

| architecture | outcome | where the blocks are, or why not |
|---|---|---|
{rows}

{others}
"""


if __name__ == "__main__":
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = {}
    for name in sys.argv[1:] or sorted(kinds()):
        rows[name] = outcome(name)
        print(row(name, rows[name]), file=sys.stderr, flush=True)
    print(page(rows), end="")
