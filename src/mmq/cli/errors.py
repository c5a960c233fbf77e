"""From an exception to one sentence and an exit code."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from mmq.errors import MmqError

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class Terminated(BaseException):
    """SIGTERM arrived."""


@contextmanager
def handled(resume_hint: str = "") -> Iterator[None]:
    """Turn errors of mmq into a message and its exit code, and let SIGTERM and Ctrl-C end a command in good order.

    Args:
        resume_hint: what to run after an interruption.
    """
    previous = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    except MmqError as error:
        _leave(f"[red]error:[/] {_escape(str(error))}", error.exit_code)
    except (KeyboardInterrupt, Terminated) as stop:
        code = EXIT_TERMINATED if isinstance(stop, Terminated) else EXIT_INTERRUPTED
        hint = f"; go on with: {_escape(resume_hint)}" if resume_hint else ""
        _leave(f"stopped; finished shards and layers are safe{hint}", code)
    except OSError as error:
        kind = errno.errorcode.get(error.errno or 0, type(error).__name__)
        where = f" ({error.filename})" if error.filename else ""
        _leave(f"[red]error:[/] the system refused: {_escape(str(error.strerror or error))}{_escape(where)} {kind}", 2)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _raise_terminated(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated


def _leave(message: str, code: int) -> None:
    Console(stderr=True).print(message, highlight=False, soft_wrap=True)
    sys.exit(code)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
