"""What torchrun started in, the mesh of its processes out."""

from __future__ import annotations

import atexit
import logging
import math
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from ..errors import LostRank, UserError
from . import watch

__all__ = ["join", "launch", "mesh"]

TIMEOUT = 600.0


def mesh(expert_parallel: int = 1, *, timeout: float = TIMEOUT) -> DeviceMesh:
    """The ranks as a mesh of ("edp", "ep"): those of a row hold different experts, those of a column the same.

    Joins the processes that torchrun started where nobody has; alone it makes a group of one.

    Args:
        expert_parallel: P, how many ranks share the experts among them.
        timeout: seconds that a rank waits for the others in an exchange before it raises `LostRank`.

    Raises:
        UserError: where P does not divide the number of ranks.
    """
    if not dist.is_initialized():
        join(timeout)
    size = dist.get_world_size()
    if expert_parallel < 1 or size % expert_parallel:
        raise UserError(
            f"{size} process{'es' if size > 1 else ''} cannot share experts in groups of {expert_parallel}: "
            "expert_parallel must divide their number"
        )
    kind = "cuda" if "nccl" in str(dist.get_backend()) else "cpu"
    shape = (size // expert_parallel, expert_parallel)
    made = init_device_mesh(kind, shape, mesh_dim_names=("edp", "ep"))
    for group in (dist.group.WORLD, *made.get_all_groups()):
        _set_pg_timeout(timedelta(seconds=timeout), group)
    watch.begin()
    return made


def join(timeout: float) -> None:
    """Make the group of the processes that torchrun started, or of this one alone."""
    if not dist.is_available():
        raise UserError("this build of torch has no torch.distributed")
    limit = timedelta(seconds=timeout)
    if "RANK" not in os.environ:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    elif torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=limit)
    else:
        dist.init_process_group("gloo", timeout=limit)
    atexit.register(_leave)


def _leave() -> None:
    """End the group before the interpreter does: its threads would be found running, and the process aborted."""
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(processes: int, command: Callable[[], list[str]], *, timeout: float = TIMEOUT, restarts: int = 0) -> int:
    """Run Python in several processes of this machine, as torchrun would; returns an exit status.

    Where a process is lost all end, and all start again.

    Args:
        processes: how many.
        command: gives the arguments of Python, each time they start.
        timeout: seconds that they may take to end, after Ctrl-C to write a checkpoint; they are killed then.
        restarts: how often they start again at most.

    Raises:
        LostRank: naming the first process that ended otherwise than by an error that it has told itself.
    """
    done = 0
    while True:
        try:
            status, why = _run(processes, command(), timeout), "a process was lost"
        except LostRank as lost:
            if done == restarts:
                raise
            status, why = LostRank.status, str(lost)
        if status != LostRank.status:
            return status
        if done == restarts:
            return 1
        done += 1
        print(f"{why}; starting again, {done} of {restarts} times", file=sys.stderr, flush=True)


def _run(processes: int, arguments: list[str], timeout: float) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # A store of its own for each group: the launcher's would outlive a killed rank with that rank's addresses in it.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(math.ceil(timeout)))
    config = LaunchConfig(
        1, 1, processes, run_id=str(os.getpid()), rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    logging.disable(
        logging.ERROR
    )  # what the launcher says of signals and failures, from loggers with levels of their own
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except SignalException:
        return 130
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return int(failure.exitcode)
        killed = signal.Signals(-failure.exitcode).name
        raise LostRank(f"rank {rank} of {processes}, process {failure.pid}, was killed by {killed}") from None
    finally:
        logging.disable(logging.NOTSET)
    return 0
