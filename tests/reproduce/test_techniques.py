"""Techniques of the review beside models without them: each trains, and verdicts and pictures follow its numbers."""

import math

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")
pytest.importorskip("transformers")

from shunter.reproduce import digits, one_run, other_layers, small_text
from shunter.reproduce.registry import ALL, find
from shunter.reproduce.results import NOT, REPRODUCED, Row

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("function", "options", "draw"),
    [
        (one_run.growing, {"steps": 25}, one_run.draw_growing),
        (one_run.dense_then_sparse, {"steps": 50}, one_run.draw_dense_then_sparse),
        (one_run.residual, {"steps": 20}, None),
        (one_run.guards, {"steps": 135}, one_run.draw_guards),
        (other_layers.other_layers, {"steps": 3}, other_layers.draw_other_layers),
        (other_layers.early, {"steps": 3}, other_layers.draw_early_exit),
        (digits.expert_gate, {}, None),
        (digits.modular, {"epochs": 1}, None),
        (digits.transfer, {"tasks": 2}, None),
    ],
)
def test_each_runs_and_is_drawn(function, options, draw, tmp_path):
    result = function(**options)
    result.save(tmp_path)  # refuses what is no number
    assert len(result.rows) >= (1 if function is one_run.residual else 2) and all(
        isinstance(row, Row) for row in result.rows
    )
    one = find(result.name)
    assert one in ALL and (one.draw is None) == (draw is None)
    if draw is not None:
        draw(result.data).savefig(tmp_path / "picture.png")
    if function is one_run.growing:
        assert result.rows[0].verdict == REPRODUCED, "a split keeps the function"
    if function is one_run.guards:
        assert result.data["guard"]["skips"]["skipped"] == [step + 1 for step in one_run.BROKEN]
        assert result.rows[0].verdict == REPRODUCED, "a loss that is no number, taken"


def test_a_loop_learns_and_its_loss_is_the_cross_entropy():
    batches, held_out = small_text.windows(12)
    assert batches.shape == (12, small_text.BATCH, small_text.LENGTH) and held_out.shape[1] == small_text.LENGTH
    model = small_text.dense_model()
    logits = model(held_out[:20, :]).logits
    by_hand = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), held_out[:20, 1:])
    assert small_text.held_out_loss(model, held_out[:20]) == pytest.approx(float(by_hand), rel=1e-4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = [small_text.step(model, optimizer, batches[0]) for _ in range(12)]
    assert losses[0] == pytest.approx(math.log(small_text.VOCABULARY), rel=0.1) and losses[-1] < losses[0] - 1


def test_a_decoder_with_sparse_projections_sees_no_later_byte():
    model = other_layers._sparse_qkv(8)
    dense = sum(p.numel() for p in small_text.dense_model().parameters())
    assert sum(p.numel() for p in model.parameters()) < dense - 2 * 3 * 64 * 64 + 2 * 3072
    ids = torch.randint(256, (2, 20))
    later = ids.clone()
    later[:, 12:] = (later[:, 12:] + 1) % 256
    a, b = model(ids).logits, model(later).logits
    torch.testing.assert_close(a[:, :12], b[:, :12], rtol=1e-4, atol=1e-5)
    assert float((a[:, 12:] - b[:, 12:]).abs().max()) > 1e-3


def test_an_expert_that_is_picked_badly_is_not_reproduced(monkeypatch):
    worst = digits.choose_expert
    monkeypatch.setattr(digits, "choose_expert", lambda *a, **k: dict(reversed(list(worst(*a, **k).items()))))
    assert digits.transfer(tasks=4).rows[0].verdict == NOT
