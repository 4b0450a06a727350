"""Sparse Mixer's encoder and experts between LSTM layers: against definitions, and trained on a small task each."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shunter
from shunter import MoE
from shunter.layers.recurrent import ExpertLSTM
from shunter.layers.sparse_mixer import FourierMixing, LinearMixing, SparseMixer


def mixer(mixing="fourier", **options):
    sizes = {"vocab_size": 20, "dim": 16, "hidden": 24, "num_layers": 4, "length": 12, "num_heads": 2}
    return SparseMixer(**sizes, attention=[3], experts=[1, 2], mixing=mixing, num_experts=4, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fourier_mixing_is_the_real_part_of_the_transform(dtype):
    x = torch.randn(2, 7, 10).to(dtype)
    mixed = FourierMixing()(x)
    s, d = torch.arange(7, dtype=torch.float64), torch.arange(10, dtype=torch.float64)
    phase = 2 * np.pi * (s[:, None, None, None] * s[None, None, :, None] / 7 + d[None, :, None, None] * d / 10)
    expected = torch.einsum("sdtw,btw->bsd", torch.cos(phase), x.double())
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-2, atol=tolerance)


def test_linear_mixing_of_a_shorter_sequence():
    mixing = LinearMixing(8, 5)
    x = torch.randn(3, 6, 5)
    for b in range(3):
        expected = mixing.tokens.detach().numpy()[:6, :6] @ x[b].numpy() @ mixing.width.detach().numpy()
        assert np.allclose(mixing(x)[b].detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("mixing", ["fourier", "linear"])
def test_layers_are_where_they_were_asked_for_and_padding_says_nothing(mixing):
    encoder = mixer(mixing, router="topk", top_k=2).eval()
    kinds = [type(m).__name__ for m in encoder.mixers]
    assert kinds == [{"fourier": "FourierMixing", "linear": "LinearMixing"}[mixing]] * 3 + ["MultiheadAttention"]
    assert [isinstance(block, MoE) for block in encoder.feed_forward] == [False, True, True, False]
    ids, mask = torch.randint(20, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    other = torch.where(mask, ids, torch.randint(20, (2, 9)))
    torch.testing.assert_close(encoder(ids, mask)[mask], encoder(other, mask)[mask])
    assert encoder.feed_forward[1].routing.counts.sum() == 2 * mask.sum()
    twin = mixer(mixing, router="topk", top_k=2).eval()
    twin.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(twin(ids, mask), encoder(ids, mask))


@pytest.mark.parametrize("mixing", [pytest.param("fourier", marks=pytest.mark.slow), "linear"])
def test_a_mixer_learns_what_depends_on_all_tokens(mixing):
    """How often token 3 is among the others, which no token knows alone."""
    encoder, head = mixer(mixing, router="switch", load_balancing_loss=0.01, dropout=0.0), nn.Linear(16, 4)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], 3e-3)

    def batch(size=32):
        ids = torch.randint(4, 20, (size, 10))
        label = torch.randint(4, (size,))
        for row, n in enumerate(label.tolist()):
            ids[row, torch.randperm(10)[:n]] = 3
        return ids, label

    for _ in range(100):
        ids, label = batch()
        loss = F.cross_entropy(head(encoder(ids).mean(1)), label) + shunter.aux_loss(encoder)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids, label = batch(512)
    assert (head(encoder.eval()(ids).mean(1)).argmax(-1) == label).double().mean() > 0.5


def lstm(**options):
    return ExpertLSTM(vocab_size=12, dim=16, hidden=24, num_experts=8, num_groups=2, **options)


def test_the_lstm_model_is_its_layers_and_goes_on_from_its_state():
    model = lstm().eval().double()  # where no choice hangs on rounding
    with torch.no_grad():
        for p in model.experts.router.parameters():
            p.normal_()
    ids = torch.randint(12, (3, 9))
    logits, state = model(ids)
    x = model.embedding.weight[ids]
    x = x + model.lower(x)[0]
    x = x + 1 / (1 + torch.exp(-model.experts(x.reshape(-1, 16)).reshape(3, 9, 16)))
    x = x + model.upper(x)[0]
    torch.testing.assert_close(logits, x @ model.head.weight.T + model.head.bias)
    first, middle = model(ids[:, :4])
    rest, end = model(ids[:, 4:], middle)
    torch.testing.assert_close(torch.cat([first, rest], 1), logits)
    for one, other in zip(sum(end, ()), sum(state, ()), strict=True):
        torch.testing.assert_close(one, other)
    assert (model.experts.routing.counts.sum() == 4 * 3 * 5).item(), "two experts in each of two groups"


def test_the_lstm_model_learns_a_language():
    model, text = lstm(dropout=0.0, importance_loss=0.1), torch.arange(12).repeat(4)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(80):
        start = torch.randint(12, (16,))
        ids = torch.stack([text[s : s + 10] for s in start])
        logits, _ = model(ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + shunter.aux_loss(model)).backward()
        optimizer.step()
    assert loss < 0.5
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.experts.router.parameters())


def test_what_cannot_be():
    with pytest.raises(ValueError, match="mixing 'wavelet' is unknown; choose fourier or linear"):
        mixer("wavelet")
    with pytest.raises(ValueError, match="attention names layer 7; the layers are 0 to 3"):
        SparseMixer(20, 16, 24, 4, 12, attention=[7], experts=[])
    with pytest.raises(ValueError, match="S up to 12"):
        mixer()(torch.randint(20, (1, 13)))
    with pytest.raises(ValueError, match="causal"):
        ExpertLSTM(12, 16, 24, 8, router="expert_choice")
