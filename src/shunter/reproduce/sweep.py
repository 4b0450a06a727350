"""Sweeps of small runs: one recipe at several sizes, expert counts and routers, as a table of loss and cost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..durable import sealed
from ..recipes.facts import RECIPE as FACTS
from ..recipes.facts import FactsConfig
from ..recipes.recipe import Recipe
from ..recipes.run import account, begin, train_one
from ..recipes.text import RECIPE as TEXT
from ..recipes.text import TextConfig

__all__ = ["COUNTS", "DOMAIN_SWEEP", "FACT_SWEEP", "INSIDE", "OUTSIDE", "ROUTERS", "TEXT_SWEEP", "Sweep"]

COUNTS = (2, 4, 8, 16, 32, 64)
ROUTERS: dict[str, dict[str, Any]] = {
    "switch": {},
    "hash": {},
    "sinkhorn": {},
    "reinforce": {},
    "expert_choice": {"capacity_factor": 1.0},
}
"""Routers by name, and their options: one expert a token of each."""


@dataclass(frozen=True)
class Sweep:
    """Runs of a recipe that differ in size, router and expert count alone.

    Args:
        recipe: what is learned.
        sizes: the widths d of the models; the dense block and each expert are 4 d wide.
        configure: from a width and the `sparse` section to a configuration.
        embeddings: how many parameters of a dense model of a width are embeddings, which laws do not count.
        name: of the folder.
        more_dense: widths of further dense models, and how many times as long they train: smaller and larger ones,
            between which the losses of sparse models lie.
    """

    name: str
    recipe: Recipe[Any, Any]
    sizes: tuple[int, ...]
    configure: Callable[[int, dict[str, Any]], Any]
    embeddings: Callable[[int], int]
    more_dense: tuple[tuple[int, int], ...] = ()

    def run(
        self,
        folder: Path,
        routers: tuple[str, ...],
        sizes: tuple[int, ...] | None = None,
        counts: tuple[int, ...] = COUNTS,
    ) -> Iterator[dict[str, Any]]:
        """Train what is missing; a model that is there is not trained again.

        Args:
            folder: of all sweeps; a run for each size is in `folder / name`.
            routers: of `ROUTERS`.
            sizes: of `sizes`; None for all.
            counts: of experts.

        Yields:
            A row for each model when it is done: router ("dense" for the dense one), size, parameters (of the dense
            model, without embeddings), experts, loss, and what `ModelSummary` has.

        Raises:
            Interrupted: after Ctrl-C, when the checkpoint is written.
        """
        for size in sizes or self.sizes:
            names = {"dense": ("dense", 1)} | {f"{router}-{e}": (router, e) for e in counts for router in routers}
            yield from self._models(self.place(folder, size), size, names)

    def run_more_dense(self, folder: Path) -> Iterator[dict[str, Any]]:
        """Train the models of `more_dense` in the same way; rows as those of `run`, with how many times as `longer`."""
        for size, longer in self.more_dense:
            for row in self._models(self.place(folder, size, longer), size, {"dense": ("dense", 1)}, longer):
                yield row | {"longer": longer}

    def _models(
        self, run: Path, size: int, names: dict[str, tuple[str, int]], longer: int = 1
    ) -> Iterator[dict[str, Any]]:
        first = self._config(size, "switch", 2, longer)
        configs = {name: first if e == 1 else self._config(size, router, e) for name, (router, e) in names.items()}
        with begin(self.recipe, first, run, configs, resume=sealed(run), as_json=False) as begun:
            parameters = 0.0
            for name, (router, count) in names.items():
                found = account(begun, name, train_one(begun, name))
                parameters = parameters or found.params_total - self.embeddings(size)
                print(f"d={size} {name}: {found.eval_loss:.4f}", file=sys.stderr)
                row = {"router": router, "size": size, "parameters": parameters, "experts": count}
                yield row | {"loss": found.eval_loss} | found.as_json()

    def place(self, folder: Path, size: int, longer: int = 1) -> Path:
        """The run of a size, and of so many times the steps."""
        return folder / self.name / (f"d{size}" if longer == 1 else f"d{size}-{longer}-times-longer")

    def _config(self, size: int, router: str, count: int, longer: int = 1) -> Any:
        config = self.configure(
            size,
            {
                "router": router,
                "num_experts": count,
                "hidden": 4 * size,
                "options": ROUTERS[router],
                "allow_leak": True,  # a fact has no later tokens; routers that leak are left out of text
            },
        )
        if longer == 1:
            return config
        steps = longer * config.training.steps
        every = {"steps": steps, "save_every": steps, "eval_every": steps}
        return config.model_copy(update={"training": config.training.model_copy(update=every)})


def _facts(size: int, sparse: dict[str, Any]) -> FactsConfig:
    return FactsConfig.model_validate(
        {
            "name": f"d{size}",
            "data": {"keys": 32768},
            "model": {"dim": size, "hidden": 4 * size},
            "training": {"steps": 1000, "save_every": 1000, "eval_every": 1000, "threads": 1},
            "sparse": sparse,
        }
    )


def _text(size: int, sparse: dict[str, Any]) -> TextConfig:
    steps = 250
    return TextConfig.model_validate(
        {
            "name": f"d{size}",
            "data": {"vocab_size": _VOCABULARY, "eval_windows": 32},
            "model": {"dim": size, "layers": 2, "heads": 2, "hidden": 4 * size},
            "training": {
                "steps": steps,
                "warmup": 40,
                "learning_rate": 1e-2,
                "save_every": steps,
                "eval_every": steps,
                "threads": 1,
            },
            "sparse": sparse,
        }
    )


def _text_of_domains(size: int, sparse: dict[str, Any]) -> TextConfig:
    config = _text(size, sparse)
    return config.model_copy(update={"data": config.data.model_copy(update={"domains": list(INSIDE)})})


_VOCABULARY = 1024
INSIDE, OUTSIDE = ("english", "languages"), "code"
"""Domains of the built-in text: those that `DOMAIN_SWEEP` reads, and one that it does not."""
FACT_SWEEP = Sweep(
    "facts", FACTS, (8, 12, 16, 24, 32), _facts, lambda size: 0, ((48, 1), (64, 1), (96, 1), (128, 1), (128, 2))
)
TEXT_SWEEP = Sweep("text", TEXT, (16, 24, 32, 48, 64), _text, lambda size: _VOCABULARY * size)
DOMAIN_SWEEP = Sweep(
    "text-domains", TEXT, (16, 24, 32, 64), _text_of_domains, lambda size: _VOCABULARY * size,
    ((8, 1), (32, 2), (32, 4), (64, 4)),
)  # fmt: skip
