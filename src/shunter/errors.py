"""What a user did wrong, as one exception, and any error as one line of text."""

from __future__ import annotations

__all__ = [
    "LONGEST",
    "Diverged",
    "Elsewhere",
    "Interrupted",
    "LostRank",
    "NotWritten",
    "UserError",
    "escaped",
    "one_line",
    "said",
]

LONGEST = 400  # characters of a line


class UserError(ValueError):
    """Input that cannot be used: one line with what was given, what is allowed and what to do."""


class Elsewhere(UserError):
    """An error of another rank, raised here too; the process of that rank tells it."""


class NotWritten(OSError):
    """Results that could not be written: one line with the path and why. What was there before is still there."""


class LostRank(RuntimeError):
    """Processes that work together could not: one line that names the ranks that are gone, stopped or elsewhere.

    Attributes:
        status: the exit status of a process that has lost others (EX_TEMPFAIL: to try again may help).
    """

    status = 75


class Diverged(Exception):
    """Training met numbers that are not finite, again and again: one line with the step, the layer and what to try.

    Args:
        said: the line.
        since: the first step of those.
    """

    def __init__(self, said: str, since: int) -> None:
        super().__init__(said)
        self.since = since


class Interrupted(Exception):
    """Training was asked to stop; a checkpoint has been written. It says where training stopped."""


def said(error: BaseException | str) -> str:
    """What an error says; one of the file system without its number, behind the file where it names one."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
    return str(error)


def one_line(error: BaseException | str) -> str:
    """What an error (or a text) says, as one printable line of at most `LONGEST` characters."""
    plain = "".join(c if c.isprintable() else " " for c in " ".join(said(error).split()))
    plain = plain or type(error).__name__
    return plain if len(plain) <= LONGEST else f"{plain[: LONGEST - 3]}..."


def escaped(text: str) -> str:
    """A text with escapes for what is not printable (control characters, line breaks), as for a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)
