"""Tables with several targets: the generator of related tasks, digits with two questions, or a user's own file."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, escaped, one_line
from ..untrusted import open_file
from .documents import json_lines

__all__ = ["SUFFIXES", "Table", "check_names", "digits", "read_frame", "read_table", "related_tasks"]

FREQUENCY = 4.0  # standard deviation of the sinusoids', which the paper leaves open
FAR = 5.0  # standard deviations
MAX_VALUES = 50  # of a column of words, each a feature
MAX_CELLS = 2**25  # of a table, and as many more as its file has bytes
LARGEST = 1e150  # in size; its square is still a float64
SUFFIXES = {".csv", ".tsv", ".parquet", ".jsonl"}


@dataclass(frozen=True)
class Table:
    """Rows of features with a target of each task, standardised by what is trained on.

    Args:
        name: of the problem.
        tasks: their names, K.
        features: (rows, D) float32, without holes; from -`FAR` to `FAR`, as columns that are rarely another value give.
        targets: (rows, K) float32, of mean 0 and variance 1 where rows are trained on; NaN where there is none.
        held_out: (rows,) bool.
        license, source: in words.
        notes: sentences on what was left out or filled in.
    """

    name: str
    tasks: list[str]
    features: Tensor
    targets: Tensor
    held_out: Tensor
    license: str
    source: str
    notes: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        """SHA-256 over all that is trained and evaluated on."""
        digest = hashlib.sha256("\0".join([self.name, *self.tasks]).encode())
        for part in (self.features, self.targets, self.held_out):
            digest.update(f"{tuple(part.shape)}".encode() + part.contiguous().numpy().tobytes())
        return digest.hexdigest()


def related_tasks(
    correlation: float,
    rows: int,
    held_out: int,
    *,
    dim: int = 100,
    sinusoids: int = 10,
    noise: float = 0.1,
    seed: int = 0,
) -> Table:
    """Two regression tasks whose weights have a given cosine, on the same features.

    y_k = w_k x + sum_i sin(a_i w_k x + b_i) + noise, with w_1 = u_1 and w_2 = p u_1 + sqrt(1 - p^2) u_2 for orthonormal
    u_1 and u_2, x normal; a_i normal (`FREQUENCY`) and b_i uniform, the same of both tasks. With p = 1 both are one
    task, but for the noise.

    Args:
        correlation: p in [0, 1], the cosine of the weights.
        rows: how many in all.
        held_out: how many of these, the last.
        dim: D.
        sinusoids: how many terms.
        noise: standard deviation.
        seed: of all that is drawn; the features, u, a and b are the same for every correlation.

    Raises:
        ValueError: for a correlation outside of [0, 1].

    Source: Ma et al. 2018 (Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts),
    section 3.2.
    """
    if not 0 <= correlation <= 1:
        raise ValueError(f"correlation {correlation} must be from 0 to 1")
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(dim, 2, generator=generator)).Q
    a = FREQUENCY * torch.randn(sinusoids, generator=generator)
    b = 2 * math.pi * torch.rand(sinusoids, generator=generator)
    x = torch.randn(rows, dim, generator=generator)
    w = torch.stack([u[:, 0], correlation * u[:, 0] + math.sqrt(1 - correlation**2) * u[:, 1]], 1)
    z = x @ w
    y = z + (a * z[..., None] + b).sin().sum(-1) + noise * torch.randn(rows, 2, generator=generator)
    out = torch.arange(rows) >= rows - held_out
    return Table(
        f"correlation {correlation:g}",
        ["first", "second"],
        x,
        _standardised(y, ~out),
        out,
        "none: drawn by Shunter",
        f"the generator of Ma et al. 2018, {dim} features",
    )


def digits(share: float) -> Table:
    """1,797 images of digits, 8 by 8, and two questions on each: is it even, is it 5 or more.

    Raises:
        UserError: where scikit-learn, which has them, is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the real table needs the package scikit-learn: pip install 'shunter[tasks]'") from None
    found: Any = load_digits()
    digit = torch.tensor(found.target)
    x = torch.tensor(found.data, dtype=torch.float32)
    y = torch.stack([digit % 2 == 0, digit >= 5], 1).float()
    out = _drawn(len(x), share)
    return Table(
        "digits",
        ["even", "5 or more"],
        _standardised(x, ~out).clamp(-FAR, FAR),
        _standardised(y, ~out),
        out,
        "CC-BY-4.0 (package: BSD-3-Clause)",
        "optical recognition of handwritten digits (UCI), pip package scikit-learn",
    )


def read_frame(file: Path, *, texts: bool = False) -> Any:
    """The rows of a .csv, .tsv, .parquet or .jsonl file as a frame of pandas, whose columns have names.

    Args:
        file: itself.
        texts: cells are texts: none of them is a number, "NA" is a word, and a .tsv file has no quotes.

    Raises:
        UserError: naming the file.
    """
    import csv

    import pandas

    shown = escaped(str(file))
    if not file.exists():
        raise UserError(f"{shown}: no such file")
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(f"{shown}: must end in {', '.join(sorted(SUFFIXES))}")
    plain: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_values": [""]} if texts else {}
    unquoted: dict[str, Any] = plain | ({"quoting": csv.QUOTE_NONE} if texts else {})

    def separated(stream: Any, **options: Any) -> Any:
        head = pandas.read_csv(stream, **options | {"header": None, "nrows": 1, "dtype": str})
        check_names(file, list(head.iloc[0].dropna()))  # pandas would call the second name.1
        stream.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            try:
                return pandas.read_csv(stream, index_col=False, **options)
            except pandas.errors.ParserWarning:
                raise UserError(f"{shown}: its records have more cells than there are columns") from None

    try:
        with open_file(file) as stream:
            readers: dict[str, Any] = {
                ".csv": lambda s: separated(s, **plain),
                ".tsv": lambda s: separated(s, sep="\t", **unquoted),
                ".parquet": lambda s: pandas.read_parquet(_of_few_cells(s, file)),
                ".jsonl": lambda _: pandas.DataFrame(_objects(file), dtype=object if texts else None),
            }
            frame = readers[file.suffix.lower()](stream)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        raise UserError(f"{shown}: cannot be read: {one_line(error)}") from None
    frame.columns = [str(name) for name in frame.columns]
    check_names(file, list(frame.columns))
    return frame


def _objects(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for row in json_lines(file):
        if not isinstance(row, dict):
            raise UserError(f"{escaped(str(file))}, record {len(rows) + 1}: must be an object, a value for each column")
        rows.append(row)
    return rows


def _of_few_cells(stream: Any, file: Path) -> Any:
    """The stream of a Parquet file, where it does not say more cells than memory may hold: equal ones take no bytes.

    Raises:
        UserError: naming the file.
    """
    import pyarrow.parquet

    facts = pyarrow.parquet.ParquetFile(stream).metadata
    cells = facts.num_columns * sum(facts.row_group(i).num_rows for i in range(facts.num_row_groups))
    most = MAX_CELLS + file.stat().st_size
    if cells > most:
        raise UserError(f"{escaped(str(file))}: has {cells:,} cells; of its size at most {most:,} are read")
    stream.seek(0)
    return stream


def check_names(file: Path, names: Sequence[str]) -> None:
    """See that the columns of a table have names of their own.

    Raises:
        UserError: naming the file and the column.
    """
    if repeated := next((name for name in names if name and names.count(name) > 1), None):
        raise UserError(
            f"{escaped(str(file))}: has {names.count(repeated)} columns {repeated!r}; give each its own name"
        )


def read_table(file: Path, targets: Sequence[str], share: float) -> Table:
    """A user's own table.

    Args:
        file: .csv, .tsv, .parquet or .jsonl, with names of its columns.
        targets: the columns that are asked for: numbers, or words of which there are two. Columns of words among the
            others become a feature for each word, at most `MAX_VALUES`. A hole among the features is filled with the
            mean, and a feature more says where; a target that is not there is not asked for.
        share: of the rows, held out.

    Raises:
        UserError: naming the file and the column.
    """
    shown, frame = escaped(str(file)), read_frame(file)
    known = ", ".join(map(escaped, frame.columns))
    if not targets:
        raise UserError(f"{shown}: say which columns are asked for, as in data.targets=[a,b]; it has {known}")
    for name in targets:
        if name not in frame.columns:
            raise UserError(f"{shown}: has no column {name!r}; it has {known}")
        if targets.count(name) > 1:
            raise UserError(f"{shown}: column {name!r} is asked for {targets.count(name)} times; name each target once")
    if len(frame) < 10:
        raise UserError(f"{shown}: has {len(frame)} rows; at least 10 are needed")
    out = _drawn(len(frame), share)
    y = torch.stack([_target(shown, name, frame[name]) for name in targets], 1)
    for name, column in zip(targets, y.unbind(1), strict=True):
        for part, rows in (("to train on", ~out), ("held out", out)):
            if len(column[rows & ~column.isnan()].unique()) < 2:
                raise UserError(f"{shown}: column {name!r} has not two values among the rows {part}; ask for another")
    features, notes = _features(shown, frame.drop(columns=list(targets)), ~out)
    if missing := int(y.isnan().sum()):
        first = int(y.isnan().any(1).nonzero()[0]) + 1
        notes.append(f"{missing:,} targets are missing and not asked for, the first in record {first}.")
    return Table(
        escaped(file.stem), list(targets), features, _standardised(y, ~out), out, "the user's own", shown, notes
    )


def _numbers(column: Any) -> Any:
    """The numbers of a column, dates among them; NaN where there is none."""
    import pandas

    return pandas.to_numeric(column, errors="coerce").mask(column.isna())  # of a missing date it makes one


def _target(file: str, name: str, column: Any) -> Tensor:
    numbers = _numbers(column)
    words = sorted(column[numbers.isna() & column.notna()].astype(str).unique())
    if words:
        values = sorted(column.dropna().astype(str).unique())
        if len(values) != 2:
            numeric = numbers.notna().sum() > len(column) / 2  # then what is a word is the stranger
            strange = numbers.isna() & column.notna()
            if not numeric and len(values) > 2:
                strange = ~column.isna() & ~column.astype(str).isin(list(column.dropna().astype(str).unique()[:2]))
            record = int(strange.to_numpy().argmax()) + 1
            raise UserError(
                f"{file}, record {record}: column {name!r} is {str(column.iloc[record - 1])[:80]!r}, and targets are "
                f"numbers, or words of which there are two; it has {len(values):,}"
            )
        numbers = (column.astype(str) == values[1]).astype(float).mask(column.isna())
    found = torch.tensor(numbers.to_numpy(dtype="float64", na_value=math.nan))
    if bool((large := found.abs() > LARGEST).any()):
        first = int(large.nonzero()[0])
        raise UserError(
            f"{file}, record {first + 1}: column {name!r} is {float(found[first]):g}, and targets are at most "
            f"{LARGEST:g} in size"
        )
    return found


def _features(file: str, frame: Any, train: Tensor) -> tuple[Tensor, list[str]]:
    columns: list[Tensor] = []
    left_out: list[str] = []
    holes = too_large = 0
    for name in frame.columns:
        column = frame[name]
        numbers = _numbers(column)
        if bool((numbers.isna() & column.notna()).any()):
            values = sorted(column.dropna().astype(str).unique())
            if len(values) > MAX_VALUES:
                left_out.append(escaped(name))
                continue
            columns += [torch.tensor((column.astype(str) == value).to_numpy(dtype="float64")) for value in values]
            continue
        found = torch.tensor(numbers.to_numpy(dtype="float64", na_value=math.nan))
        too_large += int((found.abs() > LARGEST).sum())
        found[found.abs() > LARGEST] = math.nan
        gone = found.isnan()
        if bool(gone.all()):
            left_out.append(escaped(name))
            continue
        if bool(gone.any()):
            holes += int(gone.sum())
            columns.append(gone.double())
        columns.append(found)
    if not columns:
        raise UserError(f"{file}: has no column beside the targets that can be read")
    larger = f" (of them {too_large:,} numbers above {LARGEST:g} in size)" if too_large else ""
    notes = [f"{holes:,} holes among the features{larger} are filled with the mean."] if holes else []
    if left_out:
        notes.append(f"Left out the columns {', '.join(left_out)}: no numbers, or more than {MAX_VALUES} words.")
    return _standardised(torch.stack(columns, 1), train).nan_to_num(0.0).clamp(-FAR, FAR), notes


def _drawn(rows: int, share: float) -> Tensor:
    """Which rows are held out (rows,) bool: so large a share, in a fixed random order, one at least."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(rows, dtype=torch.bool)
    out[order[: max(2, round(share * rows))]] = True
    return out


def _standardised(values: Tensor, train: Tensor) -> Tensor:
    """Values (rows, n) with mean 0 and variance 1 over the rows to train on; a column that has one value there is 0."""
    known = values[train].double()
    mean = known.nanmean(0)
    spread = (known - mean).square().nanmean(0).sqrt()
    told = spread > 1e-12 * mean.abs()
    scaled = torch.where(told, (values.double() - mean) / torch.where(told, spread, 1.0), 0.0)
    return torch.where(values.isnan(), math.nan, scaled).to(torch.float32)
