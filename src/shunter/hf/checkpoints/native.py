"""The sparse families of transformers as formats: how each stores its layers, which layers it has, its fields."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...errors import UserError
from ...experts.weights import STACKED
from ..blocks import known_activation
from ..rules import balance_here, left_behind, router_of, routing_fields
from ..sparsifying import sparsify
from .folders import model_class, on_meta
from .layouts import Form, Key, Piece, Sizes, layers_of, must_be_blocks, projections, stack, whole
from .reading import Checkpoint

__all__ = ["FAMILIES", "Family", "family_for", "make_dense"]

_SPARSE = frozenset(
    {"num_experts", "num_local_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef"}
)


class Family:
    """A sparse family of transformers: which dense models it continues, and how it stores layers.

    Attributes:
        name: its model_type.
        dense: the model_types of the dense models whose attention, norms and embeddings are the same, best first.
        sparse_only: whether no dense model of transformers has its attention and norms; `dense` is then itself.
        block: what a sparse block is called in a folder.
        names: the projections of one expert in a folder: gate, up, down.
        experts_field, width_field, shared_field: the configuration's E, f and number of shared experts (None: it has
            none).
        sparse_fields: the fields that speak of experts.
        extra_fields: fields that its configuration does not declare but its layers read.
        float32_router: whether it computes the router's logits in float32 whatever its weights are.
    """

    name: ClassVar[str]
    dense: ClassVar[tuple[str, ...]]
    sparse_only: ClassVar[bool] = False
    block: ClassVar[str] = "mlp"
    names: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    experts_field: ClassVar[str] = "num_experts"
    width_field: ClassVar[str] = "intermediate_size"
    shared_field: ClassVar[str | None] = None
    sparse_fields: ClassVar[frozenset[str]] = _SPARSE | {"norm_topk_prob"}
    extra_fields: ClassVar[frozenset[str]] = frozenset()
    float32_router: ClassVar[bool] = False

    @property
    def architecture(self) -> str:
        """Its class for causal language models."""
        return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.name]

    @property
    def layout(self) -> str:
        """The tag of its layout."""
        gate, up, down = self.names
        return f"{self.block}.experts.{{e}}: {gate}.weight (f, d), {up}.weight (f, d), {down}.weight (d, f)"

    def pieces(self, layer: int, sizes: Sizes) -> dict[Key, Piece]:
        """Where each piece of a sparse layer is in a folder; shared experts of width 0 are tensors of no elements."""
        path = f"model.layers.{layer}.{self.block}"
        found = {("router", 0): whole(f"{path}.gate.weight", sizes.experts, sizes.dim)}
        if sizes.selection_bias:
            found["selection_bias", 0] = whole(f"{path}.gate.e_score_correction_bias", sizes.experts)
        found |= projections([f"{path}.experts.{e}" for e in range(sizes.experts)], self.names, sizes.hidden, sizes.dim)
        if self.shared_field:
            shared = projections([f"{path}.shared_experts"], Family.names, sizes.shared, sizes.dim)
            found |= {(f"shared_{part}", e): piece for (part, e), piece in shared.items()}
        return found

    def stacked_pieces(self, layer: int, sizes: Sizes) -> dict[Key, Piece]:
        """The same where the experts lie as the model has them in memory (save_original_format=False)."""
        path, there = f"model.layers.{layer}.mlp", f"model.layers.{layer}.{self.block}"
        experts = stack(f"{path}.experts", "", sizes.experts, sizes.hidden, sizes)
        rest = {key: piece for key, piece in self.pieces(layer, sizes).items() if key not in experts}
        return experts | {key: replace(p, name=p.name.replace(there, path, 1)) for key, p in rest.items()}

    def new_router(self, top_k: int, layers: int) -> dict[str, Any]:
        """Options of the router topk of a new model: a token's weights sum to 1, the balance loss is the family's."""
        return {
            "load_balancing_loss": balance_here(AutoConfig.for_model(self.name).router_aux_loss_coef, top_k, layers)
        }

    def read(self, checkpoint: Checkpoint, config: PreTrainedConfig) -> tuple[PreTrainedModel, Form]:
        """The sparse model of a folder, its modules in Shunter's form, without memory; and how it lies there.

        Raises:
            UserError: where a layer or a field of the family has no counterpart there.
        """
        folder, numbers = checkpoint.folder, self._sparse_layers(config)
        if not numbers:
            raise UserError(f"export: {folder}: config.json leaves no layer with experts")
        try:
            router, options = router_of(config, len(numbers))
            dense = self.dense_config(config)
            dense.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[dense.model_type]]
            model = on_meta(model_class(dense, str(folder)), dense, folder)
            make_dense(model)
            with torch.device("meta"):  # nothing is drawn
                sparsify(
                    model,
                    getattr(config, self.experts_field),
                    router,
                    layers=numbers,
                    hidden=getattr(config, self.width_field),
                    num_shared_experts=getattr(config, self.shared_field) if self.shared_field else 0,
                    **options,
                )
        except (ValueError, TypeError) as error:
            raise UserError(f"export: {folder} cannot be brought into Shunter's format: {error}") from None
        model.config.dtype = config.dtype
        stacked = f"model.layers.{numbers[0]}.mlp.experts.gate_up_proj" in checkpoint.tensors
        return model, self._form(model, config, numbers, stacked=stacked)

    def write(self, model: PreTrainedModel) -> Form:
        """How a sparse model, in Shunter's form, would lie in a folder.

        Raises:
            UserError: where the family has no field for what the layers or the dense configuration say.
        """
        must_be_blocks(model)
        layers, dense = layers_of(model), model.config
        fields, *rules = [routing_fields(self.name, layer.decider, len(layers)) for layer in layers.values()]
        sizes, *others = dict.fromkeys(Sizes.of(layer) for layer in layers.values())
        if any(each.bias for each in (sizes, *others)):
            raise UserError(f"{self.name} has experts without biases; this model's have them: keep Shunter's format")
        if others:
            raise UserError(f"{self.name} has layers of one size; give every layer the same hidden=")
        if any(rule != fields for rule in rules):
            raise UserError(f"{self.name} has one routing rule for all layers; give every layer the same router")
        activation = known_activation(dense.hidden_act, gated=True)
        if {layer.experts.activation for layer in layers.values()} != {activation}:
            raise UserError(f"{self.name} has the activation of config.json, {activation}; give every layer that one")
        shared = sizes.shared // sizes.hidden
        if self.shared_field:
            fields[self.shared_field] = shared
        elif shared:
            raise UserError(
                f"{self.name} has no shared experts; the layers have {shared}: train with num_shared_experts=0"
            )
        numbers = [int(path.split(".")[-2]) for path in layers]
        fields |= {self.experts_field: sizes.experts, self.width_field: sizes.hidden}
        fields |= self._layer_fields(numbers, dense.num_hidden_layers)
        config = _carry(dense, self.name, self.extra_fields, fields, self.sparse_fields)
        config.architectures = [self.architecture]
        config.dtype = dense.dtype
        config.shunter_dense = dense.model_type
        dropped = ((layer.dropout.p, layer.experts.dropout, layer.decider.options) for layer in layers.values())
        given = [{**options, "dropout": p, "expert_dropout": inside} for p, inside, options in dropped]
        lost = dict.fromkeys(option for options in given for option in left_behind(self.name, options))
        return self._form(model, config, numbers, lost=tuple(lost))

    def make_dense(self, model: PreTrainedModel) -> None:
        """Give a model of the family's own class dense blocks, where it has experts in spite of its configuration."""

    def _form(
        self,
        model: PreTrainedModel,
        config: PreTrainedConfig,
        numbers: Sequence[int],
        *,
        stacked: bool = False,
        lost: tuple[str, ...] = (),
    ) -> Form:
        lie = self.stacked_pieces if stacked else self.pieces
        layers = zip(numbers, layers_of(model).items(), strict=True)
        pieces = {path: lie(number, Sizes.of(layer)) for number, (path, layer) in layers}
        return Form(self.name, STACKED if stacked else self.layout, config, pieces, lost)

    def _sparse_layers(self, config: PreTrainedConfig) -> list[int]:
        """Which layers of a sparse model have experts."""
        return list(range(config.num_hidden_layers))

    def _layer_fields(self, layers: Sequence[int], total: int) -> dict[str, Any]:
        """The fields that say which layers are sparse."""
        if len(layers) < total:
            raise UserError(f"{self.name} has experts in every layer; it cannot keep some dense")
        return {}

    def _dense_fields(self, sparse: PreTrainedConfig) -> dict[str, Any]:
        """The fields that the dense model needs besides those that both have."""
        if "head_dim" in self.extra_fields and getattr(sparse, "head_dim", None) is None:
            return {"head_dim": sparse.hidden_size // sparse.num_attention_heads}
        return {}

    def dense_config(self, sparse: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration of the dense model that a sparse one continues, all of whose layers are dense."""
        values = self._dense_fields(sparse)
        known = getattr(sparse, "shunter_dense", None)
        *better, last = [known] if known in self.dense else self.dense
        for model_type in better:
            with suppress(UserError):
                return _carry(sparse, model_type, self.extra_fields, values, self.sparse_fields)
        return _carry(sparse, last, self.extra_fields, values, self.sparse_fields)


class Mixtral(Family):
    """Mixtral: experts in every layer."""

    name = "mixtral"
    dense = ("mistral", "llama")
    block = "block_sparse_moe"
    names = ("w1", "w3", "w2")
    experts_field = "num_local_experts"
    sparse_fields = _SPARSE | {"router_jitter_noise"}


class Qwen3Moe(Family):
    """Qwen3-MoE: any layers may be dense."""

    name = "qwen3_moe"
    dense = ("qwen3",)
    width_field = "moe_intermediate_size"
    sparse_fields = Family.sparse_fields | {"moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers"}
    extra_fields = frozenset({"head_dim"})

    def _sparse_layers(self, config: PreTrainedConfig) -> list[int]:
        step, dense = config.decoder_sparse_step, config.mlp_only_layers
        return [i for i in range(config.num_hidden_layers) if i not in dense and (i + 1) % step == 0]

    def _layer_fields(self, layers: Sequence[int], total: int) -> dict[str, Any]:
        return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i in range(total) if i not in layers]}


class FlexOlmo(Family):
    """FlexOlmo: experts in every layer of an OLMo 2."""

    name = "flex_olmo"
    dense = ("olmo2",)
    extra_fields = frozenset({"head_dim"})


class Olmoe(Family):
    """OLMoE: its dense form is its own class with dense blocks."""

    name = "olmoe"
    dense = ("olmoe",)
    sparse_only = True

    def make_dense(self, model: PreTrainedModel) -> None:
        """Give every layer a dense block."""
        from transformers.models.olmoe.modeling_olmoe import OlmoeMLP

        for layer in model.get_decoder().layers:
            layer.mlp = OlmoeMLP(model.config)


class DeepSeekV3(Family):
    """DeepSeek-V3: sigmoid scores, a selection bias, shared experts; its first layers may be dense."""

    name = "deepseek_v3"
    dense = ("deepseek_v3",)
    experts_field = "n_routed_experts"
    width_field = "moe_intermediate_size"
    shared_field = "n_shared_experts"
    sparse_fields = Family.sparse_fields.union(
        (experts_field, width_field, shared_field),
        ("n_group", "topk_group", "routed_scaling_factor", "first_k_dense_replace"),
    )
    float32_router = True

    def new_router(self, top_k: int, layers: int) -> dict[str, Any]:
        """Options of the router topk of a new model: a token's weights sum to 1."""
        return {"score_function": "sigmoid", "selection_bias": True}

    def _sparse_layers(self, config: PreTrainedConfig) -> list[int]:
        return list(range(config.first_k_dense_replace, config.num_hidden_layers))

    def _layer_fields(self, layers: Sequence[int], total: int) -> dict[str, Any]:
        first = total - len(layers)
        if list(layers) != list(range(first, total)):
            raise UserError(f"{self.name} can only keep its first layers dense, not layer {layers[0] + 1}")
        return {"first_k_dense_replace": first}

    def _dense_fields(self, sparse: PreTrainedConfig) -> dict[str, Any]:
        return {"first_k_dense_replace": sparse.num_hidden_layers}


FAMILIES: dict[str, Family] = {
    family.name: family for family in (Mixtral(), Qwen3Moe(), FlexOlmo(), Olmoe(), DeepSeekV3())
}


def make_dense(model: PreTrainedModel) -> None:
    """Give a model whose architecture has experts in every layer dense blocks in their place, for `sparsify`."""
    if model.config.model_type in FAMILIES:
        FAMILIES[model.config.model_type].make_dense(model)


def family_for(config: PreTrainedConfig, architecture: str) -> Family:
    """The native family that continues a dense model.

    Raises:
        UserError: saying why there is none.
    """
    # Only sparsify makes a model without experts of a family that has no dense one.
    made_here = getattr(config, "shunter", None) is not None
    known = [f for f in FAMILIES.values() if config.model_type in f.dense and (made_here or not f.sparse_only)]
    family = next(iter(known), None)
    if family is None:
        raise UserError(
            f"no sparse family of transformers has the attention and norms of {config.model_type!r}; there is one for "
            + ", ".join(f"{dense} ({f.name})" for f in FAMILIES.values() for dense in f.dense if not f.sparse_only)
        )
    if not architecture.endswith("ForCausalLM"):
        raise UserError(f"{architecture} is not a causal language model, as {family.architecture} is")
    return family


_FREE = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "model_type", "use_cache"}


def _carry(
    config: PreTrainedConfig, model_type: str, extra: frozenset[str], values: dict[str, Any], without: frozenset[str]
) -> PreTrainedConfig:
    """A configuration of another model_type with the fields that both have, but those `without`, and the values.

    Fields that its class does not declare are in `extra`. An error where it has none for what is not as by default.
    """
    target = CONFIG_MAPPING[model_type]
    known = set(AutoConfig.for_model(model_type).to_dict()) | extra
    default = type(config)().to_dict()
    given = {name: value for name, value in config.to_dict().items() if name not in without | _FREE}
    if given.get("use_sliding_window"):
        raise UserError(f"{config.model_type} and {model_type} give sliding windows to different layers")
    lost = [name for name in given if name not in known and name in default and _matters(name, given, default)]
    if lost:
        raise UserError(f"{model_type} has no field for " + ", ".join(f"{name}={given[name]!r}" for name in lost))
    kept = {name: value for name, value in given.items() if name in known and name not in values}
    return target(**kept, **values)


def _matters(name: str, given: dict[str, Any], default: dict[str, Any]) -> bool:
    """Whether a field changes what the model computes: it is not as by default, and not about windows left unused."""
    if name == "layer_types":
        return not set(given[name] or ()) <= {"full_attention"}
    return name not in ("max_window_layers", "pretraining_tp") and bool(given[name] != default[name])
