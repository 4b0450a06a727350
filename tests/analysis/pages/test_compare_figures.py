"""The figure of a comparison of routers shows the numbers of its table."""

import pytest
import torch

pytest.importorskip("matplotlib")

from shunter.analysis.pages.compare_figures import LINE, comparison, wrapped
from shunter.analysis.runs import TEXT


def test_several_seeds_have_error_bars():
    keys = ("eval_loss", "balance", "dropped", "seconds", "peak_rss_bytes")
    dense, *sparse = ({"router": f"r{i}"} | dict(zip(keys, torch.rand(5).tolist(), strict=True)) for i in range(4))
    for row in (dense, *sparse):
        row["spread"] = {"eval_loss": float(torch.rand(())) / 10}
    axes = comparison({"models": [dense, *sparse], "seeds": [0, 1]}, TEXT).axes[0]
    (bars,) = [lines for lines in axes.collections if len(lines.get_segments()) == 3]
    sparse.sort(key=lambda row: row["eval_loss"])
    for segment, row in zip(bars.get_segments(), sparse, strict=True):
        ends = [row["eval_loss"] - row["spread"]["eval_loss"], row["eval_loss"] + row["spread"]["eval_loss"]]
        assert segment[:, 0].tolist() == pytest.approx(ends)


def test_points_are_the_table_best_loss_first():
    keys = ("eval_loss", "balance", "dropped", "seconds", "peak_rss_bytes")
    dense, *sparse = ({"router": f"r{i}"} | dict(zip(keys, torch.rand(5).tolist(), strict=True)) for i in range(6))
    figure = comparison({"models": [dense, *sparse]}, TEXT)
    sparse.sort(key=lambda row: row["eval_loss"])
    scale = {"dropped": 100, "seconds": 1 / dense["seconds"], "peak_rss_bytes": 2**-20}
    for axes, key in zip(figure.axes, keys, strict=True):
        drawn = axes.lines[0].get_xdata()
        assert list(drawn) == pytest.approx([row[key] * scale.get(key, 1) for row in sparse])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [row["router"] for row in sparse]
    assert figure.axes[0].lines[1].get_xdata()[0] == dense["eval_loss"]


def test_long_names_of_routers_leave_the_panels_their_width():
    keys = ("eval_loss", "balance", "dropped", "seconds", "peak_rss_bytes")
    names = [
        "dense",
        "topk",
        "bigram_hash:num_hashes=2+hash:num_hashes=2+topk",
        "topk:operations=[swiglu, relu]:top_k=1",
    ]
    rows = [{"router": name} | dict(zip(keys, (1.0 + torch.rand(5)).tolist(), strict=True)) for name in names]
    figure = comparison({"models": rows}, TEXT)
    figure.draw_without_rendering()
    width = figure.get_figwidth()
    assert all(axes.get_position().width * width > 1.1 for axes in figure.axes)
    for axes in figure.axes:  # no point lies on the frame's right edge
        assert max(axes.lines[0].get_xdata()) < axes.get_xlim()[1]


@pytest.mark.parametrize("name", ["topk", "a" * 50, "bigram_hash:num_hashes=2+hash:num_hashes=2+topk", "x:y=[a, b, c]"])
def test_a_wrapped_name_is_the_name_in_lines(name):
    lines = wrapped(name).split("\n")
    assert "".join(lines).replace(" ", "") == name.replace(" ", "")
    assert all(len(line) <= LINE or not any(mark in line[:-1] for mark in "+:,") for line in lines)
    assert all(lines) and (len(lines) > 1 or len(name) <= LINE or name.isalpha())
