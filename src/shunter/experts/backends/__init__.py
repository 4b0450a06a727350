"""The backends, each a function (x, weights, routing) to y: `reference` defines it; the fast ones."""

from . import decode, grouped_mm, numba, padded, reference, triton  # noqa: F401 (each registers itself)
