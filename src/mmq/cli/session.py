"""What a command that works for hours has around its work: recipe, output, log file, and an end in order."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path

import mmq
from mmq.cli.errors import ending, handled
from mmq.cli.launch import is_launched, launch, rank
from mmq.cli.options import quiet_libraries, recipe_arguments
from mmq.cli.output import Logged, Mode, Output, make_output
from mmq.cli.streams import Terminated
from mmq.errors import MmqError, RecipeError, printable
from mmq.recipe import Recipe, load

LOG_BYTES = 10 * 2**20
LOG_FILES = 5
# Libraries whose records don't, or needn't, reach the root logger.
APART = ("transformers", "torch")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """One command on one recipe.

    Attributes:
        again: the recipe and its overrides, as arguments for this or another command.
    """

    recipe: Recipe
    output: Output
    again: list[str]

    def hint(self, command: str) -> None:
        """Name the next command."""
        self.output.hint(shlex.join(["mmq", command, *self.again]))


@contextmanager
def session(
    command: str,
    path: Path,
    overrides: list[str] | None,
    mode: Mode,
    log_file: Path | None = None,
    options: Iterable[str] = (),
    devices: int | None = None,
) -> Iterator[Session]:
    """Load the recipe and run the block under `handled`. With a log file, what the output is told goes there as well,
    and the command outlives its terminal.

    Args:
        options: further arguments that say what to do again after an interruption.
        devices: start so many processes that do it together, if this is not one of them.
    """
    again = recipe_arguments(path, overrides)
    options = [*options, *(["--devices", str(devices)] if devices else [])]
    logging_to = ["--log-file", str(log_file)] if log_file else []
    resume = shlex.join(["mmq", command, *again, *options, *logging_to])
    with handled(resume):
        recipe = load(path, overrides)
        quiet_libraries()
        if devices and devices > 1 and not is_launched():
            if log_file:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)  # and the ranks inherit it
            launch(devices)
        if rank():
            # The leading one speaks for all, and its log is theirs.
            if log_file:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
            mode, log_file = Mode.QUIET, None
        if log_file is None:
            yield Session(recipe, make_output(mode), again)
            return
        with _logging_to(_log_path(log_file, recipe), resume):
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            yield Session(recipe, Logged(make_output(mode, needed=False)), again)


def _log_path(log_file: Path, recipe: Recipe) -> Path:
    """The file, absolute. Raises RecipeError where it would lie among a checkpoint's files."""
    from mmq.workdir.workspace import AWQ, BF16, HYBRID, STATE

    path = log_file.expanduser().resolve()
    source = recipe.path(recipe.model.source)
    for folder in (source, *(recipe.work_path / name for name in (BF16, AWQ, HYBRID, STATE))):
        if path.is_relative_to(folder.resolve()):
            raise RecipeError(f"--log-file: {path} lies in {folder}, which holds nothing but the model's files")
    return path


class _LogFile(RotatingFileHandler):
    """Lines with a UTC time, 10 MB a file, and the last five files."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8", errors="backslashreplace")
        formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record once: with CI=true in the environment, transformers' logger hands its own to the root too."""
        if vars(record).get("mmq_log") is not self:
            vars(record)["mmq_log"] = self
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        """A log that can't be written, on a full disk say, ends no run."""

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def _logging_to(path: Path, command: str) -> Iterator[None]:
    """Append to a log file: mmq's own lines, warnings and records of libraries, and how the block ends.

    Raises:
        MmqError: the file can't be opened.
    """
    try:
        handler = _LogFile(path)
    except OSError as error:
        raise MmqError(f"--log-file: {path} can't be opened: {error.strerror or error}") from None
    loggers = [logging.getLogger(name) for name in (None, *APART)]
    own = logging.getLogger(mmq.__name__)
    level = own.level
    own.setLevel(logging.INFO)
    for logger in loggers:
        logger.addHandler(handler)
    logging.captureWarnings(True)
    try:
        log.info("%s: mmq %s, process %d on %s", command, mmq.__version__, os.getpid(), socket.gethostname())
        yield
        log.info("done")
    except (Exception, KeyboardInterrupt, Terminated) as error:
        if (end := ending(error, command)) is None:
            log.exception("error: mmq did not foresee this")
        else:
            log.error("%s", end[0])
        raise
    finally:
        logging.captureWarnings(False)
        for logger in loggers:
            logger.removeHandler(handler)
        own.setLevel(level)
        handler.close()
