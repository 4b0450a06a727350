"""What `shunter train` trains: a recipe for each kind of input, and the engine that runs it. Needs `[train]`."""

from .registry import find, names, register

__all__ = ["find", "names", "register"]
