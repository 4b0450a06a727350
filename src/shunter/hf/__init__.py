"""Hugging Face: any dense model made sparse."""

from .conversion import from_pretrained, sparsify
from .upcycling import upcycle

__all__ = ["from_pretrained", "sparsify", "upcycle"]
