"""A rank that is killed, stopped or elsewhere ends in an error that names it, within the timeout."""

import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch
from torch.distributed.distributed_c10d import _set_pg_timeout

from shunter import MoE, parallel
from shunter.errors import LostRank
from shunter.parallel import watch
from tests.helpers import TIME_LIMIT


def _on_rank(rank, port, case, where, timeout, heard):
    """Train until rank 1 is lost; the first rank tells what error it had then."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in variables.items()})
    # One that is elsewhere must have time for a sign of life, on a machine with more to do than it can.
    watch.PERIOD, watch.SILENCE = 0.2, 10.0 if case == "elsewhere" else 2.0
    torch.set_num_threads(1)
    mesh = parallel.mesh(expert_parallel=2, timeout=TIME_LIMIT)
    torch.manual_seed(0)
    # Not the compiled loops, whose threads do not survive a fork.
    moe = parallel.shard_experts(MoE(8, 8, 4, "topk", "reference"), mesh)

    def wait_for_little():
        """From the exchange on to which the other rank does not come; before, a slow rank is no lost one."""
        for group in mesh.get_all_groups():
            _set_pg_timeout(timedelta(seconds=timeout), group)

    def lose():
        if case == "elsewhere":
            time.sleep(600)
        os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[case])

    try:
        for step in range(10_000):
            lost = step == 3 and rank == 1
            waits = step == 3 and rank == 0
            if lost and where == "forward":
                lose()
            if waits and where == "forward":
                wait_for_little()
            y = moe(torch.randn(3, 8))
            if lost:
                lose()
            if waits:
                wait_for_little()
            y.sum().backward()
    except LostRank as error:
        if rank == 0:
            heard.send(str(error))
        os._exit(3)


def _run(case, where, timeout=4.0):
    """What rank 0 says when rank 1 is lost before its forward, or its backward; and the process of rank 1."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    here, heard = context.Pipe(duplex=False)
    processes = [context.Process(target=_on_rank, args=(rank, port, case, where, timeout, heard)) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        assert here.poll(TIME_LIMIT), "the first rank says nothing"
        said = here.recv()
        processes[0].join(TIME_LIMIT)
        assert processes[0].exitcode == 3
        return said, processes[1].pid
    finally:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGCONT)
                process.kill()
            process.join()


def _names(said, pid, state):
    assert f"rank 1 (process {pid} on " in said and state in said, said


def test_a_killed_rank_is_named():
    said, pid = _run("killed", "forward")
    _names(said, pid, "gives no sign of life: it was killed, or is stopped")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("case, state", [("stopped", "no sign of life"), ("elsewhere", "lives, and has not come to")])
def test_a_stopped_rank_and_one_that_is_elsewhere_are_named(case, state, where):
    said, pid = _run(case, where)
    _names(said, pid, state)
