"""Every architecture of the installed transformers as a tiny random model, and what `sparsify` makes of it."""

from __future__ import annotations

import inspect
import re
import signal
import sys
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, logging
from transformers.models.auto import modeling_auto

from shunter import moe_layers, sparsify
from shunter.errors import UserError

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


def tiny(kind: type[PreTrainedConfig], factor: int, **changes: Any) -> PreTrainedConfig:
    """A configuration whose widths are a factor smaller than by default, with two layers a stack."""
    default = kind()
    given = {}
    names = [n for n in inspect.signature(kind.__init__).parameters if n not in ("self", "kwargs", "args")]
    for name in dict.fromkeys([*names, *kind.sub_configs]):
        if not hasattr(default, name):
            continue
        value = getattr(default, name)
        if isinstance(value, PreTrainedConfig):
            if value.model_type in CONFIG_MAPPING or type(value) is not PreTrainedConfig:
                given[name] = tiny(type(value), factor)
        else:
            new = shrunk(name, value, factor)
            if new is not value:
                given[name] = new
    given |= changes
    return kind(**given)


def shrunk(name: str, value: Any, factor: int) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if name == "layer_types" or name.endswith("_layer_types") or name == "layers_block_type":
        return None
    if isinstance(value, int):
        if name.endswith("token_id") or name.endswith("token_index"):
            return value if value < 90 else 90 + value % 10
        if "vocab_size" in name:
            return min(value, 100)
        if _LAYERS.search(name):
            return min(value, 2)
        if name in ("image_size", "max_source_positions", "max_position_embeddings", "max_positions"):
            return min(value, 64) if name == "image_size" else value
        if _WIDTH.search(name) and not _NOT_WIDTH.search(name) and value >= 64:
            return max(value // factor, 4)
        return value
    if isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
        if name in ("depths", "layers_to_use"):
            return type(value)(min(v, 2) for v in value)
        if _WIDTH.search(name) and not _NOT_WIDTH.search(name) and min(value) >= 16:
            return type(value)(max(v // factor, 4) for v in value)
    return value


def kinds() -> dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]]:
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
            p.normal_(0, fan ** -0.5)
        elif "bias" in name:
            p.normal_(0, 0.2)
        else:
            p.copy_(1 + 0.1 * torch.randn_like(p))


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    config = model.config
    names = inspect.signature(model.forward).parameters
    try:
        text = config.get_text_config()
    except Exception:
        text = config
    vocab = getattr(text, "vocab_size", None) or 50
    found: dict[str, Any] = {}
    images = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", None) or 64
    images = images if isinstance(images, list | tuple) else (images, images)
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", 3) or 3
    if "input_ids" in names:
        found["input_ids"] = torch.randint(3, min(vocab, 90), (2, 8))
        if "attention_mask" in names:
            found["attention_mask"] = torch.ones(2, 8, dtype=torch.long)
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
            found["decoder_input_ids"] = torch.randint(3, min(vocab, 90), (2, 6))
        if "pixel_values" in names and names["pixel_values"].default is inspect.Parameter.empty:
            found["pixel_values"] = torch.randn(2, channels, *images)
        if type(model).__name__ in ("CLIPModel",) :
            pass
    elif "pixel_values_videos" in names and "pixel_values" not in names:
        found["pixel_values_videos"] = torch.randn(1, getattr(config, "frames_per_clip", 4), channels, *images)
    elif "pixel_values" in names:
        found["pixel_values"] = torch.randn(2, channels, *images)
    elif "input_features" in names:
        bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 80
        found["input_features"] = torch.randn(2, 40, bins)
    elif "input_values" in names:
        found["input_values"] = torch.randn(2, 4000)
    elif "hidden_states" in names:
        found["hidden_states"] = torch.randn(2, 8, getattr(config, "hidden_size", 32))
    elif "inputs_embeds" in names:
        found["inputs_embeds"] = torch.randn(2, 8, getattr(config, "hidden_size", 32))
    elif "past_values" in names:
        found["past_values"] = torch.randn(2, getattr(config, "context_length", 16), getattr(config, "num_input_channels", 1))
    return found


class _Late(Exception):
    pass


def _alarm(*args: Any) -> None:
    raise _Late("time limit")


def build(name: str, limit: int = 30_000_000) -> PreTrainedModel:
    config_class, kind = kinds_()[name]
    last: Exception | None = None
    for factor in (16, 8, 4, 2):
        try:
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with torch.device("meta"):
                    meta = kind(tiny(config_class, factor))
                if sum(p.numel() for p in meta.parameters()) > limit:
                    last = ValueError(f"too large at {factor}: {sum(p.numel() for p in meta.parameters())}")
                    continue
                model = kind(tiny(config_class, factor))
        except _Late:
            raise
        except Exception as error:
            last = last or error
            continue
        draw(model)
        return model.eval()
    raise last


_KINDS: dict[str, Any] = {}


def kinds_() -> dict[str, Any]:
    if not _KINDS:
        _KINDS.update(kinds())
    return _KINDS


def run(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
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


def outcome(name: str) -> tuple[str, str]:
    """What `sparsify` makes of an architecture, in one word, and more words."""
    try:
        model = build(name)
    except Exception as error:
        return "not built", f"{type(error).__name__}: {error}"
    batch: dict[str, Tensor] = {}
    why, dense = None, []
    try:
        batch = inputs(model)
        dense = run(model, batch)
        again = run(model, batch)
        if not dense or any(not torch.equal(a, b) for a, b in zip(dense, again)):
            why = "not deterministic"
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    try:
        sparse = sparsify(model, 2, "topk", top_k=2, init="copy")
    except UserError as error:
        return ("sparse already" if "already has experts" in str(error) else "refused"), str(error)
    layers = moe_layers(sparse)
    words = f"{len(layers)} blocks: " + ", ".join(layers)
    if why is not None:
        return "not run", f"{words}; {why}"
    try:
        out = run(sparse, batch)
        error = max((relative(a, b) for a, b in zip(out, dense, strict=True)), default=float("inf"))
        for layer in layers.values():
            layer.experts.down_proj.data.mul_(1.5)
        moved = max(relative(a, b) for a, b in zip(run(sparse, batch), dense, strict=True))
        ran = sum(layer.routing is not None for layer in layers.values())
    except Exception as error:
        return "wrong", f"{words}; {type(error).__name__}: {error}"
    words = f"{error:.1e}, moved {moved:.1e}, {ran} ran, {words}"
    if error > 1e-4:
        return "wrong", words
    if moved < 1e-3:
        return "not reached", words
    return "exact", words


def relative(value: Tensor, exact: Tensor) -> float:
    if value.shape != exact.shape:
        return float("inf")
    finite = exact.isfinite()
    if not torch.equal(value.isfinite(), finite):
        return float("inf")
    if not finite.any():
        return 0.0
    return float((value - exact)[finite].abs().max() / exact[finite].abs().max().clamp_min(1e-6))


if __name__ == "__main__":
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _alarm)
    wanted = sys.argv[1:] or list(kinds_())
    for name in wanted:
        begin = time.time()
        signal.alarm(90)
        try:
            word, more = outcome(name)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            word, more = "crashed", f"{type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
        print(f"{word}\t{name}\t{time.time() - begin:.1f}\t{' '.join(more.split())[:600]}", flush=True)
