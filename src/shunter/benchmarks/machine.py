"""What every benchmark says of where it ran."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .. import __version__

__all__ = ["described", "machine", "versions"]


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
    found = {"python": platform.python_version(), "torch": torch.__version__, "shunter": __version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def described(found: dict[str, Any]) -> str:
    """The `machine` and `versions` of a benchmark's result, in words."""
    where = found["machine"]
    gpu = f"{where['gpu']['name']} (CUDA {where['gpu']['cuda']}), " if "gpu" in where else ""
    processor = f"{where['processor']}, {where['threads']} threads ({where['instructions']})"
    return f"{gpu}{processor}; " + ", ".join(f"{name} {value}" for name, value in found["versions"].items())
