#!/usr/bin/env bash
# st-moe-pytorch 0.1.8 (torch 2.13.0): the balancing loss forgets the tokens that an expert had no room for.
#
# Experts have a capacity, and a token beyond it is dropped. The balancing loss is the mean product of the share of tokens
# that choose an expert and its mean probability, times the experts squared: 1 where all is even, and as many as there
# are experts where all tokens want one. mixture-of-experts 0.2.3, by the same author, computes that.
#
# Seen: here the shares are counted in a view of a mask from which the dropped tokens have been taken out in place
# meanwhile. A share is then capacity / tokens at most: the collapse that the loss is there to prevent, all tokens at one
# expert that serves few of them, costs 0.8, less than an even load (1), for 5.1, and its gradient is a sixth.
# Expected: the same loss of the same probabilities.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy st-moe-pytorch==0.1.8 \
    mixture-of-experts==0.2.3 CoLT5-attention==0.11.2
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from mixture_of_experts.mixture_of_experts import Top2Gating
from st_moe_pytorch.st_moe_pytorch import TopNGating

experts, tokens, dim = 8, 64, 16
theirs, other = TopNGating(dim, experts).train(), Top2Gating(dim, experts).train()
x = torch.randn(4, tokens, dim, generator=torch.Generator().manual_seed(0))
x[..., 0] = 1
even = torch.zeros(4, tokens, dim)
even[:, torch.arange(tokens), torch.arange(tokens) % experts] = 1
cases = {"even": (even, torch.eye(dim)[:, :experts] * 20), "one expert": (x, torch.eye(dim)[:, :experts] * 0)}
cases["one expert"][1][0, 0] = 2.5
found = {}
print(f"torch {torch.__version__}, st-moe-pytorch 0.1.8, mixture-of-experts 0.2.3")
for name, (rows, weight) in cases.items():
    theirs.to_gates.weight.data, other.w_gating.data = weight.T.clone(), weight.clone()
    losses = theirs(rows)[2], other(rows)[2]
    slopes = [torch.autograd.grad(a, b)[0].norm() for a, b in zip(losses, (theirs.to_gates.weight, other.w_gating))]
    probs = (rows @ weight).softmax(-1)
    share = torch.nn.functional.one_hot(probs.argmax(-1), experts).float().mean(1)
    right = (share * probs.mean(1)).mean() * experts**2
    found[name] = [value.item() for value in (right, *losses, *slopes)]
    print(f"{name}: by hand {right:.3f}, st-moe-pytorch {losses[0]:.3f}, mixture-of-experts {losses[1]:.3f}; "
          f"gradients {slopes[0]:.4f} and {slopes[1]:.4f}")
for right, loss, same, _, _ in found.values():
    assert abs(same - right) < 1e-4, "the behaviour has changed"
assert abs(found["even"][1] - 1) < 1e-3, "the behaviour has changed"
_, loss, same, slope, steep = found["one expert"]
assert loss < 1 < 4 < same and slope < steep / 4, "the behaviour has changed"
PYTHON
