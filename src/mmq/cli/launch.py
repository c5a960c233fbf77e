"""Several processes for one command: torch's elastic launcher, as torchrun has it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mmq.cli.streams import Terminated

if TYPE_CHECKING:
    from mmq.machine.team import Team

# Names the file that is there once the ranks of `launch` have come together.
JOINED = "MMQ_JOINED"


def is_launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """This process's number among those that a launcher started; 0 of one."""
    return int(os.environ["RANK"]) if is_launched() else 0


def speaks() -> bool:
    """Whether this process tells of what all of its machine would say alike."""
    return not is_launched() or os.environ.get("LOCAL_RANK", "0") == "0"


def join(device: str) -> Team:
    """`Team.join`, after which the leading rank speaks for all."""
    from mmq.machine.team import Team

    team = Team.join(device)
    if team.leads and JOINED in os.environ:
        Path(os.environ[JOINED]).touch()
    return team


def launcher_speaks() -> bool:
    """Whether `launch` tells how its ranks end: they have not come together yet."""
    return JOINED in os.environ and not Path(os.environ[JOINED]).exists()


def launch(processes: int) -> NoReturn:
    """Run this command once more in so many processes of this machine, and end as they do."""
    with tempfile.TemporaryDirectory(prefix="mmq-") as folder:
        os.environ[JOINED] = str(Path(folder, "joined"))
        _launch(processes)


def _launch(processes: int) -> NoReturn:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
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
    try:
        elastic_launch(config, sys.executable)("-m", "mmq", *sys.argv[1:])
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        # The launcher ends all others by SIGTERM once one has failed.
        first = min(codes, key=lambda rank: (codes[rank] in (-signal.SIGTERM, 128 + signal.SIGTERM), rank))
        said = codes.get(0, 2)
        # The leading rank has said why, unless it was killed, or did not know the others yet.
        if said >= 0 and not (first != 0 and launcher_speaks()):
            sys.exit(said)
        code = codes[first]
        how = f"ended with {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        process = error.failures[first].pid
        sys.stderr.write(f"error: rank {first} (process {process}) {how}; finished shards and layers are safe\n")
        sys.exit(code if code >= 0 else 128 - code)
    except SignalException as error:
        if launcher_speaks():
            raise Terminated(error.sigval) from None
        sys.exit(128 + error.sigval)
    sys.exit()
