"""Tables: the generator's tasks are as related as they are said to be; holes and words; what is wrong in one line."""

import math

import numpy as np
import pytest
import torch

from shunter.data.tables import FAR, digits, read_frame, read_table, related_tasks
from shunter.errors import UserError
from tests.conftest import SEED

pandas = pytest.importorskip("pandas")


@pytest.mark.parametrize("correlation", [0.0, 0.3, 1.0])
def test_the_weights_of_both_tasks_have_the_cosine(correlation):
    table = related_tasks(correlation, 4000, 1000, dim=6, sinusoids=0, noise=0.0, seed=SEED)
    solution = torch.linalg.lstsq(table.features, table.targets)
    assert float((table.features @ solution.solution - table.targets).abs().mean()) < 0.1, "linear without sinusoids"
    w = solution.solution
    cosine = float(torch.nn.functional.cosine_similarity(w[:, 0], w[:, 1], dim=0))
    assert math.isclose(cosine, correlation, abs_tol=0.02)
    assert int(table.held_out.sum()) == 1000 and bool(table.held_out[-1000:].all())


def test_one_task_is_both_where_they_are_wholly_related():
    same = related_tasks(1.0, 500, 100, dim=5, noise=0.0, seed=SEED)
    torch.testing.assert_close(same.targets[:, 0], same.targets[:, 1])
    other = related_tasks(0.0, 500, 100, dim=5, noise=0.0, seed=SEED)
    assert torch.equal(same.features, other.features)
    torch.testing.assert_close(same.targets[:, 0], other.targets[:, 0])
    known = same.targets[~same.held_out]
    assert float(known.mean()) == pytest.approx(0, abs=1e-4)
    assert float(known.var(0, correction=0)[0]) == pytest.approx(1)
    with pytest.raises(ValueError, match="correlation 1.5 must be from 0 to 1"):
        related_tasks(1.5, 10, 2)


def test_a_small_file_of_countless_cells_is_refused(tmp_path):
    """Forty million equal ones are some kilobytes of Parquet."""
    import pyarrow.parquet

    rows = pyarrow.table({"a": np.zeros(2_000_000, np.int8)})
    with pyarrow.parquet.ParquetWriter(tmp_path / "t.parquet", rows.schema) as writer:
        for _ in range(20):
            writer.write_table(rows)
    assert (tmp_path / "t.parquet").stat().st_size < 1_000_000
    with pytest.raises(UserError, match="t.parquet: has 40,000,000 cells; of its size at most 33,"):
        read_frame(tmp_path / "t.parquet")


def made(tmp_path, ending, **changes):
    draw = np.random.default_rng(SEED)
    frame = pandas.DataFrame(
        {
            "size": draw.normal(5, 3, 40),
            "colour": draw.choice(["red", "green", "blue"], 40),
            "price": draw.normal(100, 20, 40),
            "sold": draw.choice(["no", "yes"], 40),
            "text": [f"words {i}" for i in range(40)],
        }
    )
    for name, values in changes.items():
        frame[name] = values
    file = tmp_path / f"t{ending}"
    {
        ".csv": lambda: frame.to_csv(file, index=False),
        ".tsv": lambda: frame.to_csv(file, index=False, sep="\t"),
        ".parquet": lambda: frame.to_parquet(file),
        ".jsonl": lambda: frame.to_json(file, orient="records", lines=True),
    }[ending]()
    return file, frame


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet", ".jsonl"])
def test_columns_become_features_and_targets(ending, tmp_path):
    file, frame = made(tmp_path, ending)
    table = read_table(file, ["price", "sold"], 0.25)
    train = ~table.held_out
    assert int(table.held_out.sum()) == 10
    price = torch.tensor(frame["price"].to_numpy())
    expected = (price - price[train].mean()) / price[train].std(correction=0)
    torch.testing.assert_close(table.targets[:, 0].double(), expected, atol=1e-4, rtol=1e-4)
    sold = torch.tensor((frame["sold"] == "yes").to_numpy())
    assert bool((table.targets[sold, 1] > table.targets[~sold, 1].max()).all())
    size = torch.tensor(frame["size"].to_numpy())
    wanted = ((size - size[train].mean()) / size[train].std(correction=0)).clamp(-FAR, FAR)
    found = [torch.allclose(column.double(), wanted, atol=1e-3) for column in table.features.unbind(1)]
    assert any(found) and table.features.shape[1] == 1 + 3 + 40, "a feature for each word of a column of words"


@pytest.mark.parametrize(
    "offset, unit", [(1_700_000_000, 1.0), (1_700_000_000_000_000_000, 1e6), (0, 1e-30), (0, 1e40)]
)
def test_values_far_from_zero_keep_what_tells_them_apart(offset, unit, tmp_path):
    steps = np.random.default_rng(SEED).permutation(40)
    values = [offset + int(step * unit) for step in steps] if offset else [float(step * unit) for step in steps]
    file, _ = made(tmp_path, ".csv", size=values, price=values, text=["x"] * 40)
    table = read_table(file, ["price"], 0.25)
    scaled = torch.tensor(steps, dtype=torch.float64)
    known = scaled[~table.held_out]
    expected = (scaled - known.mean()) / known.std(correction=0)
    for found in (table.targets[:, 0], table.features[:, 0]):
        torch.testing.assert_close(found.double(), expected, atol=1e-2, rtol=0)


def test_holes_are_filled_and_counted(tmp_path):
    holes = [math.nan if i % 4 == 0 else float(i) for i in range(40)]
    gone = [math.nan if i in (3, 7) else float(i % 5) for i in range(40)]
    file, _ = made(tmp_path, ".csv", size=holes, price=gone, text=["x"] * 40)
    table = read_table(file, ["price"], 0.25)
    assert not bool(table.features.isnan().any()) and bool(table.features.isfinite().all())
    assert table.targets.isnan().flatten().nonzero().flatten().tolist() == [3, 7]
    assert table.notes == [
        "10 holes among the features are filled with the mean.",
        "2 targets are missing and not asked for, the first in record 4.",
    ]


def test_words_of_bytes_are_told_apart(tmp_path):
    said = [[b"no", b"yes", None][i % 3] for i in range(40)]
    file, _ = made(tmp_path, ".parquet", sold=said)
    [asked] = read_table(file, ["sold"], 0.25).targets.unbind(1)
    assert asked.isnan().tolist() == [word is None for word in said]
    assert bool((asked[torch.arange(40) % 3 == 1] > 0).all() and (asked[torch.arange(40) % 3 == 0] < 0).all())


def test_dates_are_numbers_and_a_missing_one_is_a_hole(tmp_path):
    days = pandas.Series(pandas.date_range("2020-01-01", periods=40))
    days[5] = pandas.NaT
    file, _ = made(tmp_path, ".parquet", size=days, price=days, text=["x"] * 40)
    table = read_table(file, ["price"], 0.25)
    assert table.targets.isnan().flatten().nonzero().flatten().tolist() == [5]
    assert table.notes == [
        "1 holes among the features are filled with the mean.",
        "1 targets are missing and not asked for, the first in record 6.",
    ]
    step = table.targets[1:5, 0] - table.targets[:4, 0]
    assert bool((step > 0).all()), "as days follow each other"


@pytest.mark.parametrize(
    "changes, targets, said",
    [
        ({}, [], "say which columns are asked for, as in data.targets=[a,b]; it has size, colour"),
        ({}, ["cost"], "has no column 'cost'; it has size, colour"),
        ({}, ["colour"], "column 'colour' is"),
        ({"price": 7.0}, ["price"], "column 'price' has not two values among the rows to train on"),
        ({"price": math.nan}, ["price"], "column 'price' has not two values among the rows to train on"),
        ({"price": [math.inf] + [1.0, 2.0, 3.0] * 13}, ["price"], "record 1: column 'price' is inf, and targets are"),
        ({"price": [1.0, -1e300] + [2.0, 3.0] * 19}, ["price"], "record 2: column 'price' is -1e+300, and targets are"),
        ({}, ["price", "sold", "price"], "column 'price' is asked for 2 times; name each target once"),
    ],
)
def test_bad_tables_are_one_line(changes, targets, said, tmp_path):
    file, _ = made(tmp_path, ".csv", **changes)
    with pytest.raises(UserError) as error:
        read_table(file, targets, 0.25)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("t.csv", None, "no such file"),
        ("t.xlsx", b"", "must end in .csv, .jsonl, .parquet, .tsv"),
        ("t.csv", b"", "cannot be read"),
        ("t.csv", b"a,b\n1,2\n", "has 1 rows; at least 10 are needed"),
        ("t.csv", b"a,b\n1,2\n1,2,3,4\n", "cannot be read"),
        ("t.csv", b"a,b,a\n" + b"1,2,3\n" * 20, "t.csv: has 2 columns 'a'; give each its own name"),
        ("t.tsv", b"\xef\xbb\xbfb\ta\tb\n" + b"1\t2\t3\n" * 20, "t.tsv: has 2 columns 'b'; give each its own name"),
        ("t.csv", b"a,b\n" + b"1,2,3\n" * 20, "its records have more cells than there are columns"),
        ("t.parquet", b"words", "cannot be read"),
        ("t.jsonl", b'{"a": 1}\n\n{"a": 2', "t.jsonl, line 3: not JSON ("),
        ("t.jsonl", b'{"a": 1}\n[2]', "t.jsonl, record 2: must be an object"),
        ("t.jsonl", b'{"a": 1}\n{"a": "\xff"}', "t.jsonl, line 2: not UTF-8 text"),
    ],
)
def test_files_that_are_no_tables_are_one_line(name, content, said, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_table(tmp_path / name, ["a"], 0.25)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("texts", [False, True])
def test_a_byte_order_mark_is_no_name_and_a_line_break_no_record(texts, tmp_path):
    words = [f'"two\nlines, {i}"' for i in range(12)]
    rows = "\r\n".join(f"{word},{i}," for i, word in enumerate(words))
    (tmp_path / "t.csv").write_bytes(f"\N{ZERO WIDTH NO-BREAK SPACE}said,a,\r\n{rows}\r\n".encode())
    frame = read_frame(tmp_path / "t.csv", texts=texts)
    assert list(frame.columns)[:2] == ["said", "a"] and len(frame) == 12
    assert [str(value) for value in frame["a"]] == [str(i) for i in range(12)]
    assert list(frame["said"]) == [word.strip('"') for word in words]


def test_digits_ask_two_questions():
    pytest.importorskip("sklearn", reason="shunter[tasks] has the digits")
    table = digits(0.2)
    assert table.features.shape == (1797, 64) and table.tasks == ["even", "5 or more"]
    assert float(table.features.abs().max()) <= FAR and int(table.held_out.sum()) == 359
