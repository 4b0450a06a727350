"""Folders of sparse models to transformers' Auto classes, and so to its pipelines and what is built on them.

`AutoConfig` knows the model_type of sparse models and gives the configuration of the dense form. The Auto class builds
the dense form from it, without memory; a quantizer, which in transformers is what may exchange modules before weights
are read, puts the sparse layers in. Nothing of it stays on the model.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config_file import MODEL_TYPE, as_dense, introduce, write_as_sparse
from .formats import complete
from .loading import align

__all__ = ["register"]


class SparseConfig(PreTrainedConfig):
    """The config.json of a sparse model to the configuration of its dense form, which names the sparse layers."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration; with return_unused_kwargs also the keywords that it does not know.

        Raises:
            ValueError: where the dense form is of a kind that transformers does not know.
        """
        values = as_dense(config_dict)
        kind = values.get("model_type")
        introduce(kind)
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING or kind == MODEL_TYPE:
            raise ValueError(f"a sparse model whose dense form is {kind!r}, which transformers does not know")
        coded = values.get("shunter_quantised")
        values["quantization_config"] = {"quant_method": MODEL_TYPE, "layers": values.get("shunter"), "coded": coded}
        found = CONFIG_MAPPING[kind].from_dict(values, **kwargs)
        write_as_sparse(found[0] if isinstance(found, tuple) else found)
        return found


class _Layers(QuantizationConfigMixin):
    """The sparse layers on their way from a configuration to the model that is being loaded."""

    def __init__(self, quant_method: Any, layers: Any, coded: Any = None) -> None:
        self.quant_method, self.layers, self.coded = quant_method, layers, coded


class _PutsLayersIn(HfQuantizer):
    """Exchanges dense blocks for sparse layers before the weights are read."""

    def preprocess_model(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> None:
        """Put the layers in."""
        layers: Any = self.quantization_config
        complete(model, layers.layers, layers.coded, str(model.config.name_or_path))

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Leave no mark of a quantizer."""
        del model.hf_quantizer, model.config.quantization_config
        align(model)

    def is_serializable(self) -> bool:
        """Saving is the model's own."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Training is as of any model."""
        return True


def register() -> None:
    """Let transformers' Auto classes load sparse models."""
    AutoConfig.register(MODEL_TYPE, SparseConfig, exist_ok=True)
    AUTO_QUANTIZATION_CONFIG_MAPPING[MODEL_TYPE] = _Layers
    AUTO_QUANTIZER_MAPPING[MODEL_TYPE] = _PutsLayersIn
