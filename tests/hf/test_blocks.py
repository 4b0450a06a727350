"""Blocks are found by what a layer computes: whatever its parts are called, and nothing but the block is replaced."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, PreTrainedModel
from transformers.activations import ACT2FN

import shunter
from shunter.errors import UserError
from shunter.hf.blocks import find_feed_forwards

D, WIDE = 8, 20


class Model(PreTrainedModel):
    """Two layers of a kind between nothing."""

    config_class = LlamaConfig

    def __init__(self, layer, config=None):
        super().__init__(LlamaConfig() if config is None else config)
        self.layers = nn.ModuleList([layer(), layer()])
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, cache=x)
        return x


class Layer(nn.Module):
    """What is common: an attention that needs what only the model has, a norm, a residual, and maps p and q."""

    def __init__(self, wide=WIDE, act="gelu", bias=True):
        super().__init__()
        self.mixer = Mixer()
        self.norm = nn.LayerNorm(D)
        self.p, self.q = nn.Linear(D, wide, bias=bias), nn.Linear(WIDE, D, bias=bias)
        self.act = ACT2FN[act]

    def forward(self, x, cache):
        mixed, _ = self.mixer(x, cache=cache)
        return mixed + self.block(self.norm(mixed))

    def block(self, x):
        return self.q(self.act(self.p(x)))


class Mixer(nn.Module):
    """As wide as a block, with a map of the same sizes, and no block."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(D, WIDE), nn.Linear(WIDE, D)

    def forward(self, x, cache):
        return x + self.out(self.into(cache).cumsum(1)), None


class Dropping(Layer):
    """Dropout by probabilities of its own between the maps and behind them."""

    def __init__(self):
        super().__init__()
        self.inner_dropout, self.outer_dropout = 0.9, 0.0
        self.drop = nn.Dropout(0.9)

    def block(self, x):
        h = F.dropout(self.act(self.p(x)), p=self.inner_dropout, training=self.training)
        return F.dropout(self.q(self.drop(h)), p=self.outer_dropout, training=self.training)


class Flat(Layer):
    """Rows of all tokens, the activation a plain function."""

    def __init__(self):
        super().__init__()
        del self.act
        self.act = F.silu

    def block(self, x):
        return self.q(self.act(self.p(x.reshape(-1, D)))).reshape(x.shape)


class Fused(nn.Module):
    """A module of its own: one map is both, and the gate's rows are its last."""

    def __init__(self):
        super().__init__()
        self.both, self.down = nn.Linear(D, 2 * WIDE), nn.Linear(WIDE, D)

    def forward(self, x):
        up, gate = self.both(x).chunk(2, -1)
        return self.down(up * F.relu(gate))


class WithFused(Layer):
    """A layer around such a module."""

    def __init__(self):
        super().__init__()
        del self.p, self.q, self.act
        self.fused = Fused()

    def block(self, x):
        return self.fused(x)


class Half(nn.Module):
    """The map up with the activation."""

    def __init__(self):
        super().__init__()
        self.map, self.act = nn.Linear(D, WIDE), nn.ReLU()

    def forward(self, x):
        return self.act(self.map(x))


class Halves(Layer):
    """A block in two modules, of which the second adds the residual."""

    def __init__(self):
        super().__init__()
        del self.p
        self.first = Half()

    def block(self, x):
        return self.q(self.first(x))


class Adapted(Layer):
    """An adapter beside the block."""

    def __init__(self):
        super().__init__()
        self.small, self.back, self.other = nn.Linear(D, 2), nn.Linear(2, D), nn.ReLU()

    def block(self, x):
        x = super().block(x)
        return x + self.back(self.other(self.small(x)))


class Twins(Layer):
    """Two blocks whose maps up run before both maps down."""

    def __init__(self):
        super().__init__()
        self.r, self.s, self.other = nn.Linear(D, WIDE), nn.Linear(WIDE, D), nn.ReLU()

    def block(self, x):
        h, g = self.p(x), self.r(-x)
        h, g = self.act(h), self.other(g)
        return self.q(h) + 2 * self.s(g)


class Half1(nn.Linear):
    """A map with a forward of its own that computes the same."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class OwnMaps(Layer):
    """Such maps."""

    def __init__(self):
        super().__init__()
        self.p, self.q = Half1(D, WIDE), Half1(WIDE, D)


FOUND = [
    (Layer, "p"), (Dropping, "p"), (Flat, "p"), (WithFused, "fused"), (Halves, "first"), (Adapted, "p"), (OwnMaps, "p"),
    (Twins, "p"),
]  # fmt: skip


@pytest.mark.parametrize("layer, path", FOUND)
@pytest.mark.parametrize("training", [False, True])
def test_copies_in_the_place_of_the_block_compute_the_same(layer, path, training):
    dense = Model(layer)
    found = [block.path for stack in find_feed_forwards(dense) for block in stack]
    assert f"layers.0.{path}" in found and len(found) == (4 if layer is Twins else 2)
    sparse = shunter.sparsify(copy.deepcopy(dense), 3, "topk", top_k=2, init="copy").train(training)
    x = torch.randn(2, 5, D)
    # No dropout is left in training: that between the maps goes, and there is no other.
    assert torch.allclose(sparse(x), dense.eval()(x), rtol=1e-4, atol=1e-4)
    sparse(x).sum().backward()
    assert all(p.grad is not None for layer in shunter.moe_layers(sparse).values() for p in layer.experts.parameters())


class Scaled(Layer):
    """A scale between the maps, which begins as one."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDE))

    def block(self, x):
        return self.q(self.act(self.p(x)) * self.scale)


class Normed(Layer):
    """A norm between the maps."""

    def __init__(self):
        super().__init__()
        self.inner = nn.RMSNorm(WIDE)

    def block(self, x):
        return self.q(self.inner(self.act(self.p(x))))


class Skipping(Layer):
    """Something of the block's input between the maps."""

    def block(self, x):
        return self.q(self.act(self.p(x)) + x.mean(-1, keepdim=True))


class Functional(Layer):
    """An activation that nothing can take out."""

    def block(self, x):
        return self.q(F.gelu(self.p(x)))


class Elsewhere(Layer):
    """The activation at work in front of the block too."""

    def block(self, x):
        return self.q(self.act(self.p(self.act(x))))


class Weighing(Layer):
    """A map whose weight is used besides."""

    def block(self, x):
        return super().block(x) * self.q.weight.abs().max()


class Unknown(Layer):
    """An activation that the experts do not have."""

    def __init__(self):
        super().__init__(act="mish")


class Training(Layer):
    """More in training."""

    def block(self, x):
        if self.training:
            raise RuntimeError("needs labels")
        return super().block(x)


class Asking(WithFused):
    """The module's map besides."""

    def block(self, x):
        return self.fused(x.to(self.fused.down.weight.dtype))


class Arguments(Layer):
    """An activation that takes more."""

    def __init__(self):
        super().__init__()
        del self.act
        self.act = F.gelu

    def block(self, x):
        return self.q(self.act(self.p(x), approximate="tanh"))


class Clipped(Layer):
    """One that equals another but for large numbers."""

    def __init__(self):
        super().__init__(act="gelu_10")


class Clipped6(Layer):
    """Another."""

    def __init__(self):
        super().__init__(act="relu6")


class Scaling(nn.Linear):
    """No linear map of its weight alone."""

    def forward(self, x):
        return 1.01 * super().forward(x)


class OtherMaps(Layer):
    """Such maps."""

    def __init__(self):
        super().__init__()
        self.p = Scaling(D, WIDE)


REFUSED = [
    (Scaled, "GELU"), (Normed, "RMSNorm"), (Skipping, "GELU"), (Functional, "cannot be left out"),
    (Elsewhere, "act is at work elsewhere"), (Weighing, "weight"), (Unknown, "Mish"),
    (Clipped, "ClippedGELU"), (Clipped6, "ReLU6"), (OtherMaps, "Looked at"),
    (Training, "needs labels"),
    (Asking, "needs fused for more"),
    (Arguments, "for more"),
]  # fmt: skip


@pytest.mark.parametrize("layer, word", REFUSED)
def test_what_computes_more_is_refused_in_a_line_that_names_it(layer, word):
    model = Model(layer)
    before = str(model)
    with pytest.raises(UserError, match=word) as caught:
        shunter.sparsify(model, 2, "topk")
    assert len(str(caught.value).splitlines()) == 1 and "layers.0" in str(caught.value)
    assert str(model) == before


def test_a_part_that_is_unknown_is_named_and_stays_dense():
    model = Model(Layer)
    model.layers[1] = Normed()
    with pytest.warns(UserWarning, match=r"left dense: layers.1 \(Normed.*RMSNorm"):
        shunter.sparsify(model, 2, "topk")
    assert list(shunter.moe_layers(model)) == ["layers.0.p"]


def test_a_block_that_layers_share_is_replaced_in_all():
    model = Model(WithFused)
    model.layers[1].fused = model.layers[0].fused
    sparse = shunter.sparsify(copy.deepcopy(model), 2, "topk", top_k=2, init="copy")
    assert sparse.layers[0].fused is sparse.layers[1].fused and isinstance(sparse.layers[1].fused, shunter.MoE)
    x = torch.randn(2, 3, D)
    assert torch.allclose(sparse(x), model(x), rtol=1e-4, atol=1e-4)


def test_looking_changes_nothing():
    """Neither weights nor modes nor random numbers; no hook runs, and no module is called."""
    model = Model(Dropping).train()
    called = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: called.append(1))
    state, numbers = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    described, settings = str(model), [dict(vars(module)) for module in model.modules()]
    find_feed_forwards(model)
    assert not called and str(model) == described and torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [dict(vars(module)) for module in model.modules()] == settings


@pytest.mark.parametrize("layer", [Layer, WithFused])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_and_no_memory(layer, dtype):
    expected = find_feed_forwards(Model(layer))
    for model in (Model(layer).to(dtype), Model(layer).to("meta")):
        found = find_feed_forwards(model)
        assert [[b.path for b in stack] for stack in found] == [[b.path for b in stack] for stack in expected]
    sparse = shunter.sparsify(Model(layer).to(dtype), 2, "topk")
    assert {p.dtype for layer in shunter.moe_layers(sparse).values() for p in layer.experts.parameters()} == {dtype}


def test_a_compiled_model_and_one_that_is_offloaded():
    model = Model(Layer)
    model.layers[0].compile()
    assert len(shunter.sparsify(copy.deepcopy(model), 2, "topk").layers) == 2
    offloaded = cpu_offload(Model(Layer), torch.device("cpu"))
    with pytest.raises(UserError, match="layers.0.p are offloaded; sparsify the model"):
        shunter.sparsify(offloaded, 2, "topk")


def test_a_forward_that_was_exchanged_is_what_counts():
    model = Model(WithFused)
    own = model.layers[0].fused.forward
    model.layers[0].fused.forward = lambda x: 2 * own(x)
    assert [block.path for stack in find_feed_forwards(model) for block in stack] == ["layers.1.fused"]


def test_integers_are_no_weights():
    model = Model(Layer)
    model.layers[0].p.weight = nn.Parameter(torch.zeros(WIDE, D, dtype=torch.uint8), requires_grad=False)
    assert [block.path for stack in find_feed_forwards(model) for block in stack] == ["layers.1.p"]
