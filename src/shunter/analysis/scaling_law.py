"""Losses of trained models by parameters and experts to the unified scaling law of routed models, and what it says.

    log L = a log N + b log Ê + c log N log Ê + d,    1/Ê = 1 / (E - 1 + 1 / (1/E_start - 1/E_max)) + 1/E_max

All logarithms are to base 10. N are the parameters of the dense model that a routed one was made of, so that Ê(1) =
E_start stands for the dense model and Ê grows with E towards E_max. Clark et al. 2022, Unified Scaling Laws for Routed
Language Models, sections 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares

from ..errors import UserError

__all__ = ["COEFFICIENTS", "INSIDE", "Runs", "UnifiedLaw", "account", "bootstrap", "fit", "leave_one_out"]

COEFFICIENTS = ("a", "b", "c", "d", "e_start", "e_max")

INSIDE = 0.9
"""How much of the bootstrap an interval holds, the rest half below and half above."""

_LEAST_COUNTS = 4
"""Of different expert counts: an affine change of log Ê is undone by a, b, c and d, so two of them say nothing."""
_LEAST_SIZES = 2
_LEAST_RUNS = len(COEFFICIENTS) + 1

_LEAST_SLOPE = 1e-9  # of log loss by log parameters: a loss that does not fall leaves less, of either sign

_LOWEST = np.log([1e-2, 1.5])  # of E_start, and of E_max over it
_HIGHEST = np.log([1e4, 1e7])
_STARTS = [np.log([start, most]) for start in (1.2, 3.0, 8.0) for most in (10.0, 100.0, 1e4)]


@dataclass(frozen=True)
class Runs:
    """Finished runs: parameters of the dense model, experts and held-out loss of each, arrays of length R.

    Raises:
        UserError: for what no law can be fitted to, naming the first row (counted from 1) that is wrong.
    """

    parameters: NDArray[np.float64]
    experts: NDArray[np.float64]
    loss: NDArray[np.float64]

    def __post_init__(self) -> None:
        for name, least in (("parameters", 0.0), ("experts", 1.0), ("loss", 0.0)):
            values = getattr(self, name)
            bad = ~np.isfinite(values) | (values < least if name == "experts" else values <= least)
            if bad.any():
                row = int(bad.argmax())
                wanted = "at least 1" if name == "experts" else "above 0"
                raise UserError(f"run {row + 1}: {name} {values[row]:g} must be a number {wanted}")

    def __len__(self) -> int:
        return len(self.loss)

    def __getitem__(self, rows: ArrayLike) -> Runs:
        return Runs(*(values[np.asarray(rows)] for values in (self.parameters, self.experts, self.loss)))

    def lacks(self) -> str:
        """What a fit would need besides, in words; empty where there is enough."""
        counts, sizes = np.unique(self.experts), np.unique(self.parameters)
        if len(counts) < _LEAST_COUNTS:
            found = ", ".join(f"{count:g}" for count in counts)
            return f"at least {_LEAST_COUNTS} different expert counts (1, the dense model, among them); it has {found}"
        if len(sizes) < _LEAST_SIZES:
            found = ", ".join(f"{size:g}" for size in sizes)
            return f"at least {_LEAST_SIZES} different numbers of parameters; it has {found}"
        if len(self) < _LEAST_RUNS:
            return f"at least {_LEAST_RUNS} runs for its {len(COEFFICIENTS)} coefficients; it has {len(self)}"
        x, h = np.log10(self.parameters), np.log10(self.experts)
        if np.linalg.matrix_rank(np.stack([np.ones_like(x), x, h, x * h], axis=1)) < 4:
            return "several expert counts at several sizes: here the one follows from the other"
        return ""


@dataclass(frozen=True)
class UnifiedLaw:
    """The law with its six coefficients; `residual` is the root mean square of what it leaves of log10 L."""

    a: float
    b: float
    c: float
    d: float
    e_start: float
    e_max: float
    residual: float = math.nan

    def effective_experts(self, experts: ArrayLike) -> NDArray[np.float64]:
        """Ê of expert counts: E_start at 1, E_max in the limit."""
        return _effective(np.asarray(experts, dtype=np.float64), self.e_start, self.e_max)

    def loss(self, parameters: ArrayLike, experts: ArrayLike) -> NDArray[np.float64]:
        """The loss of models with these dense parameters and expert counts, which broadcast."""
        x, h = np.log10(parameters), np.log10(self.effective_experts(experts))
        return _power(self.a * x + self.b * h + self.c * x * h + self.d)

    def effective_parameters(self, parameters: ArrayLike, experts: ArrayLike) -> NDArray[np.float64]:
        """The effective parameter count: how large a dense model of the same loss is, by the law.

        Section 5 of the paper. At `log10_cutoff` it is the number of parameters itself, whatever the experts.
        """
        x, h = np.log10(parameters), np.log10(self.effective_experts(experts))
        start = math.log10(self.e_start)
        dense = self.a + self.c * start
        return _power(((self.a + self.c * h) * x + self.b * (h - start)) / dense)

    @property
    def log10_cutoff(self) -> float:
        """log10 of the dense parameters from which on experts no longer help, -b/c; infinite where c is not above 0.

        Then experts are worth the more, the larger the model is; whether they help at a size `helps` says.
        """
        return -self.b / self.c if self.c > 0 else math.inf

    def helps(self, parameters: float) -> bool:
        """Whether more experts lower the loss of models with these dense parameters: b + c log N is below 0."""
        return self.b + self.c * math.log10(parameters) < 0

    @property
    def edge(self) -> str:
        """What lies at the edge of what is searched, so that the coefficients mean little; empty where nothing does."""
        point = np.log([self.e_start, self.e_max / self.e_start])
        low, high = point < _LOWEST + 1e-3, point > _HIGHEST - 1e-3
        if high[1]:
            return "e_max: the runs show no end to the gain of experts"
        if low[1]:
            return "e_max, hardly above e_start: the gain of experts ends at once"
        return "e_start" if low[0] or high[0] else ""


def _power(exponent: ArrayLike) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):  # infinite is what a law far from its runs may say
        return np.asarray(10.0 ** np.asarray(exponent))


def _effective(experts: NDArray[np.float64], start: float, most: float) -> NDArray[np.float64]:
    return np.asarray(1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most))


def fit(runs: Runs, near: UnifiedLaw | None = None, *, separable: bool = False) -> UnifiedLaw:
    """The least squares fit of log10 L.

    a, b, c and d are linear given E_start and E_max, so that only these two are searched for (variable projection).

    Args:
        runs: what was trained.
        near: a law to search from, besides the usual places.
        separable: leave the product of log N and log Ê out (c = 0): experts then help alike at every size.

    Raises:
        UserError: where the runs do not determine a law, or their loss does not fall with the parameters.
    """
    if lacking := runs.lacks():
        raise UserError(f"a scaling law needs {lacking}")
    x, y = np.log10(runs.parameters), np.log10(runs.loss)

    def solved(point: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        start, ratio = np.exp(point)
        h = np.log10(_effective(runs.experts, start, start * ratio))
        columns = np.stack([x, h, np.zeros_like(x) if separable else x * h, np.ones_like(x)], axis=1)
        weights = np.linalg.lstsq(columns, y, rcond=None)[0]  # of a column of zeros it is 0
        return weights, columns @ weights - y

    def residual(point: NDArray[np.float64]) -> NDArray[np.float64]:
        return solved(point)[1]

    starts = sorted(_STARTS, key=lambda point: float(np.square(residual(point)).sum()))[:2]
    if near is not None:
        at = np.log([near.e_start, near.e_max / near.e_start])
        starts = [np.clip(at, _LOWEST + 1e-6, _HIGHEST - 1e-6), starts[0]]
    tight = 1e-14
    found = [
        least_squares(residual, point, bounds=(_LOWEST, _HIGHEST), xtol=tight, ftol=tight, gtol=tight, max_nfev=200)
        for point in starts
    ]
    best = min(found, key=lambda result: float(result.cost)).x
    (a, b, c, d), left = solved(best)
    start, ratio = np.exp(best)
    law = UnifiedLaw(*map(float, (a, b, c, d, start, start * ratio, np.sqrt(np.square(left).mean()))))
    if law.a + law.c * math.log10(law.e_start) > -_LEAST_SLOPE:
        raise UserError(
            "a scaling law needs a loss of the dense models that falls as their parameters grow; here it does not"
        )
    return law


def bootstrap(runs: Runs, law: UnifiedLaw, resamples: int = 500, seed: int = 0) -> list[UnifiedLaw]:
    """The law of as many tables of the same length, each of runs drawn with replacement.

    Draws that determine no law (`fit`) are drawn again, up to ten times as many in all.

    Raises:
        UserError: where most draws determine none.
    """
    random = np.random.default_rng(seed)
    found: list[UnifiedLaw] = []
    for _ in range(10 * resamples):
        if len(found) == resamples:
            break
        try:
            found.append(fit(runs[random.integers(len(runs), size=len(runs))], near=law))
        except UserError:
            continue
    if len(found) < resamples:
        raise UserError(
            f"{len(runs)} runs are too few for intervals: most draws of them determine no law; give --resamples 0"
        )
    return found


def leave_one_out(runs: Runs, law: UnifiedLaw) -> dict[str, UnifiedLaw]:
    """The law without each size, and without each expert count but 1, by what was left out, where enough is left."""
    found = {}
    axes: Sequence[tuple[str, NDArray[np.float64]]] = (("parameters", runs.parameters), ("experts", runs.experts))
    for name, values in axes:
        for value in np.unique(values):
            rest = runs[values != value]
            if (name, value) != ("experts", 1) and not rest.lacks():
                found[f"{name}={value:g}"] = fit(rest, near=law)
    return found


def account(runs: Runs, resamples: int = 500, seed: int = 0) -> dict[str, Any]:
    """The law of some runs, as JSON: what law.json holds for each group.

    Args:
        runs: what was trained.
        resamples: of the bootstrap; 0 for no intervals.
        seed: of its draws.

    Returns:
        "runs"; "law", the coefficients and the residual; "separable_residual", of the law with c = 0; "edge";
        "log10_cutoff", None where there is none;
        "intervals" of `INSIDE` by name, None for an end that is infinite; "effective_parameters", a row for each size
        and expert count, None where they are infinite; "left_out", the law without each size and each expert count.

    Raises:
        UserError: as `fit` and `bootstrap`.
    """
    law = fit(runs)
    named = (*COEFFICIENTS, "log10_cutoff")
    intervals = {}
    if resamples:
        draws = bootstrap(runs, law, resamples, seed)
        ends = [(1 - INSIDE) / 2, (1 + INSIDE) / 2]
        for name in named:
            values = np.array([getattr(draw, name) for draw in draws])
            low, high = np.quantile(values, ends, method="nearest")  # which knows infinity
            intervals[name] = [_finite(float(low)), _finite(float(high))]
    sizes, counts = np.unique(runs.parameters), np.unique(runs.experts)
    return {
        "runs": [
            {"parameters": n, "experts": e, "loss": loss}
            for n, e, loss in zip(runs.parameters.tolist(), runs.experts.tolist(), runs.loss.tolist(), strict=True)
        ],
        "law": asdict(law),
        "separable_residual": fit(runs, separable=True).residual,
        "edge": law.edge,
        "log10_cutoff": _finite(law.log10_cutoff),
        "resamples": resamples,
        "intervals": intervals,
        "effective_parameters": [
            {"parameters": float(n), "experts": float(e), "effective": _finite(float(law.effective_parameters(n, e)))}
            for n in sizes
            for e in counts
        ],
        "left_out": {
            what: {name: _finite(getattr(other, name)) for name in named}
            for what, other in leave_one_out(runs, law).items()
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
