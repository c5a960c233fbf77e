"""Several processes for one command: torch's elastic launcher, as torchrun has it."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import NoReturn


def is_launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """This process's number among those that a launcher started; 0 of one."""
    return int(os.environ["RANK"]) if is_launched() else 0


def speaks() -> bool:
    """Whether this process tells of what all of its machine would say alike."""
    return not is_launched() or os.environ.get("LOCAL_RANK", "0") == "0"


def launch(processes: int) -> NoReturn:
    """Run this command once more in so many processes of this machine, and end as they do."""
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
        codes = {number: failure.exitcode for number, failure in error.failures.items()}
        # The leading rank has said why, unless it was the one that died.
        code = codes.get(0, next(iter(codes.values())))
        if code == -signal.SIGKILL:
            sys.stderr.write("error: rank 0 was killed; finished shards and layers are safe\n")
        sys.exit(code if code >= 0 else 128 - code)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    sys.exit()
