"""Standard output and error as they are in real life: a terminal may close, a pipe may lose its reader."""

from __future__ import annotations

import errno
import logging
import os
import signal
from typing import Any, TextIO

log = logging.getLogger(__name__)


class Terminated(BaseException):
    """A signal asks the command to end; SIGPIPE among them stands for output that nobody reads."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Stream:
    """A standard stream whose loss is no error. What is written to it afterwards goes nowhere.

    Args:
        needed: a pipe without a reader ends the command, as it does with other tools. A closed terminal never does:
            its SIGHUP has, unless the user wants the command to go on.
    """

    def __init__(self, stream: TextIO, needed: bool) -> None:
        self._stream, self._needed = stream, needed

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        """Raises Terminated, or the error itself when it is of another kind."""
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise error
        # What is still buffered must go somewhere, or it fails again at the process's end.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
        log.info("%s is closed", self._stream.name)
        if self._needed and error.errno == errno.EPIPE:
            raise Terminated(signal.SIGPIPE)
