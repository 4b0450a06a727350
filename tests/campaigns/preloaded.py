"""A process that has the tests' libraries and not Shunter: pytest runs with a copy of Shunter in forks of it.

It reads lines of JSON, the folder of the copy and pytest's arguments, and writes the exit code of each: minus the
number of a signal, or `HUNG`. The libraries take longer to load than most tests to run.
"""

import importlib
import json
import os
import signal
import sys
import time

HUNG = 99
LIMIT = 600.0  # seconds
LIBRARIES = ["pytest", "hypothesis", "torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
LIBRARIES += ["transformers", "transformers.trainer", "transformers.models.llama.modeling_llama"]


def main():
    """Serve until the input ends."""
    for name in LIBRARIES:
        importlib.import_module(name)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _test(*json.loads(line))
        print(_code(pid), flush=True)


def _test(copy, *arguments):
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)
    sys.path.insert(0, copy)
    os.environ["PYTHONPATH"] = copy
    code = 1
    try:
        code = importlib.import_module("pytest").main(["-q", "-x", "-p", "no:cacheprovider", *arguments])
    finally:
        os._exit(code)


def _code(pid):
    """The exit code of a child, which ends with all that it started."""
    since = time.monotonic()
    while time.monotonic() - since < LIMIT:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return HUNG


if __name__ == "__main__":
    main()
