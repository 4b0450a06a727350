"""Several processes: what is counted on one rank, summed over the ranks that hold other tokens."""

from .ranks import sum_over_ranks

__all__ = ["sum_over_ranks"]
