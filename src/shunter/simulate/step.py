"""A model, a cluster and a layout to the time and memory of one training step, and the best layout among all.

Time of a step: computing, what of the exchanges computing does not hide, routing, what data and tensor parallelism
move, and the bubble of the pipeline. It is an account of averages, with balanced or given load; nothing is simulated
event by event.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import UserError
from .clusters import Bound, Cluster, Form
from .shapes import ModelShape
from .volumes import exchanges

__all__ = ["Job", "Layout", "Step", "best", "imbalance", "layer_seconds", "layouts", "predict", "sweep", "weakened"]


@dataclass(frozen=True)
class Layout:
    """How devices share the work.

    Args:
        devices: in all.
        ep: ranks that hold different experts, of the same pipeline stage.
        pp: pipeline stages; tp: tensor-parallel ranks.
        stages: virtual stages of each pipeline rank, which divide its bubble.
        last: layers of the last pipeline rank, which has the model's output too; 0: as many as make the slowest rank
            fastest.
    """

    devices: int
    ep: int = 1
    pp: int = 1
    tp: int = 1
    stages: int = 1
    last: int = 0

    @property
    def dp(self) -> int:
        """Data-parallel replicas of what is no expert."""
        return self.devices // (self.pp * self.tp)

    @property
    def edp(self) -> int:
        """Replicas of an expert."""
        return self.devices // (self.pp * self.ep)


@dataclass(frozen=True)
class Job:
    """What a step trains on, and how.

    Args:
        batch_tokens: of all devices.
        micro_batch: sequences of a micro-batch.
        dispatch_bytes, combine_bytes: of an element on the way to experts and back.
        form: how exchanges send rows; with a capacity factor de-duplicated ones are flat.
        shuffle: whether tokens are shuffled between ranks first, as by BASE.
        recompute: whether the forward runs again in the backward, its exchanges included.
        load: rows of the fullest rank over the mean; 0: balanced but for the chance of sampling.
        state_bytes: of master weights and the optimizer's moments, for each parameter.
        sharded: whether parameters are sharded over data parallelism too, and gathered for each pass (FSDP).
    """

    batch_tokens: float = 4 * 2**20
    micro_batch: int = 1
    dispatch_bytes: float = 2.0
    combine_bytes: float = 2.0
    form: Form = "deduplicated"
    shuffle: bool = False
    recompute: bool = False
    load: float = 0.0
    state_bytes: float = 12.0
    sharded: bool = False


@dataclass(frozen=True)
class Step:
    """What a step takes.

    Args:
        layout: of the devices.
        seconds: of the step, the likely; `shortest` and `longest`: by the ends of what is known of the cluster.
        compute, exchange, exposed, routing, data, tensor, bubble: parts of the likely time in seconds, the mean over
            the pipeline's ranks; `exchange` counts all of it, `exposed` what computing does not hide, `routing` what
            launching experts takes too, `bubble` the wait for the slowest rank too.
        load: rows of the fullest rank over the mean.
        memory: bytes a device.
        fits: whether the device has them.
        tokens_per_s: of a device.
        flops: model FLOP/s of a device, recomputed and padded ones not counted.
    """

    layout: Layout
    seconds: float
    shortest: float
    longest: float
    compute: float
    exchange: float
    exposed: float
    routing: float
    data: float
    tensor: float
    bubble: float
    load: float
    memory: float
    fits: bool
    tokens_per_s: float
    flops: float

    def row(self) -> dict[str, Any]:
        """For JSON and tables."""
        layout = asdict(self.layout)
        rest = {key: value for key, value in asdict(self).items() if key != "layout"}
        return {**layout, "dp": self.layout.dp, "edp": self.layout.edp, **rest}


def imbalance(tokens: float, top_k: float, ranks: int, capacity_factor: float = 0.0, load: float = 0.0) -> float:
    """Rows of the fullest rank over the mean: the given load, else 1 + sqrt(2 ln P / (T k)), what balanced choices show
    by chance; at most the capacity factor, whose rows are there whatever the load."""
    if capacity_factor:
        return 1.0
    if load:
        return min(load, float(ranks))
    return min(1 + math.sqrt(2 * math.log(ranks) / (tokens * top_k)), float(ranks)) if ranks > 1 else 1.0


def _parts(model: ModelShape, cluster: Cluster, layout: Layout, job: Job, bound: Bound) -> dict[str, float]:
    """The parts of a step's time at a bound, in seconds."""
    sequence, d = model.sequence_length, model.dim
    micro = job.micro_batch * sequence
    count = max(1.0, job.batch_tokens / (layout.dp * micro))  # micro-batches of a replica
    factor = model.capacity_factor or None
    tokens = micro / layout.tp  # of a rank, with sequence parallelism
    load = imbalance(tokens, model.top_k, layout.ep, model.capacity_factor, job.load)
    flops = model.flops(top_k=model.top_k * (factor or 1))
    passes = 4 if job.recompute else 3
    speed = cluster.flops * cluster.of("efficiency", bound)
    share = job.batch_tokens / layout.devices
    experts = passes * flops.pop("experts") * share * load / speed
    if model.experts:  # an expert with few rows takes as long as its weights take to be read
        held = model.experts / layout.ep * model.expert_matrices * 2
        read = held / cluster.memory_bandwidth * passes * count * model.sparse_layers / layout.pp
        experts = max(experts, read)
    output = passes * flops["output"] * share / speed
    compute = passes * sum(flops.values()) * share / speed + experts
    forward, backward = exchanges(job.shuffle)
    times = (forward * (2 if job.recompute else 1) + backward) / 2  # pairs of dispatch and combine

    def once(size: float) -> float:
        return cluster.exchange_seconds(
            tokens, model.top_k, model.experts, d * size, layout.ep, model.group_limit, job.form, factor, bound
        )

    layers = model.sparse_layers / layout.pp * count
    exchange = layers * times * (once(job.dispatch_bytes) + once(job.combine_bytes)) * load
    exposed = max(0.0, exchange - cluster.of("overlap", bound) * compute)
    dispatched = tokens * model.top_k * d * cluster.of("element_seconds", bound)
    launched = model.experts / layout.ep * cluster.of("expert_seconds", bound)
    routing = layers * passes * (cluster.of("layer_seconds", bound) + dispatched + launched)
    gathers = 4 * (passes - 1)  # two gathers and two scatters a layer and pass
    tensor = (
        model.layers / layout.pp * count * gathers * micro * d * 2 * (1 - 1 / layout.tp) / cluster.of("intra", bound)
    )
    busy = compute + exposed + routing + tensor
    slowest = _slowest(model.layers, layout, (busy - output) * layout.pp / model.layers, output * layout.pp)
    bubble = slowest - busy + (layout.pp - 1) / (count * layout.stages) * slowest
    data = _data_parallel(model, cluster, layout, job, count, bound)
    free = slowest - (exchange if layout.ep > cluster.node else 0)  # of the network between nodes
    data = max(data - free, data * min(1.0, layout.pp / model.layers))  # for what comes first and last all wait
    return {
        "compute": compute, "exchange": exchange, "exposed": exposed, "routing": routing, "data": data,
        "tensor": tensor, "bubble": bubble, "load": load, "seconds": busy + data + bubble,
    }  # fmt: skip


def _slowest(layers: int, layout: Layout, layer: float, output: float) -> float:
    """Seconds of the pipeline rank that takes longest: layers are whole, and the last rank has the output too."""
    if layout.pp == 1:
        return layers * layer + output
    lasts = [layout.last] if layout.last else range(layers // layout.pp + 1)
    return min(max(-(-(layers - n) // (layout.pp - 1)) * layer, n * layer + output) for n in lasts)


def _data_parallel(model: ModelShape, cluster: Cluster, layout: Layout, job: Job, count: float, bound: Bound) -> float:
    """Seconds to sum gradients over replicas and to spread parameters, before any is hidden."""
    experts = model.parameters["experts"] / (layout.pp * layout.ep)
    rest = (model.total - model.parameters["experts"]) / (layout.pp * layout.tp)
    seconds = 0.0
    for held, replicas, apart in ((experts, layout.edp, layout.ep), (rest, layout.dp, layout.tp)):
        if replicas > 1:
            within = replicas * apart <= cluster.node
            speed = cluster.of("intra" if within else "inter", bound)
            gathered = 2 * held * (1 - 1 / replicas) / speed  # bytes in two-byte numbers
            seconds += gathered * (3 * count if job.sharded else 2)
    return seconds


def _memory(model: ModelShape, layout: Layout, job: Job) -> float:
    """Bytes a device: weights and gradients in 2 + 4 bytes, the optimizer's state, which is sharded over replicas, and
    the activations of the micro-batches under way."""
    experts = model.parameters["experts"] / (layout.pp * layout.ep)
    rest = (model.total - model.parameters["experts"]) / (layout.pp * layout.tp)
    state = 0.0
    for held, replicas in ((experts, layout.edp), (rest, layout.dp)):
        state += held * ((6 / replicas if job.sharded else 6) + job.state_bytes / replicas)
    micro = job.micro_batch * model.sequence_length / layout.tp
    count = max(1.0, job.batch_tokens / (layout.dp * job.micro_batch * model.sequence_length))
    under_way = min(layout.pp, count)
    rows = model.top_k * (model.capacity_factor or 1)
    attention = 4 * model.dim + model.heads * model.head_dim + 2 * (model.kv_heads or model.heads) * model.head_dim
    sparse = rows * (2 * model.dim + 3 * model.expert_hidden) + 3 * model.shared_hidden
    dense = model.layers if model.beside_sparse else model.layers - model.sparse_layers
    numbers = model.layers * attention + model.sparse_layers * sparse + dense * 3 * model.hidden
    if job.recompute:
        numbers = model.layers * model.dim
    logits = micro * model.vocab * 4 if model.vocab else 0.0
    return state + 2 * micro * under_way * numbers / layout.pp + logits


def predict(model: ModelShape, cluster: Cluster, layout: Layout, job: Job) -> Step:
    """What a training step takes in a layout.

    Raises:
        UserError: where the layout does not divide the devices or the experts, and where the batch is less than a
            micro-batch of each replica.
    """
    if layout.devices % (layout.pp * layout.tp):
        raise UserError(f"{layout.devices} devices are no multiple of pp {layout.pp} x tp {layout.tp}")
    if (layout.dp * layout.tp) % layout.ep or (model.experts and model.experts % layout.ep):
        raise UserError(
            f"ep {layout.ep} must divide the {layout.dp * layout.tp} ranks of a stage and the {model.experts} experts"
        )
    if layout.pp > model.layers:
        raise UserError(f"pp {layout.pp} is more than the {model.layers} layers")
    if layout.last > model.layers - (layout.pp - 1):
        raise UserError(
            f"last {layout.last} leaves less than a layer for each of the {layout.pp - 1} other stages; the model has "
            f"{model.layers}"
        )
    least = layout.dp * job.micro_batch * model.sequence_length
    if job.batch_tokens < least:
        raise UserError(
            f"a batch of {job.batch_tokens:,.0f} tokens is fewer than the {least:,} of {job.micro_batch} x "
            f"{model.sequence_length:,} tokens for each of {layout.dp:,} replicas"
        )
    likely, shortest, longest = (_parts(model, cluster, layout, job, bound) for bound in ("likely", "best", "worst"))
    memory = _memory(model, layout, job)
    seconds = likely["seconds"]
    share = job.batch_tokens / layout.devices
    return Step(
        layout=layout,
        shortest=shortest["seconds"],
        longest=longest["seconds"],
        memory=memory,
        fits=memory <= cluster.memory,
        tokens_per_s=share / seconds,
        flops=3 * sum(model.flops().values()) * share / seconds,
        **likely,
    )


def _powers(most: int) -> Iterator[int]:
    size = 1
    while size <= most:
        yield size
        size *= 2


def layouts(model: ModelShape, cluster: Cluster, devices: int, job: Job) -> Iterator[Layout]:
    """Every layout of powers of two that divides the devices, the experts and the batch."""
    for pp in _powers(min(model.layers, devices)):
        for tp in _powers(min(cluster.node, devices // pp, model.kv_heads or model.heads)):
            if devices % (pp * tp):
                continue
            dp = devices // (pp * tp)
            if dp * job.micro_batch * model.sequence_length > job.batch_tokens:
                continue
            for ep in _powers(min(dp * tp, model.experts or 1)):
                if (dp * tp) % ep == 0 and (not model.experts or model.experts % ep == 0):
                    yield Layout(devices, ep, pp, tp)


def best(model: ModelShape, cluster: Cluster, devices: int, job: Job) -> Step:
    """The fastest layout that fits into memory, with and without recomputing; where none fits the one of least memory.

    Raises:
        UserError: where no layout exists.
    """
    found = [
        predict(model, cluster, layout, replace(job, recompute=recompute))
        for layout in layouts(model, cluster, devices, job)
        for recompute in ((True,) if job.recompute else (False, True))
    ]
    if not found:
        raise UserError(
            f"{devices} devices: no layout exists; a batch of {job.batch_tokens:,.0f} tokens is fewer than a sequence "
            f"of {model.sequence_length} for each replica, or {devices} is no power of two"
        )
    fitting = [step for step in found if step.fits]
    return min(fitting, key=lambda step: step.seconds) if fitting else min(found, key=lambda step: step.memory)


def sweep(model: ModelShape, cluster: Cluster, devices: Sequence[int], job: Job, weak: bool = False) -> list[Step]:
    """The best layout at each number of devices.

    Args:
        model, cluster: what and where.
        devices: the numbers.
        job: the batch of the largest number, and of all where the batch stays.
        weak: whether the batch grows with the devices (weak scaling).
    """
    most = max(devices)
    return [best(model, cluster, n, weakened(job, n, most) if weak else job) for n in devices]


def weakened(job: Job, devices: int, most: int) -> Job:
    """The job with a batch that is to the whole as so many devices are to the most."""
    return replace(job, batch_tokens=job.batch_tokens * devices / most)


def layer_seconds(
    tokens: int, dim: int, hidden: int, top_k: int, ranks: int, flops: float, latency: float, bandwidth: float,
    element: int = 4,
) -> dict[str, float]:  # fmt: skip
    """Forward and backward of one sparse layer, gated, dropless and balanced, with its experts over P ranks.

    Args:
        tokens: T of a rank.
        dim, hidden, top_k: d, f, k.
        ranks: P.
        flops: FLOP/s of a rank, as the layer reaches them alone.
        latency, bandwidth: of one exchange, in seconds and bytes/s of a rank.
        element: bytes of a number.

    Returns:
        Seconds by part: compute, exchange, and both as `seconds`.
    """
    compute = 18 * tokens * top_k * dim * hidden / flops
    leaving = tokens * top_k * (1 - 1 / ranks) * dim * element
    exchange = sum(exchanges()) * (latency + leaving / bandwidth) if ranks > 1 else 0.0
    return {"compute": compute, "exchange": exchange, "seconds": compute + exchange}
