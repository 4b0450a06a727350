"""Hugging Face: any dense model made sparse, any sparse one on Shunter's experts and kept balanced."""

from . import experts  # noqa: F401 (registers experts_implementation="shunter")
from .balance import BalanceCallback, BalanceWarning
from .conversion import from_pretrained, sparsify
from .upcycling import upcycle

__all__ = ["BalanceCallback", "BalanceWarning", "from_pretrained", "sparsify", "upcycle"]
