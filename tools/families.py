"""Which families of transformers run on Shunter's experts: found by introspection, printed as docs/families.md.

python tools/families.py > docs/families.md
"""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig, logging

from shunter.hf.backend import how

MODELS = Path(transformers.__file__).parent / "models"
DECORATOR = "@use_experts_implementation"

# Sizes under every name that a configuration gives them.
TINY = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 5),
    **dict.fromkeys(("hidden_size", "moe_hidden_size", "moe_latent_size"), 64),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 40),
}


class TinyConfig:
    """A family's own default configuration but for the sizes."""

    def __init__(self, config: PreTrainedConfig, experts_implementation: str) -> None:
        self._config, self._experts_implementation = config, experts_implementation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of no family: what copying asks for
            raise AttributeError(name)
        return TINY[name] if name in TINY else getattr(self._config, name)


@cache
def experts_classes() -> dict[str, list[type[nn.Module]]]:
    """family -> its experts classes that wear transformers' decorator, in the installed version."""
    found: dict[str, list[type[nn.Module]]] = {}
    for source in sorted(MODELS.glob("*/modeling_*.py")):
        if DECORATOR not in source.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(f"transformers.models.{source.parent.name}.{source.stem}")
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
        decorated = [c for c in own if "_apply_gate" in vars(c) and hasattr(c.forward, "__wrapped__")]
        found.setdefault(source.parent.name, []).extend(decorated)
    return found


def build(experts: type[nn.Module], experts_implementation: str = "eager") -> nn.Module:
    """A tiny module of an experts class, with the activation and the constants of its family's own defaults."""
    module = experts.__module__.replace(".modeling_", ".configuration_")
    read = set(re.findall(r"config\.(\w+)", inspect.getsource(inspect.unwrap(experts.__init__))))
    for config in vars(importlib.import_module(module)).values():
        if isinstance(config, type) and issubclass(config, PreTrainedConfig) and config.__module__ == module:
            default = config()
            if all(_has(default, name) for name in read):
                return experts(TinyConfig(default, experts_implementation))
    raise LookupError(f"no configuration in {module} has {', '.join(sorted(read))}, which {experts.__name__} reads")


def _has(config: PreTrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except RuntimeError:  # it differs from layer to layer
        return True


def table() -> str:
    """The page."""
    rows = []
    for family, classes in experts_classes().items():
        for experts in classes:
            rows.append(f"| {family} | `{experts.__name__}` | {_weights(build(experts))} | {how(build(experts))} |")
    return PAGE.format(version=transformers.__version__, families=len(experts_classes()), rows="\n".join(rows))


def _weights(experts: nn.Module) -> str:
    rows = "2f" if experts.has_gate else "f"
    words = [f"(E, d, {rows}), (E, f, d)" if experts.is_transposed else f"(E, {rows}, d), (E, d, f)"]
    words += ["interleaved"] if not experts.is_concatenated else []
    words += ["bias"] if experts.has_bias else []
    words += ["norm behind each expert"] if experts.has_post_expert_norm else []
    return ", ".join(words)


PAGE = """\
# Hugging Face's mixtures of experts

After `import shunter.hf`, `experts_implementation="shunter"` runs the experts of every family below on Shunter's
backends. This page is the output of `python tools/families.py` with transformers {version}: {families} families, found
by introspection. `tests/hf/test_backend.py` compares each class with the definition in float64, output and every
gradient, in float32 and bfloat16, and allows 1.5 times the error of transformers' own loop.

*Backends* means that the activation is one that Shunter's backends compute, forward and backward. *Its own code between
products* means that what the module does between and behind its two products (a clamped or scaled gate, interleaved
weights, a norm) runs as the module has it, under autograd, on the rows sorted by expert.

| family | class | weights | under "shunter" |
|---|---|---|---|
{rows}

`shunter.hf.use_experts(model)` does the same to a model that is loaded, and runs Llama 4 too, which transformers leaves
out: there it computes only the tokens that chose an expert, not every token by every expert.
`tests/properties/test_whole_models.py` compares a whole tiny model around every class above, and around Llama 4's, with
transformers' own loop: the output and every gradient, in float32 and in float64 (Inkling 2 cannot run in that), and the
tokens that the families with a plain text configuration generate.

Not handled, because transformers does not let their experts be exchanged: dbrx, doge, jetmoe, longcat_flash, nllb_moe,
step3p7, switch_transformers and vitpose_backbone. They run as transformers has them.
"""


if __name__ == "__main__":
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    print(table(), end="")
