"""From an exception to one sentence and an exit code."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.text import Text

from mmq.errors import MmqError

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class Terminated(BaseException):
    """SIGTERM arrived."""


@contextmanager
def handled(resume: str = "") -> Iterator[None]:
    """Turn errors of mmq into a message and its exit code, and let SIGTERM and Ctrl-C end a command in good order.

    Args:
        resume: what to run after an interruption.
    """
    previous = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    except MmqError as error:
        _leave(f"error: {error}", error.exit_code)
    except (KeyboardInterrupt, Terminated) as stop:
        code = EXIT_TERMINATED if isinstance(stop, Terminated) else EXIT_INTERRUPTED
        hint = f"; go on with: {resume}" if resume else ""
        _leave(f"stopped: finished shards and layers are safe{hint}", code)
    except OSError as error:
        kind = errno.errorcode.get(error.errno or 0, type(error).__name__)
        where = f" ({error.filename})" if error.filename else ""
        _leave(f"error: the system refused: {error.strerror or error}{where} {kind}", 2)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _raise_terminated(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated


def _leave(message: str, code: int) -> None:
    text = Text(message)
    text.highlight_regex(r"^error:", "red")
    Console(stderr=True).print(text, soft_wrap=True)
    sys.exit(code)
