"""The module that an import did not find to the package and the extra to install."""

from __future__ import annotations

import re
from importlib import metadata

__all__ = ["not_installed"]

DISTRIBUTIONS = {
    "PIL": "pillow",
    "espeakng_loader": "espeakng-loader",
    "faiss": "faiss-cpu",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Packages to install, by the module that is imported, where the names differ."""


def not_installed(module: str) -> str:
    """What to install for a module of another package, by this package's metadata; empty for any other module."""
    package = DISTRIBUTIONS.get(module.split(".")[0], module.split(".")[0])
    extras = [
        extra
        for line in metadata.requires("shunter") or []
        for name, extra in re.findall(r"^([\w.-]+).*extra == ['\"]([\w-]+)['\"]$", line)
        if name.lower() == package.lower() != "shunter"
    ]
    return f"this needs the package {package}: pip install 'shunter[{extras[0]}]'" if extras else ""
