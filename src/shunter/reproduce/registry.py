"""What of the review is reproduced, in the order of its sections, and how."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from ..durable import make_folder, writing
from ..errors import UserError
from .results import Result

__all__ = ["ALL", "Reproduction", "find", "reproduce"]


@dataclass(frozen=True)
class Reproduction:
    """A figure, a table or a group of numbers.

    Args:
        name: on the command line, and of its files.
        title: for people.
        section: of the review.
        source: what is reproduced.
        about: what is done, a sentence or two.
        minutes: that it takes on two CPU cores, roughly.
        run: "module:function" of this room, which takes the folder of training runs where `trains` is set.
        draw: "module:function", from the data of the result to a figure; None without a picture.
        trains: whether it trains models, or reads what others trained.
    """

    name: str
    title: str
    section: str
    source: str
    about: str
    minutes: float = 0.1
    run: str = field(kw_only=True)
    draw: str | None = None
    trains: bool = False


def _function(where: str) -> Callable[..., Any]:
    module, _, name = where.partition(":")
    function: Callable[..., Any] = getattr(import_module(f".{module}", __package__), name)
    return function


ALL = (
    Reproduction(
        "figure-1",
        "Figure 1: dense and sparse blocks",
        "2 Sparse expert models",
        "figure 1",
        "Two tokens pass a dense feed-forward block, and a sparse one of four experts with a Switch router.",
        run="routings:figure_1",
        draw="routing_figures:draw_figure_1",
    ),
    Reproduction(
        "figure-2",
        "Figure 2: top-k routing",
        "2 Sparse expert models",
        "figure 2, equations 1 and 2",
        "Three tokens choose among five experts; what the layer did is compared with the equations, written out.",
        run="routings:figure_2",
        draw="routing_figures:draw_figure_2",
    ),
    Reproduction(
        "figure-3",
        "Figure 3: loss against experts",
        "3 Scaling",
        "figure 3",
        "Five routers with 2 to 64 experts at three sizes of a language model, and the dense model of each.",
        minutes=15,
        run="figures_3_to_5:figure_3",
        draw="scaling_figures:draw_figure_3",
        trains=True,
    ),
    Reproduction(
        "figure-3-facts",
        "Figure 3 on facts: loss against experts",
        "3 Scaling",
        "figure 3",
        "Five routers with 2 to 64 experts at three sizes, and the dense model of each, on a task of knowledge alone.",
        minutes=20,
        run="figures_3_to_5:facts_figure_3",
        draw="scaling_figures:draw_figure_3",
        trains=True,
    ),
    Reproduction(
        "released-law",
        "The unified law on its paper's runs",
        "3 Scaling",
        "section 3.1, Clark et al. 2022",
        "The released runs of the paper, fitted by `shunter law fit`.",
        minutes=0.5,
        run="scaling:released_law",
        draw="scaling_figures:draw_released_law",
    ),
    Reproduction(
        "scaling-law",
        "The unified law on our own runs of facts",
        "3 Scaling",
        "section 3.1, Clark et al. 2022",
        "Five sizes, six expert counts and two routers, and the law through them.",
        minutes=15,
        run="scaling:law",
        draw="scaling_figures:draw_law",
        trains=True,
    ),
    Reproduction(
        "scaling-law-text",
        "The unified law on our own runs of text",
        "3 Scaling",
        "section 3.1, Clark et al. 2022",
        "Five sizes, six expert counts and two routers, and the law through them.",
        minutes=40,
        run="scaling:text_law",
        draw="scaling_figures:draw_law",
        trains=True,
    ),
    Reproduction(
        "domains",
        "In the domain of training and out of it",
        "3 Scaling",
        "section 3.1, Artetxe et al. 2021",
        "Dense compute of the same loss, by interpolation between dense runs, in the domain of training and out of it.",
        minutes=15,
        run="scaling:domains",
        draw="scaling_figures:draw_domains",
        trains=True,
    ),
    Reproduction(
        "domains-text",
        "In the domain of training and out of it, on text",
        "3 Scaling",
        "section 3.1, Artetxe et al. 2021",
        "The same on text: two domains that are read in training, and a third.",
        minutes=6,
        run="scaling:text_domains",
        draw="scaling_figures:draw_domains",
        trains=True,
    ),
    Reproduction(
        "figure-4",
        "Figure 4: quality by scale",
        "3 Scaling",
        "figure 4",
        "How many next tokens dense and sparse language models of five sizes guess.",
        minutes=5,
        run="figures_3_to_5:figure_4",
        draw="scaling_figures:draw_figure_4",
        trains=True,
    ),
    Reproduction(
        "figure-4-facts",
        "Figure 4 on facts: quality by scale",
        "3 Scaling",
        "figure 4",
        "How many facts dense and sparse models of five sizes recall.",
        minutes=15,
        run="figures_3_to_5:facts_figure_4",
        draw="scaling_figures:draw_figure_4",
        trains=True,
    ),
    Reproduction(
        "figure-5",
        "Figure 5: calibration by scale",
        "3 Scaling",
        "figure 5",
        "The calibration error of the same language models.",
        minutes=5,
        run="figures_3_to_5:figure_5",
        draw="scaling_figures:draw_figure_5",
        trains=True,
    ),
    Reproduction(
        "figure-5-facts",
        "Figure 5 on facts: calibration by scale",
        "3 Scaling",
        "figure 5",
        "The calibration error of the models of facts.",
        minutes=15,
        run="figures_3_to_5:facts_figure_5",
        draw="scaling_figures:draw_figure_5",
        trains=True,
    ),
    Reproduction(
        "simulator",
        "The simulator, and what was published",
        "3 Scaling",
        "section 3.3, footnote 2",
        "The simulator of distributed systems that the review asks for: exchanges in closed form, and published times.",
        run="planning:simulator",
    ),
    Reproduction(
        "figure-6",
        "Figure 6: three ways to decide",
        "4 Routing",
        "figure 6",
        "One matrix of scores, decided along experts, along tokens, and for all at once.",
        run="routings:figure_6",
        draw="routing_figures:draw_figure_6",
    ),
    Reproduction(
        "figure-7",
        "Figure 7: six algorithms",
        "4 Routing",
        "figure 7",
        "The tokens “The” and “Dog” as random vectors, and what six routers with the same weights do with them.",
        run="routings:figure_7",
        draw="routing_figures:draw_figure_7",
    ),
    Reproduction(
        "table-1",
        "Table 1: inputs of sparse models",
        "5 Domains",
        "table 1",
        "A short run of the recipe of each kind of input: what comes to a sparse layer, and what its experts take.",
        minutes=6,
        run="table_1:table_1",
        trains=True,
    ),
    Reproduction(
        "section-6",
        "Sparse or dense",
        "6 When to use sparse and dense models",
        "section 6",
        "What the review says of it, as consequences of `shunter advise`.",
        minutes=0.2,
        run="planning:section_6",
    ),
    Reproduction(
        "expert-gate",
        "Expert Gate: tasks in turn",
        "5 Domains",
        "section 5.2, Aljundi et al. 2017",
        "Five tasks of two handwritten digits each, learned in turn.",
        run="digits:expert_gate",
    ),
    Reproduction(
        "modular-networks",
        "Modules that are chosen by EM",
        "5 Domains",
        "section 5.2, Kirsch et al. 2018",
        "Handwritten digits through one of six modules each.",
        minutes=0.5,
        run="digits:modular",
    ),
    Reproduction(
        "expert-transfer",
        "Which expert to transfer",
        "5 Domains",
        "section 7.2, Puigcerver et al. 2020",
        "Experts on slices of the digits, picked for new tasks by their nearest neighbours and by trying all.",
        minutes=0.3,
        run="digits:transfer",
    ),
    Reproduction(
        "growing",
        "Experts that split when data arrive",
        "5 Domains",
        "section 5.2, Caccia et al. 2021",
        "Domains of text come one after the other, and an expert of each layer splits for each.",
        minutes=2,
        run="one_run:growing",
        draw="one_run:draw_growing",
    ),
    Reproduction(
        "residual",
        "Experts as residuals of a dense core",
        "5 Domains",
        "section 5.2, Wu et al. 2022",
        "A dense model, one with experts from the beginning, and a dense one that gets residual experts at the end.",
        minutes=2,
        run="one_run:residual",
    ),
    Reproduction(
        "dense-then-sparse",
        "Dense first, then experts, in one run",
        "5 Domains",
        "section 4.1, Dua et al. 2021 and Nie et al. 2021",
        "A dense model, one with experts from the beginning, and two that get them halfway, on the same batches.",
        minutes=2,
        run="one_run:dense_then_sparse",
        draw="one_run:draw_dense_then_sparse",
    ),
    Reproduction(
        "other-layers",
        "LSTMs, mixers, SparseFF and sparse QKV",
        "5 Domains",
        "sections 2.2, 5.1",
        "Experts between LSTM layers under hierarchical gating, experts in an encoder that mixes by Fourier "
        "transforms, feed-forward blocks of which one unit in sixteen is left, and sparse projections to queries, keys "
        "and values, each beside the same model without.",
        minutes=2,
        run="other_layers:other_layers",
        draw="other_layers:draw_other_layers",
    ),
    Reproduction(
        "guards",
        "Updates that are left out or undone",
        "7 Training",
        "section 7.1, Du et al. 2022",
        "A training with planted trouble, as it comes, with updates skipped, and with rewinding too.",
        minutes=2,
        run="one_run:guards",
        draw="one_run:draw_guards",
    ),
    Reproduction(
        "table-2",
        "Table 2: preceding tokens of BASE experts",
        "8 Interpretability",
        "table 2",
        "The tokens that come most before those which each expert takes.",
        minutes=4,
        run="tables:table_2",
        trains=True,
    ),
    Reproduction(
        "table-3",
        "Table 3: what encoder experts take",
        "8 Interpretability",
        "table 3",
        "Tokens by kind and expert, with their lift against shuffled tokens.",
        minutes=4,
        run="tables:table_3",
        trains=True,
    ),
    Reproduction(
        "figure-8",
        "Figure 8: patches by expert",
        "8 Interpretability",
        "figure 8",
        "Image patches that each expert of a vision model takes.",
        minutes=2,
        run="patches:figure_8",
        draw="patches:draw_figure_8",
        trains=True,
    ),
    Reproduction(
        "early-exit",
        "Tokens that leave early",
        "9 Future directions",
        "section 9, Schuster et al. 2022",
        "Texts continued by a decoder whose tokens leave at the layer where they are sure, by threshold.",
        minutes=1,
        run="other_layers:early",
        draw="other_layers:draw_early_exit",
    ),
    Reproduction(
        "memorisation",
        "Memorisation against experts",
        "9 Future directions",
        "section 9, Carlini et al. 2019",
        "Facts planted in training: how far they stand out, and how many the model gives away.",
        minutes=5,
        run="memorisation:memorisation",
        draw="memorisation:draw_memorisation",
        trains=True,
    ),
    Reproduction(
        "asynchronous",
        "Training without locks",
        "9 Future directions",
        "section 9, Recht et al. 2011",
        "Gradients that are several updates old, and processes that share parameters without locks.",
        minutes=5,
        run="asynchronous:asynchronous",
        draw="asynchronous:draw_asynchronous",
    ),
    Reproduction(
        "retrieval",
        "Retrieval against experts",
        "9 Future directions",
        "section 9, Khandelwal et al. 2020",
        "A language model with a store of its own states, and experts, at equal bytes and at equal computing.",
        minutes=10,
        run="retrieval:retrieval",
        draw="retrieval:draw_retrieval",
        trains=True,
    ),
    Reproduction(
        "headline",
        "Headline numbers",
        "Numbers that the review quotes",
        "sections 2 to 7",
        "Each with what became of it here.",
        minutes=15,
        run="headline:headline",
        trains=True,
    ),
)


def find(name: str) -> Reproduction:
    """The reproduction of a name.

    Raises:
        UserError: for an unknown name.
    """
    for one in ALL:
        if one.name == name:
            return one
    near = difflib.get_close_matches(name, [one.name for one in ALL] + ["all"], n=1)
    hint = f"did you mean {near[0]}?" if near else "shunter reproduce lists what there is"
    raise UserError(f"{name}: no such figure, table or number; {hint}")


def reproduce(one: Reproduction, out: Path, runs: Path) -> Result:
    """Run a reproduction and leave NAME.png and NAME.json.

    Args:
        one: which.
        out: the folder of results.
        runs: of training runs, where what was trained before is found again.

    Raises:
        UserError: where something that it needs is missing.
        Interrupted: after Ctrl-C; the same command goes on.
    """
    from ..analysis.pages.style import PAPER, style

    make_folder(out)
    start = time.monotonic()
    function = _function(one.run)
    result: Result = function(runs) if one.trains else function()
    result = replace(result, seconds=result.seconds or time.monotonic() - start)
    if one.draw:
        with style(PAPER), writing(out / f"{one.name}.png") as part:
            _function(one.draw)(result.data).savefig(part, format="png", metadata={"Software": None})
    result.save(out)  # last: what has a result is not run again
    return result
