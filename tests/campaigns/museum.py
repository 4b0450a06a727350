"""Campaign N: known bugs put back into a copy of the package, one at a time; the tests that are named must fail."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import TIME_LIMIT

ROOT = Path(__file__).parents[2]
BUGS = "tests/properties/test_known_bugs.py"
RESUMING = "tests/recipes/test_resuming.py"


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
    Bug(
        "the balance loss has no gradient (NeMo Automodel #1408)",
        "losses.py",
        "return routing.num_experts * (share * mean_over_tokens(probs, mask)).sum()",
        "return routing.num_experts * (share * mean_over_tokens(probs, mask)).sum().detach()",
        ("tests/test_losses.py", "tests/test_moe.py", "-k", "balanc or aux or gradient"),
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
        "counts of one rank move the biases of that rank (torchtitan #4245)",
        "routers/topk.py",
        "sum_over_ranks(self.observed, group=self.process_group)",
        "pass",
        ("tests/properties/test_ranks.py",),
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
        "ties in any order (torchtitan #3600)",
        "routers/base.py",
        "torch.topk((ordered << 32) | columns, k, dim=-1).indices",
        "torch.topk(scores, k, dim=-1).indices",
        ("tests/routers/test_routers.py",),
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
        "dist.all_reduce(flag, op=dist.ReduceOp.MAX)",
        "pass",
        ("tests/training/test_guards.py", "-k", "all_ranks"),
    ),
    Bug(
        "gradients that are not finite reach the optimizer (torchtitan #3863)",
        "training/guards.py",
        "bad |= not bool(torch.as_tensor(norm).isfinite().all())",
        "pass",
        ("tests/training/test_guards.py", "-k", "planted or gradients_that"),
    ),
    Bug(
        "a skipped step moves the routers' state",
        "training/guards.py",
        "                buffer.copy_(before)\n",
        "                pass\n",
        ("tests/training/test_guards.py", "-k", "planted"),
    ),
    Bug(
        "a resumed run begins anew in silence (KempnerForge #115)",
        "training/loop.py",
        "str(checkpoint) if checkpoint else None",
        "None",
        (RESUMING, "-k", "damaged_checkpoint"),
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
        "hf/checkpoints/reading.py",
        "if real.parent != folder and not cached:",
        "if False:",
        ("tests/hf/checkpoints/test_loading.py", "-k", "says_it_too and link"),
    ),
]


def museum(result, folder, cases, seed):
    """N: each bug is found by the tests that are named beside it."""
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
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *bug.tests]
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=5 * TIME_LIMIT,
            check=False,
        )
        found = ended.returncode == 1 or ended.returncode < 0  # a test failed, or the bug ended the process
        result.count(case, "" if found else f"{bug.what}: exit code {ended.returncode}", detected=True)
        shutil.rmtree(copy)
