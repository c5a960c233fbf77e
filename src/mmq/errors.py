"""Everything that mmq raises on purpose.

A stage raises the type that names the fault, with one sentence that a user can act on; only the command line turns
it into an exit code.
"""

from __future__ import annotations


def one_line(error: object) -> str:
    """A library's message without its line breaks, so that it fits into a sentence."""
    return " ".join(str(error).split())


class MmqError(Exception):
    """Base of all errors that carry a sentence for the user. `exit_code` is what the command line exits with."""

    exit_code = 2


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


class VerifyError(MmqError):
    """The finished checkpoint is not what it must be."""

    exit_code = 1
