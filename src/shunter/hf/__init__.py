"""Hugging Face: any dense model made sparse."""

from .sparsify import from_pretrained, sparsify

__all__ = ["from_pretrained", "sparsify"]
