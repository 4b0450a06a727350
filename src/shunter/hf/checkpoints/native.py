"""How sparse layers lie in a folder: in Shunter's own format, and in the families that transformers itself loads.

A layout names where each piece of a layer is: the router, and of each expert the gate, up and down projections. Pieces
are found by these names alone, never by shapes, so that square matrices cannot be mistaken for their transposes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING

from ...routers import Router
from ..rules import routing_fields
from .layouts import Key, Piece, Sizes, _whole

__all__ = ["FAMILIES", "Family", "carry", "family_for"]


@dataclass(frozen=True)
class Family:
    """Sparse models that transformers has: which dense models they continue, how they store layers, how they route.

    Args:
        name: its model_type.
        architecture: its class for causal language models.
        dense: the model_type of the dense models whose attention, norms and embeddings are the same, best first; a
            family without a dense one has itself here, and `sparse_only` is set.
        block: what a sparse block is called in a folder.
        names: the projections of one expert in a folder: gate, up, down.
        experts_field: the configuration's E.
        width_field: the configuration's f.
        sparse_fields: further fields that speak of experts.
        extra_fields: fields that its configuration does not declare but its layers read.
        optional_norm: whether it can leave the top-k weights as they are (norm_topk_prob), or always normalises.
        sigmoid: whether it routes as DeepSeek-V3: sigmoid scores, a bias for the selection, shared experts.
        float32_router: whether it computes the router's logits in float32 whatever its weights are.
        sparse_only: no dense model of transformers has its attention and norms.
    """

    name: str
    architecture: str
    dense: tuple[str, ...]
    block: str = "mlp"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    experts_field: str = "num_experts"
    width_field: str = "intermediate_size"
    sparse_fields: frozenset[str] = frozenset()
    extra_fields: frozenset[str] = frozenset()
    optional_norm: bool = True
    sigmoid: bool = False
    float32_router: bool = False
    sparse_only: bool = False

    @property
    def layout(self) -> str:
        """The tag of its layout."""
        gate, up, down = self.names
        return f"{self.block}.experts.{{e}}: {gate}.weight (f, d), {up}.weight (f, d), {down}.weight (d, f)"

    def path(self, layer: int) -> str:
        """Where a sparse layer is in a folder."""
        return f"model.layers.{layer}.{self.block}"

    def pieces(self, layer: int, sizes: Sizes) -> dict[Key, Piece]:
        """Where each piece of a sparse layer is in a folder."""
        path = self.path(layer)
        found = {("router", 0): _whole(f"{path}.gate.weight", sizes.experts, sizes.dim)}
        if sizes.selection_bias:
            found["selection_bias", 0] = _whole(f"{path}.gate.e_score_correction_bias", sizes.experts)
        shapes = [(sizes.hidden, sizes.dim), (sizes.hidden, sizes.dim), (sizes.dim, sizes.hidden)]
        for e in range(sizes.experts):
            for part, name, shape in zip(("gate", "up", "down"), self.names, shapes, strict=True):
                found[part, e] = _whole(f"{path}.experts.{e}.{name}.weight", *shape)
        for part, rows, columns in (
            [("gate", sizes.shared, sizes.dim), ("up", sizes.shared, sizes.dim), ("down", sizes.dim, sizes.shared)]
            if self.sigmoid
            else []
        ):
            found[f"shared_{part}", 0] = _whole(f"{path}.shared_experts.{part}_proj.weight", rows, columns)
        return found

    def sparse_layers(self, config: PreTrainedConfig) -> list[int]:
        """Which layers of a sparse model have experts."""
        layers = range(config.num_hidden_layers)
        if self.name == "qwen3_moe":
            step, dense = config.decoder_sparse_step, config.mlp_only_layers
            return [i for i in layers if i not in dense and (i + 1) % step == 0]
        if self.name == "deepseek_v3":
            return [i for i in layers if i >= config.first_k_dense_replace]
        return list(layers)

    def sizes(self, config: PreTrainedConfig) -> Sizes:
        """The sizes of a sparse model's layers."""
        hidden = getattr(config, self.width_field)
        shared = hidden * config.n_shared_experts if self.sigmoid else 0
        experts = getattr(config, self.experts_field)
        return Sizes(experts, config.hidden_size, hidden, shared=shared, selection_bias=self.sigmoid)

    def sparse_config(
        self,
        dense: PreTrainedConfig,
        experts: int,
        hidden: int,
        layers: list[int],
        router: Router,
        shared: int = 0,
    ) -> PreTrainedConfig:
        """The configuration of the sparse model.

        Args:
            dense: the configuration of the dense model.
            experts: E.
            hidden: f.
            layers: which layers are sparse.
            router: of the layers.
            shared: how many shared experts of width f.

        Raises:
            ValueError: where the family has no field for what the dense configuration or the router says.
        """
        values = {
            self.experts_field: experts,
            self.width_field: hidden,
            **routing_fields(self, router),
        }
        if self.sigmoid:
            values["n_shared_experts"] = shared
        elif shared:
            raise ValueError(
                f"{self.name} has no shared experts; the layers have {shared}: train with num_shared_experts=0"
            )
        every_layer = list(range(dense.num_hidden_layers))
        if self.name == "qwen3_moe":
            values |= {"decoder_sparse_step": 1, "mlp_only_layers": [i for i in every_layer if i not in layers]}
        elif self.name == "deepseek_v3":
            first = len(every_layer) - len(layers)
            if layers != every_layer[first:]:
                raise ValueError(f"{self.name} can only keep its first layers dense, not layer {layers[0] + 1}")
            values["first_k_dense_replace"] = first
        elif layers != every_layer:
            raise ValueError(f"{self.name} has experts in every layer; it cannot keep some dense")
        return carry(dense, self.name, self.extra_fields, values, self.sparse_fields)

    def dense_config(self, sparse: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration of the dense model that a sparse one continues, all of whose layers are dense.

        Raises:
            ValueError: where the dense model has no field for what the sparse configuration says.
        """
        values = {"first_k_dense_replace": sparse.num_hidden_layers} if self.sigmoid else {}
        if "head_dim" in self.extra_fields and getattr(sparse, "head_dim", None) is None:
            values["head_dim"] = sparse.hidden_size // sparse.num_attention_heads
        known = getattr(sparse, "shunter_dense", None)
        candidates = [known] if known in self.dense else list(self.dense)
        for last, model_type in enumerate(candidates, 1 - len(candidates)):
            try:
                return carry(sparse, model_type, self.extra_fields, values, self.sparse_fields)
            except ValueError:
                if not last:
                    raise
        raise AssertionError


_SPARSE = frozenset(
    {"num_experts", "num_local_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef"}
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "mixtral",
            "MixtralForCausalLM",
            ("mistral", "llama"),
            block="block_sparse_moe",
            names=("w1", "w3", "w2"),
            experts_field="num_local_experts",
            sparse_fields=_SPARSE | {"router_jitter_noise"},
            optional_norm=False,
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            ("qwen3",),
            width_field="moe_intermediate_size",
            experts_field="num_experts",
            sparse_fields=_SPARSE
            | {"moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"},
            extra_fields=frozenset({"head_dim"}),
        ),
        Family(
            "flex_olmo",
            "FlexOlmoForCausalLM",
            ("olmo2",),
            sparse_fields=_SPARSE | {"norm_topk_prob"},
            extra_fields=frozenset({"head_dim"}),
        ),
        Family(
            "olmoe",
            "OlmoeForCausalLM",
            ("olmoe",),
            sparse_fields=_SPARSE | {"norm_topk_prob"},
            sparse_only=True,
        ),
        Family(
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            ("deepseek_v3",),
            experts_field="n_routed_experts",
            width_field="moe_intermediate_size",
            sparse_fields=_SPARSE
            | {
                "n_routed_experts",
                "moe_intermediate_size",
                "n_shared_experts",
                "norm_topk_prob",
                "n_group",
                "topk_group",
                "routed_scaling_factor",
                "first_k_dense_replace",
            },
            sigmoid=True,
            float32_router=True,
        ),
    )
}


def family_for(config: PreTrainedConfig, architecture: str) -> Family:
    """The native family that continues a dense model.

    Raises:
        ValueError: saying why there is none.
    """
    # Only sparsify makes a model without experts of a family that has no dense one.
    made_here = getattr(config, "shunter", None) is not None
    known = [f for f in FAMILIES.values() if config.model_type in f.dense and (made_here or not f.sparse_only)]
    family = next(iter(known), None)
    if family is None:
        raise ValueError(
            f"no sparse family of transformers has the attention and norms of {config.model_type!r}; there is one for "
            + ", ".join(f"{dense} ({f.name})" for f in FAMILIES.values() for dense in f.dense if not f.sparse_only)
        )
    if not architecture.endswith("ForCausalLM"):
        raise ValueError(f"{architecture} is not a causal language model, as {family.architecture} is")
    return family


_FREE = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "model_type", "use_cache"}


def carry(
    config: PreTrainedConfig,
    model_type: str,
    extra: frozenset[str],
    values: dict[str, Any],
    without: frozenset[str],
) -> PreTrainedConfig:
    """A configuration of another model_type with every field that both have, and the given values.

    Args:
        config: what is carried over.
        model_type: of the result.
        extra: fields of the result that its class does not declare.
        values: fields that are set.
        without: fields that are not carried over.

    Raises:
        ValueError: where the other has no field for something that is not as by default.
    """
    target = CONFIG_MAPPING[model_type]
    known = set(AutoConfig.for_model(model_type).to_dict()) | extra
    default = type(config)().to_dict()
    given = {name: value for name, value in config.to_dict().items() if name not in without | _FREE}
    if given.get("use_sliding_window"):
        raise ValueError(f"{config.model_type} and {model_type} give sliding windows to different layers")
    lost = [name for name in given if name not in known and name in default and _matters(name, given, default)]
    if lost:
        raise ValueError(f"{model_type} has no field for " + ", ".join(f"{name}={given[name]!r}" for name in lost))
    kept = {name: value for name, value in given.items() if name in known and name not in values}
    return target(**kept, **values)


def _matters(name: str, given: dict[str, Any], default: dict[str, Any]) -> bool:
    """Whether a field changes what the model computes: it is not as by default, and not about windows left unused."""
    if name == "layer_types":
        return not set(given[name] or ()) <= {"full_attention"}
    return name not in ("max_window_layers", "pretraining_tp") and bool(given[name] != default[name])
