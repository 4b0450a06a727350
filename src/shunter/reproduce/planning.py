"""The simulator that section 3.3 asks for, against what was published; and section 6 as consequences of the advisor."""

from __future__ import annotations

from dataclasses import replace

from ..simulate.advise import EXPERTS, LAW, Advice, Budget, advise, effective, shape
from ..simulate.clusters import load_cluster
from ..simulate.published import TOLERANCE, check
from ..simulate.shapes import load_model
from ..simulate.step import Job, Layout, predict
from ..simulate.volumes import elements, exchanges
from .results import NOT, REPRODUCED, Result, Row, judge

__all__ = ["section_6", "simulator"]

GIB = 2**30
_TOKENS, _DIM = 1024, 512
_FACTORS = (1.0, 1.25, 2.0)


def simulator() -> Result:
    """Exchanges in closed form, and published measurements next to predictions."""
    claims = [
        Row(
            "all-to-alls of a sparse layer, forward and backward (footnote 2)",
            "2 + 2; of BASE 4 + 4",
            f"{_sum(exchanges())}; of BASE {_sum(exchanges(shuffle=True))}",
            judge(exchanges() == (2, 2) and exchanges(shuffle=True) == (4, 4)),
        )
    ]
    for factor in _FACTORS:
        moved, expected = elements(_TOKENS, _DIM, 1, factor), 2 * factor * _TOKENS * _DIM
        claims.append(
            Row(
                f"numbers that both exchanges of a forward move at a capacity factor of {factor:g}",
                f"2 CF B d = {expected:,.0f} of {_TOKENS:,} tokens of {_DIM}",
                f"{moved:,.0f}",
                judge(moved == expected),
            )
        )
    rows = check()
    for row in rows:
        if not row.fitted:
            claims.append(
                Row(
                    f"{row.source}: {row.what}",
                    f"{row.measured:,.4g} {row.unit}",
                    f"{row.predicted:,.4g}, error {row.error:+.1%}",
                    REPRODUCED if row.within else NOT,
                    row.note,
                )
            )
    found = [
        {"source": row.source, "what": row.what, "measured": row.measured, "predicted": row.predicted} for row in rows
    ]
    fitted = sum(row.fitted for row in rows)
    notes = [
        f"Here “reproduced” is an error of at most {TOLERANCE:.0%}. {fitted} further figures served to fit the "
        "simulator, and are left out. Hours of DeepSeek-V3's training are from memory.",
        "Tutel states speeds as multiples of another program's, which nothing here predicts; that exchanges in two "
        "levels pay on 2048 devices and not on 16 comes out, and is tested.",
    ]
    return Result("simulator", claims, {"rows": found}, notes=notes)


def _sum(pair: tuple[int, int]) -> str:
    return f"{pair[0]} + {pair[1]}"


def section_6() -> Result:
    """When sparse and when dense, by `shunter advise`."""
    ample = advise(Budget(1e21, 80 * GIB, 64, 50e9))
    small = advise(Budget(1e21, 24 * GIB, 1, 50e9))
    claims = [_fixed_operations(ample), _one_expert(), _throughput(), _devices(ample), _parameter(ample)]
    claims += [_memory(small), _two()]
    data = {"ample": ample.best.row(), "small": small.best.row()}
    notes = [
        "Budgets: 1e21 FLOPs in all; 64 devices of 80 GiB at 50 GB/s, and one of 24 GiB. The advisor is a simulator "
        "and a scaling law: these are consequences, no measurements."
    ]
    return Result("section-6", claims, data, notes=notes)


def _fixed_operations(ample: Advice) -> Row:
    best, dense = ample.best, ample.dense
    return Row(
        "a fixed budget of operations",
        "sparse is better",
        f"{best.experts} experts at a loss of {best.loss:.3f}, dense {dense.loss:.3f}",
        judge(best.experts > 1 and best.loss < dense.loss),
    )


def _one_expert() -> Row:
    sizes = [10**power for power in (7.5, 8.5, 9.5)]
    worth = [float(LAW.effective_parameters(size, 1)) / size for size in sizes]
    cluster = load_cluster("h100")
    longer = []
    for size in sizes:
        dense, sparse = shape(size), replace(shape(size, 2, 0.5), experts=1)
        seconds = [predict(one, cluster, Layout(8), Job(2**20)).seconds for one in (sparse, dense)]
        longer.append(seconds[0] / seconds[1])
    return Row(
        "a sparse model of one expert",
        "much as a dense one",
        f"acts as {_listed(worth)} times the dense parameters at three sizes, by the law, and takes {_listed(longer)} "
        "times as long a step",
        judge(all(abs(one - 1) < 0.01 for one in worth) and max(longer) < 1.25, direction=min(worth) > 0.9),
    )


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _throughput() -> Row:
    """All experts' weights are read and tokens routed however few there are; many share what that takes."""
    model, cluster = load_model("mixtral-8x7b"), load_cluster("h100")
    dense = model.without_experts()
    batches = (64, 1024, 16384)
    ratios = []
    for batch in batches:
        sparse, plain = (
            predict(replace(one, sequence_length=min(batch, 4096)), cluster, Layout(1), Job(batch))
            for one in (model, dense)
        )
        ratios.append(sparse.tokens_per_s / plain.tokens_per_s)
    return Row(
        "high throughput: many tokens at once",
        "sparse models are good there",
        f"a step of Mixtral's shape on one H100 does {_listed(ratios)} times the tokens a second of a dense model of "
        f"equal operations, at {', '.join(f'{batch:,}' for batch in batches)} tokens a step",
        judge(ratios[0] < 0.5 < 0.8 < ratios[-1], direction=ratios[-1] > ratios[0]),
    )


def _devices(ample: Advice) -> Row:
    few, many = advise(Budget(1e21, 40 * GIB, 8, 50e9)).best, advise(Budget(1e21, 40 * GIB, 64, 50e9)).best
    return Row(
        "many accelerators",
        "sparse models are good there",
        f"{few.experts} experts on 8 devices of 40 GiB, {many.experts} on 64; on 64 of 80 GiB {ample.best.experts}",
        judge(few.experts < many.experts <= ample.best.experts),
    )


def _parameter(ample: Advice) -> Row:
    sparse = [choice.effective / choice.parameters for choice in ample.choices if choice.experts > 1]
    return Row(
        "for as many parameters",
        "sparse is always worse",
        f"a parameter is worth {min(sparse):.3f} to {max(sparse):.3f} of a dense one in {len(sparse)} sparse models",
        judge(max(sparse) < 1),
    )


def _memory(small: Advice) -> Row:
    least = min(small.choices[1:], key=lambda choice: choice.step.memory)
    return Row(
        "a fixed memory, and one device",
        "dense is better",
        f"dense at {small.dense.step.memory / GIB:.1f} GiB of 24; the least of the sparse ones takes "
        f"{least.step.memory / GIB:.1f}",
        judge(small.best.experts == 1),
    )


def _two() -> Row:
    sizes = [10**power for power in (7.5, 8.5, 9.5)]
    gains = [effective(size, 2, 0.5, 2.0) / size for size in sizes]
    most = [effective(size, EXPERTS[-1], 0.5, 2.0) / size for size in sizes]
    return Row(
        "as few as two experts",
        "they help",
        f"act as {_listed(gains)} times the dense parameters at three sizes, on as many tokens; {EXPERTS[-1]} experts "
        f"as {_listed(most)}",
        judge(all(gain > 1 for gain in gains)),
    )
