"""What torch's grouped_mm does not take reaches it in a form that it takes, or is refused in words."""

import pytest
import torch

from shunter.experts import Weights, choose
from shunter.experts.choice import get
from tests.helpers import random_routing, random_weights, relative_error

DTYPES = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def _strided(matrices, how):
    """The same values in other strides."""
    if how == "transposed":
        return matrices.mT.contiguous().mT
    if how == "every second":
        return torch.stack([matrices, matrices], -1).flatten(-2)[..., ::2]
    if how == "off the 16 bytes":
        return torch.cat([matrices.reshape(-1)[:1], matrices.reshape(-1)])[1:].view(matrices.shape)
    return matrices[:1].expand_as(matrices)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["transposed", "every second", "off the 16 bytes", "expanded"])
@pytest.mark.parametrize("dim, hidden", [(16, 8), (7, 5), (1, 3)])
def test_any_strides(how, dim, hidden, dtype):
    weights, routing = random_weights(4, dim, hidden), random_routing(30, 4)
    up, down = (_strided(part.detach().to(dtype), how) for part in (weights.up, weights.down))
    x = _strided(torch.randn(1, 30, dim).to(dtype), how)[0]
    found = get("grouped_mm").run(x, Weights(up, down), routing)
    exact = get("reference").run(x.double(), Weights(up.double(), down.double()), routing)
    assert relative_error(found, exact) < DTYPES[dtype]


def test_float64_is_refused():
    weights = random_weights(4, 6, 5)
    with pytest.raises(ValueError, match="computes in float32, bfloat16 and float16, not in torch.float64"):
        choose("grouped_mm", torch.randn(3, 6, dtype=torch.float64), weights)
