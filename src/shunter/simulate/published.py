"""Published measurements next to what the simulator says of them, with each figure that was fitted, and to which row.

A row that served a fit says nothing of the simulator and is marked; the others are predictions. Figures: DeepEP,
docs/legacy.md at 0297fc80; Megatron-MoE-ModelZoo, best_practice/Qwen3/readme.md at c1ad0b5c; arXiv 2412.19437 (hours of
training by recollection), 2101.03961 (table 1), 2006.16668.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..ranks import rows_to_ranks
from .clusters import Cluster, load_cluster
from .shapes import ModelShape, load_model
from .step import Job, Layout, predict
from .volumes import exchanges, rows_between_nodes

__all__ = ["TOLERANCE", "Row", "check", "layers_of_bench"]

TOLERANCE = 0.2
"""The relative error up to which a prediction counts as right."""


@dataclass(frozen=True)
class Row:
    """A published figure.

    Args:
        source, what, unit: of the figure.
        measured, predicted: it, and what the simulator says.
        fitted: whether a figure of the simulator was fitted to it.
        note: what is known of a prediction that fails.
    """

    source: str
    what: str
    unit: str
    measured: float
    predicted: float
    fitted: bool = False
    note: str = ""

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted / self.measured - 1

    @property
    def within(self) -> bool:
        """Whether the prediction is right."""
        return abs(self.error) <= TOLERANCE


def check() -> list[Row]:
    """All rows."""
    return [*_deepep(), *_low_latency(), *_gpu_steps(), *_switch()]


def _deepep() -> list[Row]:
    """Exchanges of 4096 tokens, d 7168, top-8 of 256 experts in up to 4 nodes of 8. The reported bandwidth counts rows
    to the own rank and node, which move nowhere. Fitted: bytes/s inside a node and between nodes."""
    tokens, k, experts, dim, node, limit = 4096, 8, 256, 7168, 8, 4
    measured = {8: (153, 158), 16: (43, 43), 32: (58, 57), 64: (51, 50)}

    def logical(ranks: int) -> float:
        if ranks == node:
            return rows_to_ranks(k, experts, node)
        return rows_to_ranks(k, experts, ranks // node, min(limit, ranks // node))

    def moved(ranks: int) -> tuple[float, float]:
        nodes = ranks // node
        inside = rows_to_ranks(k, experts, ranks, min(nodes, limit) * node) * (1 - 1 / node)
        return rows_between_nodes(k, experts, nodes, limit), inside

    intra = measured[8][0] * moved(8)[1] / logical(8)
    inter = measured[64][0] * moved(64)[0] / logical(64)
    cluster = replace(load_cluster("h800"), intra=(intra * 1e9,) * 3, inter=(inter * 1e9,) * 3, latency=(0.0,) * 3)
    rows = []
    for ranks, values in measured.items():
        for name, value, size in zip(("dispatch", "combine"), values, (1, 2), strict=True):
            seconds = cluster.exchange_seconds(tokens, k, experts, dim * size, ranks, limit if ranks > node else 0)
            said = tokens * logical(ranks) * dim * size / seconds / 1e9
            fitted = name == "dispatch" and ranks in (8, 64)
            rows.append(Row("DeepEP, H800", f"{name} over {ranks} ranks", "GB/s", value, said, fitted))
    return rows


def _low_latency() -> list[Row]:
    """Exchanges of 128 tokens, each choice a row, all of a node's rows by its own network. Fitted: latency, bytes/s
    inside a node and between nodes."""
    ranks = (8, 16, 32, 64, 128, 256)
    dispatch, combine = (77, 118, 155, 173, 192, 194), (114, 195, 273, 314, 369, 360)
    sizes = {"dispatch": 128 * 8 * (7168 + 224), "combine": 128 * 8 * 14336}
    intra = (sizes["combine"] - sizes["dispatch"]) / (combine[0] - dispatch[0])  # bytes a microsecond
    latency = dispatch[0] - sizes["dispatch"] / intra
    inter = (1 - 8 / 256) * sizes["dispatch"] / (dispatch[-1] - latency)
    rows = []
    for name, values in (("dispatch", dispatch), ("combine", combine)):
        for p, value in zip(ranks, values, strict=True):
            said = latency + max((1 - 8 / p) * sizes[name] / inter, 8 / p * sizes[name] / intra)
            fitted = p == 8 or (p == 256 and name == "dispatch")
            rows.append(Row("DeepEP low latency, H800", f"{name} over {p} ranks", "µs", value, said, fitted))
    return rows


def _gpu_steps() -> list[Row]:
    """Steps of Qwen3-235B-A22B on 256 H100, and the training of DeepSeek-V3. Fitted: efficiency to the first row,
    overlap to the second, the seconds of launching an expert to the last.

    Layers of the last stage are those of the published configuration, which counts embedding and output as a layer
    each of 96.
    """
    source = "Megatron-MoE-ModelZoo, Qwen3-235B-A22B, 256 H100"
    qwen, job = load_model("qwen3-235b-a22b"), Job(2048 * 4096)
    wide, narrow = Layout(256, 32, 8, 2, 4, last=11), Layout(256, 8, 8, 4, 4, last=11)
    plain = replace(load_cluster("h100"), overlap=(0.0,) * 3)

    def seconds(cluster: Cluster, layout: Layout, job: Job = job) -> float:
        return predict(qwen, cluster, layout, job).seconds

    def launching(each: float) -> Cluster:
        """With so many seconds of an expert, and the efficiency that the first row then has."""
        cluster = replace(plain, expert_seconds=(each,) * 3)
        efficiency = _solve(lambda e: seconds(replace(cluster, efficiency=(e,) * 3), wide), 19.7, 0.1, 0.9)
        return replace(cluster, efficiency=(efficiency,) * 3)

    plain = launching(_solve(lambda each: -seconds(launching(each), narrow), -29.0, 0.0, 1e-3))
    phi = _solve(lambda x: seconds(replace(plain, overlap=(x,) * 3), wide), 17.6, 0.0, 1.0)
    hidden = replace(plain, overlap=(phi,) * 3)
    sharded = replace(job, recompute=True, micro_batch=4, sharded=True)
    deep = Layout(256, 8, 32, 2, 3, last=2)
    rows = [
        Row(source, "EP32 PP8 TP2", "s", 19.7, seconds(plain, wide), True),
        Row(source, "EP32 PP8 TP2, overlapped", "s", 17.6, seconds(hidden, wide), True),
        Row(source, "EP8 TP2, FSDP, recomputed", "s", 17.6, seconds(plain, Layout(256, 8, 1, 2), sharded)),
        Row(source, "EP8 PP32 TP2, plain all-to-all", "s", 24.2, seconds(plain, deep, replace(job, form="flat"))),
        Row(source, "EP8 PP8 TP4", "s", 29.0, seconds(plain, narrow), True),
    ]
    deepseek = load_model("deepseek-v3")
    left = plain.of("efficiency") * (1 - 20 / 132)  # DualPipe hides exchanges, on 20 of 132 multiprocessors
    h800 = replace(
        load_cluster("h800"), efficiency=(left,) * 3, expert_seconds=plain.expert_seconds, overlap=(1.0,) * 3
    )
    step = predict(deepseek, h800, Layout(2048, 64, 16, 1, 2), Job(15360 * 4096, dispatch_bytes=1))
    rows.append(Row("DeepSeek-V3, 2048 H800", "EP64 PP16", "tokens/s a GPU", 1543, step.tokens_per_s))
    return rows


def _solve(function: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where a falling function has a value."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > wanted else (low, middle)
    return middle


def _switch() -> list[Row]:
    """Examples a second of Switch-Base and T5 on 32 cores, and steps of GShard's largest on 2048. Fitted: efficiency to
    T5-Base, the cost of dispatching an element to Switch at capacity factor 1, that of a second choice to top-2 there.

    An expert has F T / E slots in the program that was timed, however many a token chooses
    (mesh_tensorflow/transformer/moe.py at 01231bb0): top-2 computes no more rows than top-1.
    """
    source, cluster = "Switch Transformers, table 1, 32 TPU v3 cores", load_cluster("tpu-v3")
    encoded, decoded, cores = 512, 114, 32  # tokens of an example

    def flops(model: ModelShape) -> float:
        attention, block = model.attention_matrices, model.dense_matrices
        scores = 2 * model.heads * model.head_dim * 2
        return (
            2 * model.encoder_layers * (attention + block) * encoded
            + 2 * model.decoder_layers * (2 * attention + block) * decoded
            + 2 * model.vocab * model.dim * decoded
            + scores * (model.encoder_layers * encoded**2 + model.decoder_layers * decoded * (decoded / 2 + encoded))
        )

    base, large, sparse = (load_model(name) for name in ("t5-base", "t5-large", "switch-base"))
    speed = 3 * flops(base) * 1600 / cores  # fitted
    visits = sparse.sparse_layers / 2 * (encoded + decoded)
    more = 3 * 2 * visits * sparse.expert_matrices / speed  # of one more row a token
    fixed = cores / 1000 - cores / 1600  # fitted: what routing and dispatching one choice take
    element = fixed / (3 * visits * sparse.dim)
    second = cores / 860 - cores / 1000  # fitted: what a second choice takes

    def examples(factor: float, top_k: int = 1) -> float:
        return cores / (cores / 1600 + fixed + (top_k - 1) * second + (factor - 1) * more)

    rows = [
        Row(source, "T5-Base", "examples/s", 1600, cores * speed / (3 * flops(base)), True),
        Row(source, "T5-Large", "examples/s", 470, cores * speed / (3 * flops(large))),
        Row(source, "Switch-Base, CF 1", "examples/s", 1000, examples(1), True),
        Row(source, "Switch-Base, CF 1.25", "examples/s", 910, examples(1.25)),
        Row(source, "Switch-Base, CF 2", "examples/s", 860, examples(2)),
        Row(source, "MoE-Base, top-2, CF 1", "examples/s", 860, examples(1, 2), True),
        Row(source, "MoE-Base, top-2, CF 1.25", "examples/s", 790, examples(1.25, 2)),
        Row(source, "MoE-Base, top-2, CF 2", "examples/s", 840, examples(2, 2)),
    ]  # fmt: skip
    cluster = replace(
        cluster, efficiency=(speed / cluster.flops,) * 3, element_seconds=(element,) * 3, latency=(0.0,) * 3
    )
    gshard = predict(load_model("gshard-600b"), cluster, Layout(2048, 2048), Job(4 * 2**20, micro_batch=16))
    rows.append(Row("GShard 600B, 2048 TPU v3 cores", "a step of 4 M tokens", "steps/s", 0.72, 1 / gshard.seconds))
    return rows


def layers_of_bench(found: dict[str, Any]) -> list[Row]:
    """The expert-parallel layers of `shunter bench parallel` next to predictions, in ms.

    Computing takes what it takes in the same run without expert parallelism; latency and bandwidth of an exchange are
    fitted to the other shapes of the run.

    Args:
        found: what bench-parallel.json holds, of three shapes or more.

    Raises:
        ValueError: for fewer.
    """
    import numpy as np

    ranks, cases = found["processes"], found["cases"]
    if len(cases) < 3:
        raise ValueError(f"{len(cases)} shapes; a latency and a bandwidth are fitted to two others")
    count = sum(exchanges())
    sent = [case["bytes_sent"] / 2**20 for case in cases]
    plain = [case["results"]["data parallel"]["ms"] for case in cases]
    measured = [case["results"]["expert parallel"]["ms"] for case in cases]
    rows = []
    for i, case in enumerate(cases):
        others = [j for j in range(len(cases)) if j != i]
        known = np.array([[count, sent[j]] for j in others])
        more = np.array([measured[j] - plain[j] for j in others])
        cost = np.linalg.lstsq(known, more, rcond=None)[0]
        if cost.min() < 0:  # neither a latency nor a bandwidth is negative: one of them explains all
            alone = [known[:, k] @ more / (known[:, k] @ known[:, k]) for k in range(2)]
            left = [((more - alone[k] * known[:, k]) ** 2).sum() for k in range(2)]
            cost = np.array([alone[0], 0.0]) if left[0] <= left[1] else np.array([0.0, alone[1]])
        said = plain[i] + float(cost.clip(0) @ np.array([count, sent[i]]))
        rows.append(Row("shunter bench parallel", f"{case['name']} on {ranks} processes", "ms", measured[i], said))
    return rows
