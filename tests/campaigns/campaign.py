"""What a campaign is: numbered cases of faults in, and how many were injected, survived, detected and failed out."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Result:
    """What came of cases of a campaign.

    Args:
        campaign: its name.
        seed: of all cases.
        injected: faults.
        survived: those with the right outcome.
        detected: cases that were refused in one line, or heard.
        failures: what was wrong, and the command that repeats the case.
    """

    campaign: str
    seed: int
    injected: int = 0
    survived: int = 0
    detected: int = 0
    failures: list[str] = field(default_factory=list)

    def count(self, case, fault, *, detected=False, faults=1):
        """One more case, of some faults: what is wrong after it, in words, or nothing."""
        self.injected += faults
        if fault:
            again = f"python -m tests.campaigns {self.campaign} --seed {self.seed} --only {case}"
            self.failures.append(f"{fault} [{again}]")
        elif detected:
            self.detected += faults
        else:
            self.survived += faults


@dataclass(frozen=True)
class Campaign:
    """A kind of fault.

    Args:
        letter: in the plan of all campaigns.
        what: the faults, in words.
        work: (result, folder, cases, seed) runs the cases of these numbers; one that does not exist injects nothing.
        full: how many faults `make campaigns` injects; None all there are.
        small: how many cases a test runs.
        part: how many cases a process takes at a time.
        slow: whether the small version is for `make test-slow`.
    """

    letter: str
    what: str
    work: Callable[[Result, Path, Iterable[int], int], None]
    full: int | None
    small: int
    part: int
    slow: bool = False

    def run(self, name: str, folder: Path, cases: Iterable[int], seed: int) -> Result:
        """Run cases in a folder, which a process may give again: what is made for all cases stays there."""
        result = Result(name, seed)
        self.work(result, Path(folder), cases, seed)
        return result


def drawn(seed, case):
    """The random numbers of a case."""
    return random.Random(f"{seed} {case}")
