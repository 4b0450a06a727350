"""Experts in codes of 8 and 4 bits: what the codes say, how little they lose, and what every backend makes of them."""

import pytest
import torch

from shunter import MoE
from shunter.errors import UserError
from shunter.experts import Experts, QuantisedExperts, Weights, choose
from shunter.experts.backends import triton
from shunter.experts.backends.numba import bridge
from shunter.experts.choice import get
from shunter.experts.quantised import Coding, QuantisedWeights, pack

from ..helpers import by_tokens, error_of_another_order, random_routing, random_weights, relative_error
from .conftest import needs_loops

CODINGS = {
    "8": Coding((8,) * 5),
    "4": Coding((4,) * 5),
    "4, 64": Coding((4,) * 5, 64),
    "4, zero": Coding((4,) * 5, 32, True),
    "mixed": Coding((4, 8, 8, 4, 8), 64, True),
}


def _quantised(weights, coding, dtype=torch.float32):
    biases = (None if b is None else b.detach() for b in (weights.up_bias, weights.down_bias))
    packed = pack(weights.up, coding), pack(weights.down, coding)
    return QuantisedWeights(*packed, *biases, weights.activation, dtype)


def _decoded(packed, e):
    """The matrix of expert e, weight by weight, from the words of the layout."""
    coding, found = packed.coding, []
    codes, scales = packed.codes.tolist(), packed.scale.view(torch.bfloat16).double().tolist()
    at = scale = 0
    for expert, bits in enumerate(coding.bits):
        unit = 32 if bits == 8 else coding.group
        width = -(-packed.columns // unit) * unit
        for _ in range(packed.rows):
            row = []
            for c in range(width):
                if bits == 8:
                    code, zero, s = codes[at + c], 0, scales[scale]
                    code -= 256 * (code > 127)
                else:
                    byte = codes[at + c // 32 * 16 + c % 16]
                    code, place = byte >> 4 if c % 32 >= 16 else byte & 15, scale + c // coding.group
                    zero, s = packed.zero[place].item() if coding.zero_point else 8, scales[place]
                row.append((code - zero) * s)
            at += width * bits // 8
            scale += 1 if bits == 8 else width // coding.group
            if expert == e:
                found.append(row[: packed.columns])
                assert not any(row[packed.columns :])
    assert at == len(codes) and scale == len(scales)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("coding", CODINGS.values(), ids=CODINGS)
@pytest.mark.parametrize("columns", [1, 40, 64, 100])
def test_a_matrix_is_what_its_codes_say_exactly(coding, columns):
    packed = pack(torch.randn(5, 3, columns) * 10 ** torch.randn(5, 3, 1), coding)
    for e in range(5):
        assert torch.equal(packed.matrix(e).double(), _decoded(packed, e))


def _plain_error(matrix, bits, group, zero_point, importance):
    """Of plain rounding, with the scale that reaches the largest weight."""
    groups = matrix.double().view(-1, matrix.shape[1] if bits == 8 else group)
    if zero_point and bits == 4:
        low, high = groups.amin(1, True).clamp(max=0), groups.amax(1, True).clamp(min=0)
        scale = ((high - low) / 15).float().bfloat16().double()
        zero = (-low / scale).round()
        found = (((groups / scale).round() + zero).clamp(0, 15) - zero) * scale
    else:
        scale = (groups.abs().amax(1, True) / (7 if bits == 4 else 127)).float().bfloat16().double()
        found = (groups / scale).round().clamp(-8 if bits == 4 else -127, 7 if bits == 4 else 127) * scale
    return ((found.view(matrix.shape) - matrix).square() * importance).sum()


@pytest.mark.parametrize("coding", CODINGS.values(), ids=CODINGS)
@pytest.mark.parametrize("weighed", [False, True])
def test_scales_lose_no_more_than_plain_rounding(coding, weighed):
    matrices = torch.randn(5, 12, 128) * 10 ** torch.randn(5, 12, 1)
    importance = 10 ** torch.randn(5, 128) if weighed else torch.ones(5, 128)
    packed = pack(matrices, coding, importance if weighed else None)
    for e, bits in enumerate(coding.bits):
        lost = ((packed.matrix(e).double() - matrices[e]).square() * importance[e].double()).sum()
        assert lost <= 1.001 * _plain_error(matrices[e], bits, coding.group, coding.zero_point, importance[e].double())
        assert lost > 0


def test_importance_moves_the_error_to_where_it_counts_less():
    matrices, importance = torch.randn(1, 64, 256), torch.ones(1, 256)
    importance[0, ::32] = 1e4
    plain, weighed = (pack(matrices, Coding((4,)), given) for given in (None, importance))
    lost = [(packed.matrix(0) - matrices[0])[:, ::32].norm() for packed in (plain, weighed)]
    assert lost[1] < 0.7 * lost[0]


def test_zeros_tiny_and_huge_weights_stay_finite():
    for coding in CODINGS.values():
        matrices = torch.zeros(5, 4, 70)
        assert not any(pack(matrices, coding).matrix(e).any() for e in range(5))
        for scale in (1e-42, 1e-30, 1e30):
            packed = pack(matrices + scale * torch.randn(5, 4, 70), coding, torch.full((5, 70), 1e30))
            assert all(packed.matrix(e).isfinite().all() for e in range(5))
    packed = pack(torch.randn(1, 4, 64), Coding((4,)), torch.zeros(1, 64))
    assert packed.matrix(0).abs().max() > 0.5


@pytest.mark.parametrize(
    "bits, share", [(8, 0.5 + 2 / 2**11), (4, 0.25 + 1 / 32), ((8, 4), 0.392)], ids=["8", "4", "one of each"]
)
def test_codes_take_half_and_a_quarter_of_the_bytes_of_bfloat16(bits, share):
    matrices = torch.randn(2, 16, 1024, dtype=torch.bfloat16)
    coding = Coding((bits, bits) if isinstance(bits, int) else bits)
    assert pack(matrices, coding).nbytes <= share * matrices.nbytes + 1


BACKENDS = [
    "reference",
    "decode",
    pytest.param("numba", marks=needs_loops),
    pytest.param("triton", marks=pytest.mark.skipif(not triton.INSTALLED, reason="needs triton")),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coding", CODINGS.values(), ids=CODINGS)
@torch.no_grad()
def test_error_against_float64_of_the_decoded_weights_is_that_of_the_reference(backend, dtype, coding):
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes it wrongly")
    if backend == "numba" and dtype == torch.bfloat16:
        pytest.skip("compiled in seconds for each dtype; decoding has this one, and loops of many tokens theirs")
    weights = random_weights(5, 72, 50, bias=coding.zero_point, dtype=torch.float32)
    coded = _quantised(weights, coding, dtype)
    for scale in (1.0, 1e-3):
        x = (torch.randn(37, 72) * scale).to(dtype)
        routing = random_routing(37, 5, 0.4, torch.float32)
        exact = get("reference").run(x.double(), coded.to(torch.float64), routing.with_weight(routing.weight.double()))
        ours, plain = (relative_error(get(name).run(x, coded, routing), exact) for name in (backend, "reference"))
        assert ours <= error_of_another_order(plain, dtype)
        assert choose(backend, x, coded)[0].name == backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 5, 9])
@torch.no_grad()
def test_every_count_of_tokens_and_nothing_of_other_experts(backend, tokens):
    weights = random_weights(3, 33, 31, dtype=torch.float32)
    coded = _quantised(weights, Coding((4, 8, 4)))
    x, routing = torch.randn(tokens, 33), random_routing(tokens, 2, 0.9, torch.float32)
    routing = type(routing)(routing.token, routing.expert, routing.weight, tokens, 3)
    plain = Weights(*(torch.stack([m.matrix(e) for e in range(3)]) for m in (coded.up, coded.down)))
    expected = by_tokens(x, plain, routing.dense())
    for name in ("scale", "codes"):  # of the third expert, which nobody chose
        getattr(coded.up, name)[coded.up.coding.starts(62, 33)[name == "scale"][2] :] = 127
    assert torch.allclose(get(backend).run(x, coded, routing), expected, atol=1e-5)


@torch.no_grad()
def test_auto_decodes_in_loops_where_it_can(monkeypatch):
    coded = _quantised(random_weights(4, 40, 24, dtype=torch.float32), Coding((4,) * 4))
    few, many = torch.randn(8, 40), torch.randn(80, 40)
    assert choose("auto", few, coded)[0].name == "decode"
    assert choose("auto", many, coded)[0].name == ("numba" if bridge.lacks() is None else "reference")
    monkeypatch.setattr(bridge, "INSTALLED", False)
    routing = random_routing(8, 4, dtype=torch.float32)
    assert choose("auto", many, coded)[0].name == "reference"
    expected = get("reference").run(few, coded, routing)
    assert torch.allclose(get("decode").run(few, coded, routing), expected, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_of_quantised_experts(bias):
    plain = MoE(6, 40, 4, "topk", top_k=2, bias=bias).eval()
    experts = QuantisedExperts.of(plain.experts.weights, bits=8)
    layer = MoE(6, 40, 4, plain.router, ready_experts=experts).eval()
    x = torch.randn(50, 6, requires_grad=True)
    with torch.no_grad():
        assert 0 < relative_error(layer(x), plain(x)) < 0.02
        assert layer(x.double().float().bfloat16().float()[:0]).shape == (0, 6)
    assert "in codes of 8 bits" in layer.explain() and "bits=8" in repr(layer)
    assert not list(experts.parameters())
    loaded = QuantisedExperts(4, 6, 40, bias=bias, bits=8)
    loaded.load_state_dict(experts.state_dict())
    half = loaded.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(half.up_scale, experts.up_scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with pytest.raises(UserError, match="quantised experts do not learn"):
        layer(x).sum().backward()
    with pytest.raises(UserError, match="quantised experts do not learn"):
        layer.train()(x.detach()).sum().backward()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda w: QuantisedExperts.of(w, bits=3), "3 bits cannot be had; choose 8 or 4"),
        (lambda w: QuantisedExperts.of(w, bits=[4, 8]), "2 bits are given for 5 experts"),
        (lambda w: QuantisedExperts.of(w, bits=[4, 8, 16, 4, 4]), "16 bits cannot be had"),
        (lambda w: QuantisedExperts.of(w, group=48), "a group of 48 cannot be had; choose 32 or 64"),
        (lambda w: QuantisedExperts.of(w)(torch.randn(3, 9), random_routing(3, 5)), r"it must be \(3, 8\)"),
        (lambda w: QuantisedExperts.of(w)(torch.randn(3, 8), random_routing(3, 4)), "the routing has 4 experts"),
    ],
)
def test_errors_say_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call(Experts(5, 8, 4).weights)


def test_weights_that_are_not_finite_are_refused():
    weights = Experts(5, 8, 4).weights
    weights.down.data[3, 1, 1] = float("nan")
    with pytest.raises(UserError, match="the matrices of expert 3 hold NaN or infinity"):
        QuantisedExperts.of(weights)
