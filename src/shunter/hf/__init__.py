"""Hugging Face: any dense model made sparse, and any sparse one on Shunter's experts."""

from . import experts  # noqa: F401 (registers experts_implementation="shunter")
from .conversion import from_pretrained, sparsify
from .upcycling import upcycle

__all__ = ["from_pretrained", "sparsify", "upcycle"]
