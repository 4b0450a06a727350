"""Campaign N: known bugs put back into a copy of the package, one at a time; the tests that are named must fail."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUGS = "tests/properties/test_known_bugs.py"
RESUMING = "tests/recipes/test_resuming.py"
RANKS = "tests/parallel/test_two_ranks.py"


@dataclass(frozen=True)
class Bug:
    """A known bug.

    Args:
        what: it is, and in whose software it was.
        file: of the package.
        right: text of the file.
        wrong: in its place.
        tests: arguments of pytest.
    """

    what: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


MUSEUM = [
    # Routing and losses
    Bug(
        "the balance loss has no gradient (NeMo Automodel #1408)",
        "losses.py",
        "return routing.num_experts * (share * mean_over_tokens(probs, mask)).sum()",
        "return routing.num_experts * (share * mean_over_tokens(probs, mask)).sum().detach()",
        ("tests/moe/test_layer.py", "-k", "auxiliary_gradient"),
    ),
    Bug(
        "padding counts in the balance loss (transformers #28505)",
        "losses.py",
        "return routing.num_experts * (share * mean_over_tokens(probs, mask)).sum()",
        "return routing.num_experts * (share * mean_over_tokens(probs, None)).sum()",
        ("tests/test_losses.py",),
    ),
    Bug(
        "padding moves selection biases (torchtitan #4594)",
        "routers/topk.py",
        "self.observed += routing.demand",
        "self.observed += routing.demand\n"
        "            if context.mask is not None:\n                self.observed[0] += (~context.mask).sum()",
        (BUGS, "-k", "padding"),
    ),
    Bug(
        "padding counts in what is observed of a model (Megatron-LM #1984)",
        "hf/observe/listening.py",
        "            keep = keep & self.mask[:, None]\n",
        "            pass\n",
        (BUGS, "-k", "observed"),
    ),
    Bug(
        "a balance loss by a standard deviation has no gradient where the load is even (vmoe #218)",
        "losses.py",
        "return ((values - mean) ** 2).mean(-1) / (mean[..., 0] ** 2).clamp_min(torch.finfo(values.dtype).tiny)",
        "return (((values - mean) ** 2).mean(-1).sqrt() / mean[..., 0]) ** 2",
        ("tests/test_losses.py", "-k", "perfect_balance"),
    ),
    Bug(
        "the losses that are told add up over micro-batches (maxtext #1483)",
        "training/balance.py",
        "torch.stack(terms).mean()",
        "torch.stack(terms).sum()",
        (BUGS, "-k", "micro_batches"),
    ),
    Bug(
        "the auxiliary loss in the log adds up over its steps (maxtext #1483)",
        "training/loop.py",
        'self.window["aux_loss"] / steps',
        'self.window["aux_loss"]',
        ("tests/training/test_loop.py", "-k", "auxiliary"),
    ),
    Bug(
        "a weight that is normalised over one choice leaves the router without a gradient (minimind #858)",
        "routers/topk.py",
        'if self.renormalize == "before_drop":',
        'if self.renormalize == "before_drop" or self.top_k == 1:',
        ("tests/moe/test_layer.py", "-k", "top_1"),
    ),
    Bug(
        "weights are not normalised where the family normalises them (torchtitan #1448)",
        "routers/topk.py",
        'if self.renormalize == "before_drop":',
        'if self.renormalize == "before_drop" and self.score_after:',
        ("tests/routers/test_routers.py", "-k", "conventions"),
    ),
    Bug(
        "a recomputation counts a second time for the selection bias (torchtitan #1593)",
        "moe/routed_layer.py",
        "            if not recomputing():\n                with _outside",
        "            if True:\n                with _outside",
        ("tests/moe/test_layer.py", "-k", "counts_a_forward_once"),
    ),
    Bug(
        "an evaluation counts for the selection bias (torchtitan #4148)",
        "moe/routed_layer.py",
        "        if self.training:\n            losses = self.decider.losses(",
        "        if True:\n            losses = self.decider.losses(",
        ("tests/moe/test_layer.py", "-k", "counts_a_forward_once"),
    ),
    Bug(
        "one layer without a bias keeps the others from theirs (torchtitan #3686)",
        "moe/whole_model.py",
        "        layer.decider.update()\n",
        '        if getattr(layer.decider, "observed", None) is None:\n            return\n'
        "        layer.decider.update()\n",
        (BUGS, "-k", "does_not_keep_others"),
    ),
    Bug(
        "selection biases move away from balance",
        "routers/topk.py",
        "(self.observed.mean() - self.observed).sign()",
        "(self.observed - self.observed.mean()).sign()",
        (BUGS, "-k", "does_not_keep_others"),
    ),
    Bug(
        "a selection bias is rounded to bfloat16 with the model (Megatron-LM #1482)",
        "routers/base.py",
        "self._buffers[name] = before.to(after.device)",
        "pass",
        ("tests/routers/test_routers.py", "-k", "selection_bias"),
    ),
    Bug(
        "NaN chooses one expert twice (vLLM #39391)",
        "routers/base.py",
        "_by_keys(scores[~clear], k))",
        "_by_keys(scores[~clear], k) * ~scores[~clear].isnan().any(-1, keepdim=True))",
        ("tests/routers/test_routers.py", "-k", "rows_of_nan"),
    ),
    Bug(
        "ties in any order (torchtitan #3600)",
        "routers/base.py",
        "torch.topk((ordered << 32) | columns, k, dim=-1).indices",
        "torch.topk(scores, k, dim=-1).indices",
        ("tests/routers/test_routers.py", "-k", "ties"),
    ),
    # Products
    Bug(
        "rows behind the last group are uninitialised (PyTorch #154557)",
        "experts/backends/grouped_mm.py",
        "(routing.offsets[1:].to(torch.int32),)",
        "((routing.offsets[1:] - routing.offsets[1:].eq(routing.offsets[-1]).long()).to(torch.int32),)",
        ("tests/experts/backends/test_backends.py", "-k", "edges and grouped_mm"),
    ),
    Bug(
        "a slot without a token repeats another expert's, and zero times NaN is NaN (torchtitan #1237)",
        "experts/backends/padded.py",
        "row = routing.offsets[:-1].clamp(max=max(bounds[-1] - 1, 0)).repeat_interleave(slots_of, output_size=base)",
        "row = triple.new_zeros(base)",
        ("tests/experts/backends/test_backends.py", "-k", "broken_token"),
    ),
    Bug(
        "the gradients of an expert without tokens are uninitialised (grouped_gemm #36)",
        "experts/backends/padded.py",
        "gradient[plan.layout.idle] = 0",
        "pass",
        ("tests/experts/backends/test_backends.py", "-k", "uninitialised"),
    ),
    Bug(
        "numbers of experts in 16 bits",
        "routing.py",
        "_sort_by_expert(index.reshape(-1), num_experts)",
        "_sort_by_expert(index.reshape(-1).to(torch.int16), num_experts)",
        (BUGS, "-k", "small_integer"),
    ),
    Bug(
        "offsets of 32 bits in a kernel (sglang #4727, Liger-Kernel #1248)",
        "experts/backends/triton/kernels.py",
        ".to(tl.int64)",
        "",
        (BUGS, "-k", "offsets_beyond"),
    ),
    Bug(
        "numbers of experts that there are not are taken (aiter #2644)",
        "hf/backend.py",
        "if low < 0 or high > num_experts:",
        "if False:",
        ("tests/hf/test_backend.py", "-k", "out_of_range"),
    ),
    # Several processes
    Bug(
        "the experts' gradients are as many times too large as there are ranks (PyTorch #160285)",
        "parallel/experts.py",
        "_Scaled.apply(local, 1 / self.size)",
        "_Scaled.apply(local, 1.0)",
        (RANKS,),
    ),
    Bug(
        "the norm of the gradients is that of one rank's experts (Megatron-LM #5916)",
        "parallel/fsdp.py",
        "get_total_norm([p.grad for p in group])",
        'get_total_norm([getattr(p.grad, "_local_tensor", p.grad) for p in group])',
        (RANKS,),
    ),
    Bug(
        "the experts' gradients are averaged over all ranks, not over those that hold them (Megatron-LM #1628)",
        "parallel/fsdp.py",
        'mesh["edp"].get_group() if sharded else dist.group.WORLD',
        "dist.group.WORLD",
        (RANKS,),
    ),
    Bug(
        "the gradients of the rest are averaged over the ranks that hold the same experts alone (torchtitan #4054)",
        "parallel/fsdp.py",
        'mesh["edp"].get_group() if sharded else dist.group.WORLD',
        'mesh["edp"].get_group()',
        (RANKS,),
    ),
    Bug(
        "the router has no gradient through what other ranks compute (transformers #48205)",
        "parallel/dispatch.py",
        "self.sender.group, place), self.routing)",
        "self.sender.group, place), self.routing.with_weight(self.routing.weight.detach()))",
        (RANKS,),
    ),
    Bug(
        "counts of one rank move the biases of that rank (torchtitan #4245)",
        "routers/topk.py",
        "sum_over_ranks(self.observed, group=self.process_group)",
        "pass",
        ("tests/properties/test_ranks.py",),
    ),
    Bug(
        "replicas that differ are trained on (Megatron-Bridge #5396)",
        "parallel/experts.py",
        "        if other == every[0]:",
        "        if True:",
        (RANKS,),
    ),
    Bug(
        "a rank without tokens stays out of the exchange (DeepSpeed #5066)",
        "parallel/experts.py",
        "        routing = self.placed(routing)\n",
        "        routing = self.placed(routing)\n        if not len(routing.token):\n            return x * 0\n",
        (RANKS,),
    ),
    Bug(
        "a random order of capacity is another under checkpointing (NeMo Automodel #3325)",
        "capacity.py",
        "torch.randperm(routing.num_tokens, device=routing.token.device)",
        'torch.tensor(__import__("random").sample(range(routing.num_tokens), routing.num_tokens))',
        (BUGS, "-k", "random_order"),
    ),
    Bug(
        "each rank decides by itself whether to skip (WeatherGenerator #2724)",
        "training/guards.py",
        "dist.all_reduce(values)",
        "pass",
        ("tests/training/test_guards.py", "-k", "all_ranks"),
    ),
    Bug(
        "gradients that are not finite reach the optimizer (torchtitan #3863)",
        "training/guards.py",
        "bool(torch.as_tensor(norm).isfinite().all())",
        "True",
        ("tests/training/test_guards.py", "-k", "planted or gradients_that"),
    ),
    Bug(
        "a skipped step moves the routers' state",
        "training/guards.py",
        "            buffer.copy_(before)\n",
        "            pass\n",
        ("tests/training/test_guards.py", "-k", "planted"),
    ),
    # Checkpoints and formats
    Bug(
        "a checkpoint has the experts of one rank (KempnerForge #202)",
        "parallel/checkpoint.py",
        "dcp.save(tensors, ",
        'dcp.save({name: getattr(value, "_local_tensor", value) for name, value in tensors.items()}, ',
        (RANKS,),
    ),
    Bug(
        "the optimizer's moments are not loaded (KempnerForge #115)",
        "parallel/checkpoint.py",
        "set_optimizer_state_dict(model, optimizer, placed, options=_OPTIONS)",
        "pass",
        (RANKS,),
    ),
    Bug(
        "a resumed run begins anew in silence (KempnerForge #115)",
        "training/loop.py",
        "str(checkpoint) if checkpoint else None",
        "None",
        (RESUMING, "-k", "damaged_checkpoint"),
    ),
    Bug(
        "square weights are taken for their transposes (transformers #47031)",
        "hf/blocks.py",
        "return isinstance(self.linear, Conv1D)",
        "return isinstance(self.linear, Conv1D) and self.linear.weight.shape[0] != self.linear.weight.shape[1]",
        (BUGS, "-k", "square"),
    ),
    Bug(
        "square experts are taken for their transposes (transformers #47031)",
        "hf/backend.py",
        "    if module.is_transposed:\n        up, down",
        "    if module.is_transposed and up.shape[1] != up.shape[2]:\n        up, down",
        (BUGS, "-k", "square"),
    ),
    Bug(
        "the log is ahead of the checkpoint after a kill",
        "training/loop.py",
        '        self.metrics.replace(self.name, memory["metrics"])\n',
        "",
        (RESUMING, "-k", "torn_lost_or_ahead"),
    ),
    Bug(
        "what a line of the log adds up begins anew with a second resumption (torchtitan #3908)",
        "training/loop.py",
        'memory["seconds"], memory["window"]',
        'memory["seconds"], self.window',
        ("tests/recipes/test_text.py", "-k", "stopped_and_resumed"),
    ),
    Bug(
        "a flipped bit is loaded (torch.distributed.checkpoint)",
        "durable.py",
        " or _entry(file, sync=False) != entry",
        "",
        ("tests/test_durable.py", "-k", "flipped"),
    ),
    Bug(
        "a shard outside of the folder is read (transformers #46097)",
        "untrusted.py",
        "if not real.is_relative_to(folder) and not cached:",
        "if False:",
        ("tests/hf/checkpoints/test_loading.py", "-k", "says_it_too and link"),
    ),
]


def museum(result, folder, cases, seed):
    """N: each bug is found by the tests that are named beside it."""
    command = [sys.executable, "-m", "tests.campaigns.preloaded"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=variables, **pipes) as server:
        for case in cases:
            if case >= len(MUSEUM):
                break
            bug, copy = MUSEUM[case], Path(folder) / f"museum-{case}"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(ROOT / "src", copy)
            file = copy / "shunter" / bug.file
            text = file.read_text()
            if bug.right not in text:
                result.count(case, f"{bug.what}: {bug.file} has changed; put the bug elsewhere")
                continue
            file.write_text(text.replace(bug.right, bug.wrong))
            print(json.dumps([str(copy), *bug.tests]), file=server.stdin, flush=True)
            code = int(server.stdout.readline())
            found = code == 1 or code < 0  # a test failed, or the bug ended the process
            result.count(case, "" if found else f"{bug.what}: exit code {code}", detected=True)
            shutil.rmtree(copy)
