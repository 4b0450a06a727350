"""Shunter's own format of sparse models, whose config.json names each layer; and all formats, by name."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import UserError
from ...experts.weights import STACKED
from ..config_file import MARKS, building_dense
from ..quantising import put_coded
from ..sparsifying import make_layers, sparsify
from .folders import model_class, on_meta
from .layouts import PROJECTIONS, SPLIT, Form, Sizes, layers_of, split_pieces, stacked_pieces
from .native import FAMILIES, Family, make_dense
from .reading import Checkpoint

__all__ = ["OWN", "Format", "complete", "find", "made_here", "make_sparse", "sparse_class", "split_layers"]


class Own:
    """Shunter's format: a dense model whose config.json says which of its blocks are sparse, and how."""

    name = "shunter"

    def read(self, checkpoint: Checkpoint, config: PreTrainedConfig) -> tuple[PreTrainedModel, Form]:
        """The model of a folder, its modules without memory; and how it lies there, its experts stacked or split.

        Raises:
            UserError: where Shunter did not make it, or its configuration describes none.
        """
        model = on_meta(sparse_class(config, str(checkpoint.folder)), config, checkpoint.folder)
        split, _ = split_layers(model, checkpoint)
        lie = split_pieces if split else stacked_pieces
        pieces = {path: lie(path, Sizes.of(layer)) for path, layer in layers_of(model).items()}
        return model, Form(self.name, SPLIT if split else STACKED, config, pieces)

    def write(self, model: PreTrainedModel) -> Form:
        """How a sparse model would lie in a folder; every one can."""
        pieces = {path: stacked_pieces(path, Sizes.of(layer)) for path, layer in layers_of(model).items()}
        model.config.architectures = [type(model).__name__]
        return Form(self.name, STACKED, model.config, pieces)


OWN = Own()
Format = Own | Family
"""Each reads a folder as a model in Shunter's form and pieces, and writes one: between any two stands that form."""


def find(name: str, verb: str) -> Format | None:
    """The format of a name that a user gave to a verb; None for "auto".

    Raises:
        UserError: for an unknown name.
    """
    formats: dict[str, Format | None] = {"auto": None, OWN.name: OWN, **FAMILIES}
    if name not in formats:
        raise UserError(f"{verb}: to={name!r} is unknown; choose from {', '.join(formats)}")
    return formats[name]


def made_here(config: PreTrainedConfig) -> bool:
    """Whether a configuration is of a model that `sparsify` or `quantize` made."""
    return any(getattr(config, name, None) is not None for name in MARKS)


def complete(model: PreTrainedModel, spec: Any, coded: Any, path: str) -> None:
    """Give a model of transformers the sparse layers and the quantised experts that a configuration names, in place.

    Args:
        model: its modules, without memory.
        spec, coded: `config.shunter` and `config.shunter_quantised`; a quantised model may have experts of its own.
        path: for the messages.

    Raises:
        UserError: as `make_sparse` and `put_coded`.
    """
    if spec is not None or coded is None:
        make_sparse(model, spec, path)
    if coded is not None:
        put_coded(model, coded, path)


def make_sparse(model: PreTrainedModel, spec: Any, path: str) -> None:
    """Give a dense model the sparse layers that a configuration names, in place; nothing is drawn.

    Args:
        model: its modules, without memory.
        spec: names each layer, or, as Shunter did at first, says with which arguments of `sparsify` all were made.
        path: for the messages.

    Raises:
        UserError: where Shunter did not make the model, or stored it in a layout that is unknown here.
    """
    if not isinstance(spec, dict):
        raise UserError(f"{path} is not a model that shunter.sparsify made; load it with transformers")
    layout = spec.get("layout", STACKED)
    if layout != STACKED:
        raise UserError(f"{path} stores its experts as {layout!r}; this version of Shunter reads {STACKED!r}")
    given = {name: value for name, value in spec.items() if name != "layout"}
    make_dense(model)
    if "num_experts" in given:
        sparsify(model, **given)
    else:
        make_layers(model, **given)
    # Whatever dtype the model is loaded in, routers decide in float32 and keep their state exact.
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), "router"}


def sparse_class(config: PreTrainedConfig, path: str) -> Any:
    """The class of transformers that a configuration names, with the sparse layers that it names.

    Args:
        config: of a sparse model.
        path: for the messages.

    Raises:
        UserError: as `make_sparse`.
    """
    base = model_class(config, path)

    def __init__(self: PreTrainedModel, config: Any, *args: Any, **options: Any) -> None:
        with building_dense(config):
            base.__init__(self, config, *args, **options)
        complete(self, getattr(config, "shunter", None), getattr(config, "shunter_quantised", None), path)
        self.__class__ = base  # which can be pickled

    return type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__})


def split_layers(model: PreTrainedModel, checkpoint: Checkpoint) -> tuple[set[str], set[str]]:
    """Where each expert's projections lie by themselves on disk, as transformers saves models of some families.

    Returns:
        The names on disk of those projections, and the names in the model of the stacks that they make up.

    Raises:
        UserError: where one is missing or has a wrong shape.
    """
    on_disk: set[str] = set()
    stacked: set[str] = set()
    for path, layer in layers_of(model).items():
        prefix = f"{path}.experts."
        if f"{prefix}gate_up_proj" in checkpoint.tensors or f"{prefix}0.gate_proj.weight" not in checkpoint.tensors:
            continue
        for (part, _), piece in split_pieces(path, Sizes.of(layer)).items():
            if part in PROJECTIONS:
                checkpoint.must_hold(piece.name, piece.shape)
                on_disk.add(piece.name)
        stacked |= {f"{prefix}gate_up_proj", f"{prefix}down_proj"}
    return on_disk, stacked
