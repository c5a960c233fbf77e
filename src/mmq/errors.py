"""Everything that mmq raises on purpose.

A stage raises the type that names the fault, with one sentence that a user can act on; only the command line turns
it into an exit code.
"""

from __future__ import annotations

import reprlib

LONGEST_MESSAGE = 1000
LONGEST_VALUE = 300
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


def one_line(error: object) -> str:
    """A library's message without its line breaks, and cut where it is long, so that it fits into a sentence."""
    text = str(error)
    return " ".join(text[:LONGEST_MESSAGE].split()) + ("..." if len(text) > LONGEST_MESSAGE else "")


def shown(value: object) -> str:
    """A value of a file for a sentence: its repr, cut where it is long or deep."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return "a number that is too large"
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "..."


def printable(text: str) -> str:
    """Text for a terminal: control characters, which file and tensor names may hold, as escapes; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class MmqError(Exception):
    """Base of all errors that carry a sentence for the user. `exit_code` is what the command line exits with. Only
    where it `has_lines` are line breaks its own; elsewhere a path or a name brought them."""

    exit_code = 2
    has_lines = False


class RecipeError(MmqError):
    """The recipe is not valid: unknown key, wrong type, missing file."""


class CheckpointError(MmqError):
    """A checkpoint folder is damaged, incomplete or of a kind that mmq does not take."""


class CalibrationError(MmqError):
    """The calibration data can't be used as the recipe asks."""


class JournalError(MmqError):
    """The journal can't be read, or resuming would mix two different runs."""


class LockedError(MmqError):
    """Another process is at work in the same work_dir."""


class DiskSpaceError(MmqError):
    """The disk is full, or would be before the stage ends."""


class DeviceMemoryError(MmqError):
    """The GPU's memory doesn't hold what the stage needs at its least."""


class RankError(MmqError):
    """Another rank of the run failed, died, or did not come in time. `exit_code` is that rank's where it said one."""


class PushError(MmqError):
    """The hub does not take the checkpoint, or can't be reached."""


class VerifyError(MmqError):
    """The finished checkpoint is not what it must be. A line for each finding."""

    exit_code = 1
    has_lines = True
