"""The config.json of a sparse model: named so that nothing loads the folder as the dense model that it was made of.

In transformers a sparse model keeps the class and the configuration of its dense form, which names the sparse layers.
Whoever writes that configuration writes a model_type of its own: what does not know it refuses the folder. The dense
classes themselves do not look at that; they are told that the weights are elsewhere, in words. Within the configuration
of a whole whose one part is sparse, a part has no model_type that anybody looks at; there its dtype is such words.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import UserError

__all__ = [
    "MARKS",
    "MODEL_TYPE",
    "as_dense",
    "building_dense",
    "forget_layers",
    "introduce",
    "name_layers",
    "write_as_sparse",
]

MODEL_TYPE = "shunter"

# What a configuration has of sparse layers, and of quantised experts.
MARKS = ("shunter", "shunter_quantised")
_OWN = {"shunter_recogniser": "shunter.hf.recogniser"}  # models that transformers has not, by model_type
_DENSE = "shunter_dense"
_WEIGHTS = "transformers_weights"
_REFUSAL = "none, as the feed-forward blocks are Shunter's sparse experts; import shunter.hf and load by an Auto class"
_PART_REFUSAL = (
    "none, as the feed-forward blocks of this part are Shunter's sparse experts; sparsify the part of the dense model "
    "again, and load the state dict; what shunter.sparsify(whole, …, within=part) makes loads by its name"
)


def introduce(model_type: Any) -> None:
    """Let transformers know the configuration of a model that is Shunter's own, if this is one."""
    if isinstance(model_type, str) and model_type in _OWN:
        import_module(_OWN[model_type])


def name_layers(config: Any, layers: Any) -> None:
    """Let a configuration, in place, name the sparse layers of its model, and so be written as that of a sparse one."""
    config.shunter = layers
    write_as_sparse(config)


def write_as_sparse(config: Any) -> None:
    """Let a configuration, in place, be written as that of a model whose experts are Shunter's."""
    config.__class__ = _sparse(config.__class__)


def forget_layers(config: Any) -> None:
    """Let a configuration, in place, be that of the dense model which the sparse one was made of."""
    for mark in (*MARKS, "quantization_config"):
        vars(config).pop(mark, None)
    config.__class__ = getattr(config.__class__, "_shunter_dense", config.__class__)


@contextmanager
def building_dense(config: Any) -> Iterator[None]:
    """Within the block, a model of a configuration is its dense form, to which whoever builds it gives the layers."""
    kind = config.__class__
    config.__class__ = getattr(kind, "_shunter_dense", kind)
    try:
        yield
    finally:
        config.__class__ = kind


@cache
def _sparse(kind: type[PreTrainedConfig]) -> Any:
    """The class of configurations that is another's, by name too, except in how it is written."""
    if hasattr(kind, "_shunter_dense"):
        return kind

    class Sparse(kind):  # type: ignore[misc, valid-type]
        _shunter_dense = kind

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "_attn_implementation_internal" and sys._getframe(1).f_code is PreTrainedModel.__init__.__code__:
                _say_dense(self, sys._getframe(1).f_locals["self"])

        def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
            values = _as_sparse(json.loads(self.to_json_string(use_diff)))
            text = json.dumps(values, indent=2, sort_keys=True) + "\n"
            Path(json_file_path).write_text(text, encoding="utf-8")

        def to_dict(self) -> dict[str, Any]:
            values: dict[str, Any] = super().to_dict()
            if any(values.get(mark) is not None for mark in MARKS) and _written() not in (None, self):
                warnings.warn(
                    f"save_pretrained: a whole whose {kind.__name__.removesuffix('Config')} part alone is sparse: "
                    f"nothing loads the folder by its names: {_PART_REFUSAL.partition('; ')[2]}",
                    stacklevel=2,
                )
                values["dtype"] = _PART_REFUSAL
            return values

        def __reduce__(self) -> tuple[Any, ...]:
            return _restored, (kind, vars(self))

    Sparse.__name__, Sparse.__qualname__, Sparse.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Sparse


_BUILDERS = tuple(inspect.unwrap(f).__code__ for f in (PreTrainedModel._from_config, PreTrainedModel.from_pretrained))


def _say_dense(config: Any, model: PreTrainedModel) -> None:
    """Say that a class of transformers builds the dense form of a sparse model, where nobody gives it the layers.

    Transformers builds it too where it loads a sparse model, and has then put its quantizer's settings in.

    Raises:
        UserError: where the configuration is of a folder, an Auto class builds, or weights would be loaded into it.

    Warns:
        UserWarning: where a class itself builds, as from a configuration that `sparsify` has marked since.
    """
    settings = getattr(config, "quantization_config", None)
    if isinstance(settings, QuantizationConfigMixin) or all(getattr(config, mark, None) is None for mark in MARKS):
        return
    words = (
        f"{type(model).__name__}: the configuration is of a sparse model, and this is its dense form; load the sparse "
        "one by from_pretrained (of shunter, or of an Auto class), or make the dense one of a configuration of its own"
    )
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code not in _BUILDERS:
        frame = frame.f_back
    if frame.f_back is not None or settings is not None:
        raise UserError(words)
    warnings.warn(words, stacklevel=4)


def _restored(kind: Any, state: dict[str, Any]) -> Any:
    config = kind.__new__(_sparse(kind))
    vars(config).update(state)
    return config


def _written() -> Any:
    """The configuration that is being written to a file; None where none is."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code is not PreTrainedConfig.to_json_file.__code__:
        frame = frame.f_back
    return frame.f_locals["self"] if frame.f_back is not None else None


def _as_sparse(values: dict[str, Any]) -> dict[str, Any]:
    """The contents of a config.json, as transformers has it, with the model_type of sparse models and the refusal."""
    kept = {name: value for name, value in values.items() if name != "quantization_config"}
    return kept | {_DENSE: values["model_type"], "model_type": MODEL_TYPE, _WEIGHTS: _REFUSAL}


def as_dense(values: dict[str, Any]) -> dict[str, Any]:
    """The contents of a config.json with the model_type of the dense form, and without the refusal."""
    kept = {name: value for name, value in values.items() if (name, value) != (_WEIGHTS, _REFUSAL)}
    if kept.get("model_type") == MODEL_TYPE:
        kept["model_type"] = kept.pop(_DENSE, None)
    return kept
