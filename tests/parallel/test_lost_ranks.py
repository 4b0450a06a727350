"""A rank that is killed, stopped or elsewhere ends in an error that names it, within the timeout."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from tests.helpers import TIME_LIMIT

SCRIPT = """
import os, signal, sys, time
import torch
from shunter import MoE, parallel
from shunter.errors import LostRank
from shunter.parallel import watch

watch.PERIOD, watch.SILENCE = 0.2, 2.0
case, where, timeout = sys.argv[1:]
torch.set_num_threads(1)
mesh = parallel.mesh(expert_parallel=2, timeout=float(timeout))
torch.manual_seed(0)
moe = parallel.shard_experts(MoE(8, 8, 4, "topk"), mesh)


def lose():
    if case == "elsewhere":
        time.sleep(600)
    os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[case])


try:
    for step in range(10_000):
        lost = step == 3 and os.environ["RANK"] == "1"
        if lost and where == "forward":
            lose()
        y = moe(torch.randn(3, 8))
        if lost:
            lose()
        y.sum().backward()
except LostRank as error:
    print("LOST", error, flush=True)
    os._exit(3)
"""


def _run(case, where, timeout=4.0):
    """What rank 0 says when rank 1 is lost before its forward, or its backward; and the process of rank 1."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = []
    try:
        for rank in range(2):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
            environment = os.environ | {key: str(value) for key, value in variables.items()}
            arguments = [sys.executable, "-c", SCRIPT, case, where, str(timeout)]
            processes.append(
                subprocess.Popen(
                    arguments, env=environment | {"MASTER_ADDR": "localhost"}, stdout=subprocess.PIPE, text=True
                )
            )
        first = processes[0]
        out, _ = first.communicate(timeout=TIME_LIMIT)
        assert first.returncode == 3, out
        return out.splitlines()[-1], processes[1].pid
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


def _names(said, pid, state):
    assert said.startswith("LOST") and f"rank 1 (process {pid} on " in said and state in said, said


def test_a_killed_rank_is_named():
    said, pid = _run("killed", "forward")
    _names(said, pid, "gives no sign of life: it was killed, or is stopped")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("case, state", [("stopped", "no sign of life"), ("elsewhere", "lives, and has not come to")])
def test_a_stopped_rank_and_one_that_is_elsewhere_are_named(case, state, where):
    said, pid = _run(case, where)
    _names(said, pid, state)
