"""Benchmarks: this library side by side with its peers in one run, with the machine and the versions."""
