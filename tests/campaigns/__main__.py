"""`python -m tests.campaigns`: the campaigns at full size, or some at another; a table, and the files of results."""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import torch

from shunter.durable import make_folder, write
from shunter.environment import run_versions
from tests.campaigns.campaigns import CAMPAIGNS


def main():
    """Run what was asked for; the exit code is 1 where anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CAMPAIGNS)}, or NAME=SIZE; none: all at full size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat one case")
    parser.add_argument("--out", type=Path, help="a folder for campaigns.json and campaigns.md")
    args = parser.parse_args()
    if args.out:
        make_folder(args.out)
    tasks = [(*name.partition("=")[::2], args.seed, args.only) for name in args.names or CAMPAIGNS]
    results = []
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        for result in pool.imap_unordered(run, tasks, chunksize=1):
            results = sorted([*results, result], key=lambda result: list(CAMPAIGNS).index(result.campaign))
            print(row(result), *result.failures, sep="\n", flush=True)
            if args.out:
                found = {"versions": run_versions(), "results": [result.as_json() for result in results]}
                write(args.out / "campaigns.json", json.dumps(found, indent=1) + "\n")
                write(args.out / "campaigns.md", page(found, results))
    return 1 if any(result.failures for result in results) else 0


def run(task):
    """One campaign in a folder of its own."""
    name, size, seed, only = task
    torch.set_num_threads(1)
    campaign, full = CAMPAIGNS[name]
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        return campaign(Path(folder), int(size or full), seed, only)


def row(result):
    """A line of the table."""
    numbers = (result.injected, result.survived, result.detected, len(result.failures), result.seed)
    return f"| {result.campaign} | {result.what} | " + " | ".join(f"{number:,}" for number in numbers) + " |"


def page(found, results):
    """The results in Markdown."""
    heads = ("campaign", "faults", "injected", "survived", "detected", "failed", "seed")
    lines = [
        "# Campaigns of faults",
        "",
        "What they are: [Reliability](../reliability.md). `make campaigns` runs them.",
    ]
    lines += ["", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *map(row, results), ""]
    lines += [f"- {failure}" for result in results for failure in result.failures]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return "\n".join([*lines, "", f"With {versions}.", ""])


if __name__ == "__main__":
    sys.exit(main())
