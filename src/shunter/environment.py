"""Where and with what a number was made: machine, package versions, the memory of this process."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["VERSION", "Memory", "described", "machine", "peak_rss_bytes", "run_versions", "versions"]


try:
    VERSION = version("shunter")
except PackageNotFoundError:  # run from a source folder
    VERSION = "0+unknown"


def machine() -> dict[str, Any]:
    """The processor, its cores, torch's threads and instruction set, the system, and the GPU where there is one."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        **({"gpu": _gpu()} if torch.cuda.is_available() else {}),
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python, torch, Shunter, and those packages that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "shunter": VERSION}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def run_versions() -> dict[str, str]:
    """Those of Python, the platform and the packages that a trained model depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("shunter", "torch", "transformers", "accelerate", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def described(found: dict[str, Any]) -> str:
    """The `machine` and `versions` of a benchmark's result, in words."""
    where = found["machine"]
    gpu = f"{where['gpu']['name']} (CUDA {where['gpu']['cuda']}), " if "gpu" in where else ""
    processor = f"{where['processor']}, {where['threads']} threads ({where['instructions']})"
    return f"{gpu}{processor}; " + ", ".join(f"{name} {value}" for name, value in found["versions"].items())


class Memory:
    """The resident memory of this process above what it was at first, as far as `note` sees it.

    Attributes:
        peak: the most, in bytes.
    """

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._start = self._process.memory_info().rss
        self.peak = 0

    def note(self) -> None:
        """Look at the present memory."""
        self.peak = max(self.peak, self._process.memory_info().rss - self._start)


def _reset_peak_rss() -> None:
    # Linux keeps a high-water mark that a process may reset; elsewhere the peak is that of the whole process.
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_rss_bytes() -> int:
    """The peak resident memory of this process in bytes, since the last reset where the system can reset it."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
