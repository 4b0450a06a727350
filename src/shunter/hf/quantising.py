"""`quantize`: the experts of a model, Shunter's layers or a family of transformers, to codes of 8 or 4 bits, in place.

A quantised model is for inference. Its config.json names the layers and their bits; on disk it is named as sparse
models are, so that transformers without Shunter refuses the folder rather than draw the experts anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from ..errors import UserError
from ..experts import Experts, QuantisedExperts, Weights
from ..experts.quantised import check_bits
from ..moe import plain_experts
from ..routing import Routing
from .backend import acted, attach_coded, layout_of, routed
from .config_file import write_as_sparse
from .sparsifying import save_sparse

__all__ = ["describe", "put_coded", "quantize"]

# An expert that fewer tokens chose is calibrated with tokens of its whole layer besides.
_FEW = 16

# So many tokens of a layer stand for all.
_SAMPLE = 256


@torch.no_grad()
def quantize(
    model: nn.Module,
    bits: int | Mapping[str, int | Sequence[int]] = 4,
    *,
    group: int = 32,
    zero_point: bool = False,
    calibrate: Iterable[Any] | None = None,
) -> dict[str, Any]:
    """Replace the matrices of a model's experts by codes of 8 or 4 bits, in place.

    Routers, biases and everything outside of the experts stay as they are. `save_pretrained` works, and transformers'
    Auto classes load what it wrote after `import shunter.hf`, to the same bits; without it they refuse the folder. A
    backward through the experts raises UserError.

    Args:
        model: with layers of Shunter's, or experts of a family in docs/families.md.
        bits: 8 (a scale for each row of a matrix) or 4 (one for each group of a row) for all experts; or by the path of
            an experts module one number, or one for each of its experts; modules that are not named stay as they are.
        group: in 4 bits, how many neighbours of a row share a scale: 32 or 64.
        zero_point: in 4 bits, whether each group has a zero of its own.
        calibrate: batches, each a mapping of the model's keyword arguments or one tensor for its first: codes then lose
            least where the columns of a matrix meet large inputs. An expert that fewer than 16 tokens chose is
            calibrated with up to 256 tokens of its layer besides.

    Returns:
        For JSON: `quantised_share` of the model's numbers, `bytes_before` and `bytes_after` of the whole model, and
        `layers` by path, each with `bits`, `bytes_before`, `bytes_after`, the relative `error` of the matrices, and
        after calibration `tokens` of each expert, and the `few`, experts with fewer than 16 of their own.

    Raises:
        UserError: where there are no such experts, or they are quantised already, offloaded or sharded; for impossible
            bits and groups, paths that are no experts, weights that are not finite, and no batch to calibrate with.
    """
    if any(isinstance(module, QuantisedExperts) for module in model.modules()):
        raise UserError(f"quantize: the experts of this {type(model).__name__} are quantised already")
    found = _experts(model)
    chosen = _bits_by_module(found, bits, group)
    for name in chosen:
        for value in found[name].parameters():
            if value.is_meta or is_traceable_wrapper_subclass(value):
                raise UserError(f"quantize: the weights of {name} are offloaded or sharded; quantize the whole model")
    numbers, before = _size(model)
    seen = None if calibrate is None else _observe(model, {name: found[name] for name in chosen}, calibrate)
    layers: dict[str, Any] = {}
    coded: dict[str, QuantisedExperts] = {}
    done = 0
    for name, each in chosen.items():
        weights = _weights(found[name])
        importance = (None, None) if seen is None else seen[name].importance(found[name], weights)
        try:
            coded[name] = QuantisedExperts.of(weights, each, group, zero_point, importance, _backend(found[name]))
        except UserError as error:
            raise UserError(f"{error} ({name})") from None
        entry: dict[str, Any] = {"bits": list(each), "error": _error(weights, coded[name])}
        entry["bytes_before"] = weights.up.nbytes + weights.down.nbytes
        entry["bytes_after"] = coded[name].nbytes
        done += weights.up.numel() + weights.down.numel()
        if seen is not None:
            entry["tokens"] = seen[name].count.tolist()
            entry["few"] = [e for e, count in enumerate(entry["tokens"]) if count < _FEW]
        layers[name] = entry
    for name, experts in coded.items():
        _put(model, name, found[name], experts)
    if isinstance(model, PreTrainedModel):
        short = {name: _short(entry["bits"]) for name, entry in layers.items()}
        model.config.shunter_quantised = {"group": group, "zero_point": zero_point, "layers": short}
        _save_as_coded(model)
    share = done / max(numbers, 1)
    return {"quantised_share": share, "bytes_before": before, "bytes_after": _size(model)[1], "layers": layers}


def describe(report: dict[str, Any]) -> str:
    """A report of `quantize` in words."""
    layers = report["layers"]
    bits = sorted({number for entry in layers.values() for number in entry["bits"]}, reverse=True)
    mean = sum(entry["error"] for entry in layers.values()) / len(layers)
    lines = [
        f"{report['quantised_share']:.1%} of the model's numbers are in {' and '.join(map(str, bits))} bits "
        f"({len(layers)} layers of experts); {report['bytes_before'] / 1e6:,.1f} MB became "
        f"{report['bytes_after'] / 1e6:,.1f} MB. Relative error of the matrices: {mean:.4f}."
    ]
    few = {name: entry["few"] for name, entry in layers.items() if entry.get("few")}
    if few:
        name, experts = next(iter(few.items()))
        lines.append(
            f"Chosen by fewer than {_FEW} tokens of the calibration, and calibrated with others of their layers: "
            f"{sum(map(len, few.values()))} of the experts, first expert {experts[0]} of {name}."
        )
    return "\n".join(lines)


def put_coded(model: PreTrainedModel, spec: Any, path: str) -> None:
    """Give a model that is about to be loaded the quantised experts that a configuration names, in place.

    Args:
        model: its modules, without memory.
        spec: `config.shunter_quantised`.
        path: for the messages.

    Raises:
        UserError: where the configuration describes none.
    """
    try:
        layers, group, zero_point = dict(spec["layers"]), spec["group"], bool(spec["zero_point"])
        found = _experts(model)
        inner = f"{model.base_model_prefix}."
        for name, bits in layers.items():
            # A model without its head has shorter names, one with another head the same.
            here = next(n for n in (name, name.removeprefix(inner), inner + name) if n in found)
            module = found[here]
            weights = _weights(module)
            sizes = weights.num_experts, weights.dim, weights.hidden
            place: dict[str, Any] = {"device": weights.device, "dtype": weights.dtype}
            biased = weights.up_bias is not None
            coding = check_bits(bits, sizes[0], group)
            experts = QuantisedExperts(
                *sizes, weights.activation, biased, coding, group, zero_point, _backend(module), **place
            )
            _put(model, here, module, experts)
    except (AttributeError, KeyError, StopIteration, TypeError, ValueError) as error:
        said = str(error) if isinstance(error, UserError) else "it names layers that the model does not have"
        raise UserError(f"{path}: config.json does not describe quantised experts: {said}") from None
    _save_as_coded(model)


def _save_as_coded(model: PreTrainedModel) -> None:
    write_as_sparse(model.config)
    vars(model)["save_pretrained"] = partial(save_sparse, model)  # of the instance: what is copied or pickled keeps it


def _experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of experts by path; those that are a core and residuals become plain ones."""
    plain_experts(model)
    found = {n: m for n, m in model.named_modules() if isinstance(m, Experts) or layout_of(m) is not None}
    if not found:
        raise UserError(
            f"quantize: {type(model).__name__} has no experts that Shunter knows; docs/families.md lists the families"
        )
    return found


def _bits_by_module(
    found: Mapping[str, nn.Module], bits: int | Mapping[str, int | Sequence[int]], group: int
) -> dict[str, tuple[int, ...]]:
    given = bits if isinstance(bits, Mapping) else dict.fromkeys(found, bits)
    if not given:
        raise UserError("quantize: bits names no module of experts; give a number, or bits by path")
    for name in given:
        if name not in found:
            raise UserError(
                f"quantize: {name!r} is no module of experts; the first of {len(found)} is {next(iter(found))!r}"
            )
    return {name: check_bits(each, _weights(found[name]).num_experts, group) for name, each in given.items()}


def _short(bits: list[int]) -> int | list[int]:
    return bits[0] if len(set(bits)) == 1 else bits


def _weights(module: nn.Module) -> Weights:
    if isinstance(module, Experts):
        return module.weights
    found = layout_of(module)
    assert found is not None
    return found


def _backend(module: nn.Module) -> str:
    # One that was chosen for stacked weights may not know codes.
    return module.backend if isinstance(module, Experts) and module.backend in ("reference", "decode") else "auto"


def _put(model: nn.Module, name: str, module: nn.Module, experts: QuantisedExperts) -> None:
    if isinstance(module, Experts):
        around, _, last = name.rpartition(".")
        setattr(model.get_submodule(around), last, experts.train(module.training))
    else:
        attach_coded(module, experts)


def _size(model: nn.Module) -> tuple[int, int]:
    """How many numbers the parameters are, and the bytes of parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(p.numel() for p in model.parameters()), sum(t.nbytes for t in tensors)


def _error(weights: Weights, experts: QuantisedExperts) -> float:
    """The Frobenius norm of what was lost over that of the matrices."""
    lost = total = 0.0
    decoded = experts.weights(torch.float32)
    for e in range(weights.num_experts):
        for now, then in zip(decoded.expert(e)[:2], weights.expert(e)[:2], strict=True):
            lost += float((now - then.float()).double().square().sum())
            total += float(then.double().square().sum())
    return (lost / total) ** 0.5 if total else 0.0


class _Seen:
    """What the experts of a module multiplied in calibration: sums of squares by column, and a sample of the tokens."""

    def __init__(self, weights: Weights) -> None:
        experts, device = weights.num_experts, weights.device
        self.up = torch.zeros(experts, weights.dim, dtype=torch.float32, device=device)
        self.down = torch.zeros(experts, weights.hidden, dtype=torch.float32, device=device)
        self.count = torch.zeros(experts, dtype=torch.int64)
        self.sample = torch.zeros(0, weights.dim, dtype=torch.float32, device=device)

    def add(self, module: nn.Module, weights: Weights, x: Tensor, routing: Routing) -> None:
        self.sample = torch.cat([self.sample, x[: _SAMPLE - self.sample.shape[0]].float()])
        bounds = routing.offsets.tolist()
        for e, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if start < end:
                self._add(module, weights, e, x[routing.token[start:end]])
        self.count += routing.counts.cpu()

    def _add(self, module: nn.Module, weights: Weights, e: int, rows: Tensor) -> None:
        up, _, up_bias, _ = weights.expert(e)
        a = acted(module, weights, nn.functional.linear(rows.to(up.dtype), up, up_bias))
        self.up[e] += rows.float().square().sum(0)
        self.down[e] += a.float().square().sum(0)

    def importance(self, module: nn.Module, weights: Weights) -> tuple[Tensor, Tensor]:
        """Of the columns of up (E, d) and down (E, f); that of an expert with few tokens with its layer's besides."""
        for e in (self.count < _FEW).nonzero().flatten().tolist():
            if self.sample.shape[0]:
                self._add(module, weights, e, self.sample)
        return self.up.nan_to_num(0, 0, 0), self.down.nan_to_num(0, 0, 0)


def _observe(model: nn.Module, modules: Mapping[str, nn.Module], batches: Iterable[Any]) -> dict[str, _Seen]:
    """What each module multiplies in forwards of the batches, in evaluation."""
    seen = {name: _Seen(_weights(module)) for name, module in modules.items()}

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, routing = args if isinstance(module, Experts) else routed(module, *args, **kwargs)
        seen[name].add(module, _weights(module), x, routing)

    handles = [
        module.register_forward_pre_hook(partial(hook, name), with_kwargs=True) for name, module in modules.items()
    ]
    training = {module: module.training for module in model.modules()}
    model.eval()
    count = 0
    try:
        for batch in batches:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
            count += 1
    finally:
        for handle in handles:
            handle.remove()
        for module, was in training.items():
            module.training = was
    if not count:
        raise UserError("quantize: calibrate has no batch; leave it out, or give the model's inputs")
    return seen
