"""Signals that ask a process to end: which they are, and when they are held back or end it at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A shell's exit code for a command that a signal ended is this and the signal's number.
SIGNALLED = 128


@contextmanager
def signals_held() -> Iterator[None]:
    """No signal ends the block: where threads start, one that its pool does not know of yet would outlive the stage,
    and the lock. The threads hold these signals for good; the main thread takes them."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@contextmanager
def signals_fatal() -> Iterator[None]:
    """A signal ends the process at once, without Python's say: for what waits in compiled code before there is
    anything to leave in order. Of the main thread alone."""
    previous = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
