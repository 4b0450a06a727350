"""Two model folders to the difference of their logits, beside what rounding alone does."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import UserError
from .loading import load_folder

__all__ = ["compare_logits", "probe"]

TOLERANCE = 8
"""How many times the dense model's own rounding error the difference may be (root mean square)."""


def probe(model: PreTrainedModel, length: int = 32) -> dict[str, Tensor]:
    """Random input for a model: token ids, also for the decoder, or an image.

    Raises:
        UserError: for a model that takes something else.
    """
    config: PreTrainedConfig = model.config
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(1, config.num_channels, height, width, generator=generator)}
    if model.main_input_name != "input_ids":
        raise UserError(
            f"{type(model).__name__} takes {model.main_input_name}, for which there is no check; leave the check out"
        )
    ids = torch.randint(config.get_text_config().vocab_size, (2, length), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}


@torch.no_grad()
def _logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    floating = {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    output = model(**floating)
    found: Tensor = output["logits"] if "logits" in output else output[0]
    return found.double()


def compare_logits(reference: Path, other: Path, dtype: torch.dtype, *, exact: bool) -> dict[str, float]:
    """The difference between two models' logits, beside what rounding alone does to the first.

    Args:
        reference: a folder with a model.
        other: a folder with the model that is to compute the same.
        dtype: what both are loaded in; the rounding error is measured against the next wider one.
        exact: whether a difference beyond rounding is an error.

    Returns:
        max_difference and rms_difference of the logits, max_rounding and rms_rounding of the first model, rms_logits.

    Raises:
        UserError: where `exact` and the difference is beyond rounding.
    """
    model: Any = load_folder(reference, dtype=dtype)
    inputs = probe(model)
    ours = _logits(model, inputs)
    if hasattr(model, "set_experts_implementation") and getattr(model.config, "shunter", None) is None:
        model.set_experts_implementation("eager")  # torch's grouped product does not know float64
    wide = _logits(model.to(torch.float32 if dtype.itemsize < 4 else torch.float64), inputs)
    del model
    gc.collect()
    theirs = _logits(load_folder(other, dtype=dtype), inputs)
    difference, rounding = theirs - ours, ours - wide
    found = {
        "max_difference": difference.abs().max().item(),
        "rms_difference": difference.square().mean().sqrt().item(),
        "max_rounding": rounding.abs().max().item(),
        "rms_rounding": rounding.square().mean().sqrt().item(),
        "rms_logits": ours.square().mean().sqrt().item(),
    }
    # A float64 model has nothing wider; a tiny one can round to the same logits.
    floor = torch.finfo(dtype).eps * found["rms_logits"]
    if exact and not found["rms_difference"] <= TOLERANCE * max(found["rms_rounding"], floor):
        raise UserError(
            f"the logits differ by {found['rms_difference']:.3g} (root mean square), and rounding in {dtype} explains "
            f"{found['rms_rounding']:.3g}: the function was not kept"
        )
    return found
