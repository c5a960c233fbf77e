"""From an exception to one sentence and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import IO, NoReturn, cast

from rich.console import Console
from rich.text import Text

from mmq.cli.launch import has_launcher, has_said, is_launched, last_words, speaks, was_stopped
from mmq.cli.streams import Stream, Terminated
from mmq.errors import MmqError, RankError, one_line, printable
from mmq.machine.signals import SIGNALLED, STOPPING

# Signals that this process got while a command ran.
_received: list[int] = []


@contextmanager
def handled(resume: str = "") -> Iterator[None]:
    """Turn errors of mmq into a message and its exit code, and let SIGTERM, SIGHUP and Ctrl-C end a command in good
    order. A signal that is ignored already, as nohup has it, stays so.

    Args:
        resume: what to run after an interruption.
    """
    numbers = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, _terminate) for number in numbers}
    _received.clear()
    hooks = sys.unraisablehook, sys.excepthook
    sys.unraisablehook, sys.excepthook = _lost, _printed
    try:
        yield
    except BaseException as error:
        if (end := ending(error, resume)) is None:
            if isinstance(error, Exception):
                _among_ranks(error, f"mmq did not foresee this: {one_line(error)}", 1)
            raise
        _leave(_meant(error), *end)
    finally:
        sys.unraisablehook, sys.excepthook = hooks
        for number, handler in previous.items():
            # A launcher's signal, when all ends anyway, must not cut the end short.
            signal.signal(number, signal.SIG_IGN if is_launched() else handler)


def ending(error: BaseException, resume: str = "") -> tuple[str, int] | None:
    """The sentence and the exit code with which an error ends a command; None for one that nobody foresaw."""
    error = _meant(error)
    if isinstance(error, MmqError):
        text = str(error) if error.has_lines else str(error).replace("\n", "\\n")
        return f"error: {text}", error.exit_code
    if isinstance(error, (KeyboardInterrupt, Terminated)):
        number = error.number if isinstance(error, Terminated) else signal.SIGINT
        # A short command whose reader had enough has nothing to say.
        quiet = number == signal.SIGPIPE and not resume
        hint = f"; go on with: {resume}" if resume else ""
        return "" if quiet else f"stopped: finished shards and layers are safe{hint}", SIGNALLED + number
    if isinstance(error, OSError):
        kind = errno.errorcode.get(error.errno or 0, type(error).__name__)
        where = f" ({str(error.filename)[-300:]})" if error.filename else ""
        return f"error: the system refused: {error.strerror or error}{where} {kind}", 2
    return None


def _meant(error: BaseException) -> BaseException:
    """A library's compiled code may turn what a signal raised in its midst into an error of its own."""
    return Terminated(_received[0]) if _received and isinstance(error, Exception) else error


def _terminate(number: int, _frame: FrameType | None) -> None:
    # Once is enough: a terminal that closes may send it twice, and the second would cut the first one's tidying short.
    # Whoever presses Ctrl-C again means just that.
    if number != signal.SIGINT:
        signal.signal(number, signal.SIG_IGN)
    _received.append(number)
    raise Terminated(number)


def _sent_again(error: BaseException | None) -> bool:
    """Whether compiled code that called Python's has dropped a signal, which is then sent once more."""
    if not isinstance(error, Terminated):
        return False
    signal.signal(error.number, _terminate)
    threading.Timer(0.05, os.kill, (os.getpid(), error.number)).start()
    return True


def _lost(lost: sys.UnraisableHookArgs) -> None:
    if not _sent_again(lost.exc_value):
        sys.__unraisablehook__(lost)


def _printed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As it is printed by compiled code that goes on."""
    if not _sent_again(error):
        sys.__excepthook__(kind, error, trace)


def end_process(code: int) -> None:
    """End now, without the interpreter's own end, after a signal and as one of several ranks: a signal leaves objects
    of compiled code half made, whose destructors are not safe, and a rank's connections may wait for another."""
    if not _received and not is_launched():
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _leave(error: BaseException, message: str, code: int) -> NoReturn:
    message, code = _among_ranks(error, message, code)
    if message:
        text = Text(printable(message))
        text.highlight_regex(r"^error:", "red")
        stream = cast(IO[str], Stream(sys.stderr, needed=False))
        Console(file=stream, stderr=True).print(text, soft_wrap=True)
    sys.exit(code)


def _among_ranks(error: BaseException, message: str, code: int) -> tuple[str, int]:
    """What this process says and ends with, as one of several; the launcher and the others know of it then."""
    message, code = _own_words(error, message, code)
    if message:
        has_said()
    return message, code


def _own_words(error: BaseException, message: str, code: int) -> tuple[str, int]:
    """As of `_among_ranks`: the leading one speaks for all."""
    if not is_launched():
        return message, code
    alone = "mmq.machine.team" not in sys.modules
    if not alone:
        from mmq.machine.team import STOPPED, joined

        alone = (team := joined()).size == 1
    if isinstance(error, Terminated) and has_launcher():
        message = ""  # it knows whether one of them has failed, or it was stopped itself
    if alone:  # none has heard of the others yet, and all meet with the same
        return message if speaks() else "", code
    if isinstance(error, Terminated):
        # The launcher ends all where one has failed.
        with suppress(RankError):
            if not was_stopped() and (found := team.failure(STOPPED)) is not None:
                message, code = f"error: {found}", found.exit_code
        team.leave()
    elif isinstance(error, RankError):
        team.leave()
    else:
        team.fail(message.removeprefix("error: "), code)
    if team.leads:
        return message, code
    if message.startswith("error: "):
        last_words(message)
    return "", code
