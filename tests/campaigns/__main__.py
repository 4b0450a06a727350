"""`python -m tests.campaigns`: the campaigns at full size, or some at another; a table, and the files of results."""

import argparse
import json
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
    torch.set_num_threads(1)
    if args.out:
        make_folder(args.out)
    results = []
    for given in args.names or CAMPAIGNS:
        name, _, size = given.partition("=")
        campaign, full = CAMPAIGNS[name]
        with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
            result = campaign(Path(folder), int(size or full), args.seed, args.only)
        results.append(result)
        print(row(result), *result.failures, sep="\n", flush=True)
        if args.out:
            found = {"versions": run_versions(), "results": [r.as_json() for r in results]}
            write(args.out / "campaigns.json", json.dumps(found, indent=1) + "\n")
            write(args.out / "campaigns.md", page(found, results))
    return 1 if any(result.failures for result in results) else 0


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
