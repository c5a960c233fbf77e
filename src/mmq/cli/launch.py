"""Several processes for one command: torch's elastic launcher, as torchrun has it."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mmq.cli.streams import Terminated
from mmq.machine.signals import SIGNALLED, STOPPING

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# Names the file that is there once a rank of `launch` has said how the command ends.
SAID = "MMQ_SAID"
# Seconds after which a rank that still runs is told again to end, and after which it is killed, as torchrun does.
TOLD_AGAIN, PATIENCE = 1.0, 30.0
# How all end where one rank of several has failed.
FAILED = 2


def is_launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def has_launcher() -> bool:
    """Whether it was `launch`, which says what none of the ranks has said."""
    return SAID in os.environ and is_launched()


def rank() -> int:
    """This process's number among those that a launcher started; 0 of one."""
    return int(os.environ["RANK"]) if is_launched() else 0


def speaks() -> bool:
    """Whether this process tells of what all of its machine would say alike."""
    return not is_launched() or os.environ.get("LOCAL_RANK", "0") == "0"


def has_said() -> None:
    """This rank has told how the command ends."""
    if has_launcher():
        Path(os.environ[SAID]).touch()


def was_stopped() -> bool:
    """Whether `launch` was told to end, so that all ranks end for that."""
    return has_launcher() and _mark_of_stop(Path(os.environ[SAID])).exists()


def _mark_of_stop(said: Path) -> Path:
    return said.with_name("stopped")


def last_words(sentence: str) -> None:
    """Tell the launcher why this rank ends, in the file that torch's launchers read and torchrun shows."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": sentence, "timestamp": int(time.time())}), encoding="utf-8")


def launch(processes: int) -> NoReturn:
    """Run this command once more in so many processes of this machine, and end as they do."""
    with tempfile.TemporaryDirectory(prefix="mmq-") as folder:
        said = Path(folder, "said")
        os.environ[SAID] = str(said)
        _launch(processes, said)


def _launch(processes: int, said: Path) -> NoReturn:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torch's launcher would raise a signal wherever its code happens to be, locks of logging among it. Here it runs
    # apart, the main thread takes the signals, and to the launcher its ranks have just ended.
    stopped: list[int] = []
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: stopped.append(number))
    with ThreadPoolExecutor(1, thread_name_prefix="mmq-launcher") as pool:
        running = pool.submit(_run_elastic, processes)
        while not stopped and not running.done():
            wait([running], timeout=0.1)
        if stopped:
            _mark_of_stop(said).touch()
            _end_ranks(running)
    try:
        running.result()
    except ChildFailedError as error:
        if stopped and not said.exists():
            raise Terminated(stopped[0]) from None
        if stopped:
            sys.exit(SIGNALLED + stopped[0])
        if said.exists():
            leading = error.failures.get(0)
            sys.exit(leading.exitcode if leading and leading.exitcode >= 0 else FAILED)
        sentence, code = _cause(error.failures)
        sys.stderr.write(f"{sentence}; finished shards and layers are safe\n")
        sys.exit(code if code >= 0 else SIGNALLED - code)
    sys.exit()


def _run_elastic(processes: int) -> None:
    """Raises ChildFailedError."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What went wrong the leading process says; the launcher would say it again, with its own code's lines.
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"mmq-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    elastic_launch(config, sys.executable)("-m", "mmq", *sys.argv[1:])


def _end_ranks(running: Future[None]) -> None:
    """Tell the ranks to end, those too that are only being started, until all have."""
    begin = time.monotonic()
    while not running.done():
        number = signal.SIGTERM if time.monotonic() - begin < PATIENCE else signal.SIGKILL
        for children in Path("/proc/self/task").glob("*/children"):
            with suppress(OSError):
                for child in map(int, children.read_text().split()):
                    os.kill(child, number)
        wait([running], timeout=TOLD_AGAIN)


def _cause(failures: dict[int, ProcessFailure]) -> tuple[str, int]:
    """Why all of them end, and the exit code of who was the first."""
    rank, failure = min(failures.items(), key=lambda item: _rank_of_cause(item[1]))
    code = failure.exitcode
    if _has_last_words(failure):
        return failure.message, code
    how = f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
    return f"error: rank {rank} (process {failure.pid}) {how}", code


def _has_last_words(failure: ProcessFailure) -> bool:
    return "timestamp" in failure.error_file_data


def _rank_of_cause(failure: ProcessFailure) -> int:
    """Last words tell most; who was ended by SIGTERM, as the launcher ends all once one has failed, least."""
    if _has_last_words(failure):
        return 0
    return 2 if failure.exitcode in (-signal.SIGTERM, SIGNALLED + signal.SIGTERM) else 1
