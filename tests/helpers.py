"""What several tests need: random routings and weights, and a definition of the layer as a loop over tokens."""

import math
import os
import socket
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from shunter import Routing
from shunter.experts import ACTIVATIONS, Weights


def random_routing(tokens, experts, density=0.3, dtype=torch.float64):
    """A ragged routing: any number of experts a token, including none."""
    mask = torch.rand(tokens, experts) < density
    return Routing.from_dense(torch.rand(tokens, experts, dtype=dtype) + 0.1, mask=mask)


def random_index(tokens, experts, k, none=0.3):
    """(T, k) different experts of each token, -1 in place of some."""
    index = torch.rand(tokens, experts).argsort(1)[:, :k]
    return torch.where(torch.rand(tokens, k) < none, -1, index)


def random_weights(experts, dim, hidden, activation="swiglu", bias=False, dtype=torch.float64, scale=1.0):
    rows = 2 * hidden if ACTIVATIONS[activation][1] else hidden

    def draw(*shape, std):
        return (torch.randn(*shape, dtype=torch.float64) * std * scale).to(dtype).requires_grad_()

    return Weights(
        draw(experts, rows, dim, std=dim**-0.5),
        draw(experts, dim, hidden, std=hidden**-0.5),
        draw(experts, rows, std=1.0) if bias else None,
        draw(experts, dim, std=1.0) if bias else None,
        activation,
    )


def _act(name, h):
    scalar = {
        "silu": lambda v: v / (1 + torch.exp(-v)),
        "gelu": lambda v: v * 0.5 * (1 + torch.erf(v / math.sqrt(2))),
        "quick_gelu": lambda v: v / (1 + torch.exp(-1.702 * v)),
        "relu2": lambda v: v * v * (v > 0),
        "gelu_tanh": lambda v: 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
        "relu": lambda v: v.clamp_min(0),
    }
    gated = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
    if name in gated:
        half = h.shape[-1] // 2
        return scalar[gated[name]](h[:half]) * h[half:]
    return scalar[name](h)


def by_tokens(x, weights, matrix):
    """y_t = sum_e matrix[t, e] * expert_e(x_t), token by token, expert by expert; no library code."""
    rows = []
    for t in range(x.shape[0]):
        y = x[t] * 0
        for e in matrix[t].nonzero().flatten().tolist():
            h = weights.up[e] @ x[t]
            if weights.up_bias is not None:
                h = h + weights.up_bias[e]
            out = weights.down[e] @ _act(weights.activation, h)
            if weights.down_bias is not None:
                out = out + weights.down_bias[e]
            y = y + matrix[t, e] * out
        rows.append(y)
    return torch.stack(rows) if rows else x[:0]


def deviation(draws, numbers=1, width=1.0):
    """How far a mean of independent draws from an interval of this width may lie from its expectation.

    The chance that one of so many means lies further is below 1e-13: Hoeffding's inequality and the union bound.
    """
    return width * math.sqrt(math.log(2 * numbers / 1e-13) / (2 * draws))


def relative_error(value, exact):
    """Frobenius norm of the difference over that of the exact value, both in float64."""
    exact = exact.double()
    return ((value.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def error_of_another_order(error, dtype):
    """What a relative error may be where sums in a dtype are taken in another order than those that have this error.

    In half precision both are the rounding of results, the mean of many. In float32 they are of sums, and which order
    is lucky goes by chance: a few units in the last place say nothing, where a lower precision would be thousands.
    """
    return 1.5 * error + torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1 / 8)


TIME_LIMIT = 900  # seconds that processes of a test may take: for what hangs, however loaded the machine is


def on_ranks(work, size, *args, start="fork"):
    """work(rank, *args) on each rank of a gloo group of processes, in order; an error there is an error here.

    What work returns holds lists, not tensors: these would pass through memory that ends with their process. Forked
    ones start at once; what computes a lot should be spawned, as threads that torch has used do not survive a fork.
    """
    context = torch.multiprocessing.get_context(start)
    queue = context.Queue()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    spawned = [context.Process(target=_rank, args=(rank, size, port, queue, work, args)) for rank in range(size)]
    for process in spawned:
        process.start()
    try:
        results = {}
        for _ in spawned:
            rank, result, error = queue.get(timeout=TIME_LIMIT)
            assert error is None, f"rank {rank}: {error}"
            results[rank] = result
        for process in spawned:
            process.join(TIME_LIMIT)
    finally:
        for process in spawned:
            process.kill()
    return [results[rank] for rank in range(size)]


def _rank(rank, size, port, queue, work, args):
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=TIME_LIMIT))
        queue.put((rank, work(rank, *args), None))
        dist.destroy_process_group()
    except Exception:
        queue.put((rank, None, traceback.format_exc()))
