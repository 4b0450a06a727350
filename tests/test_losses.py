"""Auxiliary losses: golden values, float64 sums written out, gradients, masks."""

import pytest
import torch

from shunter import losses
from shunter.losses import cv_squared, importance_loss, load_balancing_loss, z_loss
from shunter.routing import Routing

from .test_capacity import LOGITS


def _top(logits, k):
    weight, index = logits.softmax(-1).topk(k)
    return Routing.from_topk(index, weight, logits.shape[1])


@pytest.mark.parametrize(
    "k, choices, expected", [(1, "mean", 1.448608), (2, "first", 1.448608), (2, "all", 2.269648), (2, "mean", 1.134824)]
)
def test_golden_balance(k, choices, expected):
    assert load_balancing_loss(LOGITS.softmax(-1), _top(LOGITS, k), choices=choices).item() == pytest.approx(
        expected, abs=1e-5
    )


def test_golden_importance_and_z():
    assert importance_loss(LOGITS.softmax(-1)).item() == pytest.approx(0.229348, abs=1e-5)
    assert z_loss(LOGITS).item() == pytest.approx(6.753990, abs=1e-5)


@pytest.mark.parametrize("choices", ["first", "all", "mean"])
def test_balance_is_the_sum_written_out_over_real_tokens(choices):
    logits = torch.randn(30, 5, dtype=torch.float64)
    mask = torch.rand(30) < 0.7
    routing = _top(logits, 2)
    kept = routing.masked(mask[routing.token]).select(torch.rand(int(mask.sum()) * 2) < 0.6)
    real = logits[mask].softmax(-1)
    index = logits[mask].topk(2).indices
    used = index[:, :1] if choices == "first" else index
    f = torch.tensor([float((used == e).sum()) for e in range(5)], dtype=torch.float64) / len(index)
    f = f / 2 if choices == "mean" else f
    expected = 5 * (f * real.mean(0)).sum()
    assert torch.allclose(load_balancing_loss(logits.softmax(-1), kept, mask, choices), expected), (
        "dropped tokens count"
    )


def test_padding_with_nan_enters_no_loss():
    logits = torch.randn(12, 4, dtype=torch.float64)
    mask = torch.ones(12, dtype=torch.bool)
    mask[9:] = False
    poisoned = logits.clone()
    poisoned[9:] = float("nan")
    assert torch.equal(z_loss(poisoned, mask), z_loss(logits, mask))
    assert torch.allclose(z_loss(logits, mask), z_loss(logits[:9]))
    assert torch.allclose(importance_loss(poisoned.softmax(-1), mask), importance_loss(logits[:9].softmax(-1)))


def test_gradients():
    logits = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    routing = _top(logits.detach(), 2)
    assert torch.autograd.gradcheck(lambda h: load_balancing_loss(h.softmax(-1), routing), logits)
    assert torch.autograd.gradcheck(lambda h: importance_loss(h.softmax(-1)), logits)
    assert torch.autograd.gradcheck(z_loss, logits)


def test_perfect_balance_has_finite_gradients():
    logits = torch.zeros(8, 4, dtype=torch.float64, requires_grad=True)
    (importance_loss(logits.softmax(-1)) + cv_squared(logits.softmax(-1).sum(0)) + z_loss(logits)).backward()
    assert logits.grad.isfinite().all()


def test_a_shift_moves_the_z_loss_and_not_the_softmax():
    shifted = LOGITS + 3
    assert torch.allclose(shifted.softmax(-1), LOGITS.softmax(-1))
    assert z_loss(shifted) > z_loss(LOGITS)


@pytest.mark.parametrize(
    "loss",
    [
        z_loss,
        lambda h, mask: importance_loss(h, mask),
        lambda h, mask: losses.load_loss(h, h.flip(1), h + 0.5, 2, mask),
        lambda h, mask: losses.load_loss(h, h.flip(1), 0.3, 2, mask, leave_one_out=False),
        losses.local_entropy_loss,
        lambda h, mask: losses.global_entropy_loss(h / 20, mask, 4.0),
        losses.sparsity_loss,
        losses.mean_importance_loss,
        lambda h, mask: losses.variance_over_tokens(h, mask).sum(),
        lambda h, mask: losses.consistency_loss(h, h.flip(1), mask),
        lambda h, mask: load_balancing_loss(h, _top(torch.arange(24.0).reshape(6, 4), 2), mask),
        lambda h, mask: load_balancing_loss(
            h, _top(torch.arange(24.0).reshape(6, 4), 2), mask, group=torch.tensor([0, 0, 0, 1, 1, 1])
        ),
    ],
)
def test_rows_that_the_mask_leaves_out_reach_neither_the_loss_nor_a_gradient(loss):
    mask = torch.tensor([True, False, True, True, False, True])
    rows = torch.rand(6, 4, dtype=torch.float64)
    found = []
    for padding in (0.3, torch.nan, torch.inf):
        h = torch.where(mask[:, None], rows, padding).requires_grad_()
        value = loss(h, mask)
        found.append([value, *torch.autograd.grad(value, h)])
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        assert torch.equal(other[1], found[0][1]) and (other[1][~mask] == 0).all()
