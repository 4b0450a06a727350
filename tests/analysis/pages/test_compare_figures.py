"""The figure of a comparison of routers shows the numbers of its table."""

import pytest
import torch

pytest.importorskip("matplotlib")

from shunter.analysis.pages.compare_figures import comparison
from shunter.analysis.runs import TEXT


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
