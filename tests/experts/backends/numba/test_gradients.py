"""Memory for gradients: lent again when nothing holds the last gradient, never while something does."""

import copy
import gc
import io

import pytest
import torch

from shunter import MoE
from shunter.experts.backends.numba import gradients


@pytest.fixture(autouse=True)
def of_every_size(monkeypatch):
    monkeypatch.setattr(gradients, "_MAPPED", 1)
    monkeypatch.setattr(gradients, "_BLOCKS", [])


def _lent():
    return [block for block in gradients._BLOCKS if not block.free()]


def _layer(backend, of):
    layer = MoE(8, 12, 4, "topk", top_k=2, backend=backend)
    layer.load_state_dict(of.state_dict())
    return layer


def test_the_gradients_of_each_step_are_the_reference_s_in_the_memory_of_the_last():
    reference = MoE(8, 12, 4, "topk", top_k=2, backend="reference")
    layer, places = _layer("numba", reference), []
    for _ in range(4):
        x = torch.randn(16, 8)
        for model in (reference, layer):
            model.zero_grad(set_to_none=True)
            model(x).square().sum().backward()
        for mine, theirs in zip(layer.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)
        places.append({p.grad.data_ptr() for p in layer.experts.parameters()})
    assert all(place == places[0] for place in places)


def test_what_holds_a_gradient_keeps_it():
    layer = MoE(8, 12, 4, "topk", top_k=2, backend="numba")
    held = []
    for hold in (
        lambda g: g,
        lambda g: g[1:, :2].mT,
        torch.Tensor.detach,
        lambda g: g.numpy(),
        lambda g: g.untyped_storage(),
    ):
        layer(torch.randn(16, 8)).sum().backward()
        grad = layer.experts.gate_up_proj.grad
        kept = hold(grad)
        held.append((kept, copy.deepcopy(kept)))
        del grad, kept
        layer.zero_grad(set_to_none=True)
    for now, then in held:
        assert list(now) == list(then) if isinstance(now, torch.UntypedStorage) else (now == then).all()


def test_accumulated_gradients_are_sums():
    reference = MoE(8, 12, 4, "topk", top_k=2, backend="reference")
    layer = _layer("numba", reference)
    for _ in range(2):
        for model in (reference, layer):
            model.zero_grad(set_to_none=True)
        for _ in range(3):
            x = torch.randn(16, 8)
            for model in (reference, layer):
                model(x).square().sum().backward()
        for mine, theirs in zip(layer.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_parameters_whose_gradients_live_one_after_the_other_share_memory():
    layers = torch.nn.Sequential(*(MoE(8, 8, 4, "topk", top_k=2, backend="numba") for _ in range(3)))
    for p in layers.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    layers(torch.randn(16, 8)).sum().backward()
    assert len(gradients._BLOCKS) == len(list(layers[0].experts.parameters()))


def test_memory_goes_with_its_parameter():
    layer = MoE(8, 12, 4, "topk", top_k=2, backend="numba")
    layer(torch.randn(16, 8)).sum().backward()
    grad = layer.experts.gate_up_proj.grad
    expected = grad.clone()
    assert _lent()
    del layer
    gc.collect()
    assert not gradients._BLOCKS and torch.equal(grad, expected)


def test_lent_memory_can_be_shared_saved_and_copied():
    layer = MoE(8, 12, 4, "topk", top_k=2, backend="numba")
    layer(torch.randn(16, 8)).sum().backward()
    expected = layer.experts.gate_up_proj.grad.clone()
    torch.save(layer.experts.gate_up_proj.grad, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), expected)
    layer.share_memory()
    layer.experts.gate_up_proj.grad.share_memory_()
    assert torch.equal(layer.experts.gate_up_proj.grad, expected)
    assert torch.equal(copy.deepcopy(layer.experts.gate_up_proj.grad), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_lent_has_the_parameter_s_shape_and_dtype(dtype):
    parameter = torch.nn.Parameter(torch.empty(3, 4, 5, dtype=dtype).transpose(0, 2))
    lent = gradients.gradient_of(parameter)
    assert lent.shape == parameter.shape and lent.dtype == dtype and lent.is_contiguous() and _lent()
    assert gradients.gradient_of(parameter * 2).shape == parameter.shape and len(_lent()) == 1
