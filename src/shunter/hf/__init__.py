"""Hugging Face: any dense model made sparse."""

from .conversion import from_pretrained, sparsify

__all__ = ["from_pretrained", "sparsify"]
