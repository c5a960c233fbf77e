"""What the stages share: plans, and the frame that checks, resumes, runs and completes a stage."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from mmq.errors import DeviceMemoryError, DiskSpaceError, MmqError
from mmq.machine.device import named_device, peak_device, peak_host, total_device, total_host
from mmq.machine.signals import signals_held
from mmq.machine.threads import computing, one_thread
from mmq.quantize.memory import Peaks
from mmq.storage.atomic import FileRecord, make_folder, remove_temporaries
from mmq.text import bytes_text
from mmq.workdir.journal import StageJournal
from mmq.workdir.lock import lock
from mmq.workdir.versions import versions
from mmq.workdir.workspace import Workspace

# Python, torch and the libraries, before any tensor.
BASE_MEMORY = 800 * 2**20
# Seconds after which the leading rank looks for what others finished.
TAKE_EVERY = 0.2


@dataclass(frozen=True)
class Unit:
    """What a stage finishes and journals at a time: a shard or a layer.

    Attributes:
        read, written: bytes.
        arithmetic: what is computed, in bytes that could be read or written meanwhile; 0 where files set the pace.
    """

    name: str
    read: int
    written: int
    arithmetic: int = 0

    @property
    def weight(self) -> int:
        """Its part of the stage's work."""
        return self.read + self.written + self.arithmetic


@dataclass(frozen=True)
class Plan:
    """What a stage would do.

    Attributes:
        folder: the output folder.
        units: all units, in order.
        host_memory, device_memory: estimated peaks in bytes; the device's is 0 where the stage needs none.
        state: bytes that it keeps below the work_dir's state/ while it works.
        tensors: names of all that it writes.
    """

    stage: str
    source: Path
    folder: Path
    units: list[Unit]
    host_memory: int
    device_memory: int = 0
    state: int = 0
    tensors: list[str] = field(default_factory=list)

    @property
    def read(self) -> int:
        return sum(unit.read for unit in self.units)

    @property
    def written(self) -> int:
        return sum(unit.written for unit in self.units)


@dataclass(frozen=True)
class Check:
    """Something that a stage will read, use or refuse, looked at before anything is written.

    Attributes:
        name: what it is, for people.
        look: says in a few words what was found, or raises MmqError with the sentence that the stage would end with.
        weights: it needs the source's shards, which may have to be fetched for it.
    """

    name: str
    look: Callable[[Workspace], str]
    weights: bool = True


class Stage(Protocol):
    """A stage of the pipeline.

    Attributes:
        output: its folder, below the work_dir.
    """

    name: str
    output: str

    def checks(self, workspace: Workspace, before: Set[str]) -> list[Check]:
        """What it will refuse; `before` are the stages of this command that run before it and have work left."""

    def plan(self, workspace: Workspace) -> Plan:
        """From headers alone; writes nothing."""

    def fingerprint(self, workspace: Workspace) -> dict[str, Any]:
        """The inputs that decide the stage's bytes, by the name a user knows them by."""

    def work(self, workspace: Workspace, plan: Plan, journal: StageJournal) -> None:
        """Do this rank's part of the units that the journal lacks."""

    def complete(self, workspace: Workspace, plan: Plan, journal: StageJournal) -> None:
        """All units are done: complete the output folder."""


class Stopped(MmqError):
    """Another worker failed; this one gave up."""


def existing_part(folder: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def free_disk(folder: Path) -> int:
    """Free bytes on the disk that would hold `folder`."""
    return shutil.disk_usage(existing_part(folder)).free


def disk_of(folder: Path) -> int:
    """The system's number of the disk that would hold `folder`."""
    return existing_part(folder).stat().st_dev


@contextmanager
def holding(workspace: Workspace) -> Iterator[None]:
    """Hold the work_dir's lock, which the leading rank takes for all, and have progress seen there.

    Raises:
        LockedError: another process holds it.
    """
    team, reporter = workspace.team, workspace.reporter
    with (
        reporter.recorded(lambda progress: team.at(f"{progress.stage}, {progress.doing}")),
        lock(workspace.work_dir, reporter, team.whereabouts) if team.leads else nullcontext(),
    ):
        yield


def execute(stage: Stage, workspace: Workspace, restart: bool = False) -> None:
    """Run or resume a stage, on all ranks; call under the work_dir's lock.

    Raises:
        MmqError: with one sentence. What was finished stays finished.
    """
    plan, team, journal = stage.plan(workspace), workspace.team, workspace.journal.stage(stage.name)
    if team.leads:
        _begin(stage, workspace, plan, journal, restart)
    share_journal(workspace)
    journal = workspace.journal.stage(stage.name)
    if journal.complete:
        return
    if not team.leads:
        workspace.reporter.start(stage.name, {unit.name: unit.weight for unit in plan.units}, journal.units)
    with _taking_letters(workspace, journal):
        stage.work(workspace, plan, journal)
        team.together()
    if team.leads:
        stage.complete(workspace, plan, journal)
        journal.finish()
        workspace.reporter.finish(stage.name)
    share_journal(workspace)


def share_journal(workspace: Workspace) -> None:
    """All ranks know what the leading one's journal says."""
    team = workspace.team
    known = team.leader_says(workspace.journal.as_json() if team.leads else None)
    if not team.leads:
        workspace.journal.take(known)


def _begin(stage: Stage, workspace: Workspace, plan: Plan, journal: StageJournal, restart: bool) -> None:
    """Check and begin the stage, or resume it."""
    if restart:
        journal.reset()
        for folder in (plan.folder, workspace.folder("state") / stage.name):
            if folder.is_symlink():
                folder.unlink()
            elif folder.exists():
                shutil.rmtree(folder)
    journal.begin(stage.fingerprint(workspace))
    if journal.complete:
        removed = " was removed by `mmq clean`" if plan.folder.name in journal.removed else ""
        workspace.reporter.note(f"{stage.name} is complete: {plan.folder}{removed}")
        return
    make_folder(plan.folder)
    remove_temporaries(plan.folder)
    pending = [unit for unit in plan.units if unit.name not in journal.units]
    check_disk(plan.folder, sum(unit.written for unit in pending))
    begin_run(workspace, journal)
    workspace.reporter.start(
        stage.name,
        {unit.name: unit.weight for unit in plan.units},
        journal.units,
        sum(unit.read + unit.written for unit in pending),
    )
    if len(pending) < len(plan.units):
        workspace.reporter.note(f"{stage.name} resumes: {len(plan.units) - len(pending)} of {len(plan.units)} are done")


def own_units(workspace: Workspace, plan: Plan, journal: StageJournal) -> list[Unit]:
    """The units left to do that are this rank's: every rank's come in turns, since neighbours are alike in size."""
    pending = [unit for unit in plan.units if unit.name not in journal.units]
    return pending[workspace.team.rank :: workspace.team.size]


def finish_unit(workspace: Workspace, journal: StageJournal, unit: str, files: dict[str, FileRecord]) -> None:
    """A unit's files are in place: the journal and its reader are told, by the leading rank."""
    if workspace.team.leads:
        journal.finish_unit(unit, files)
        workspace.reporter.unit(unit)
    else:
        workspace.team.post([unit, {path: astuple(record) for path, record in files.items()}])


@contextmanager
def _taking_letters(workspace: Workspace, journal: StageJournal) -> Iterator[None]:
    """The leading rank journals what the others finish while it works, and all of it by the block's end."""
    team = workspace.team
    if team.size == 1 or not team.leads:
        yield
        return
    ended = threading.Event()

    def take() -> None:
        last = False
        while not last:
            last = ended.wait(TAKE_EVERY)
            for unit, files in team.letters():
                finish_unit(workspace, journal, unit, {path: FileRecord(*record) for path, record in files.items()})

    with one_thread("mmq-letters") as pool:
        taking = pool.submit(take)
        try:
            yield
        finally:
            ended.set()
        taking.result()


def begin_run(workspace: Workspace, journal: StageJournal) -> None:
    """Have the journal note what this run takes, and where it was made."""
    # Nothing is drawn by chance but the hub's samples; a library that draws shall draw the same.
    torch.manual_seed(workspace.recipe.seed)
    device = named_device(workspace.recipe.awq.device)
    journal.begin_run(
        {"host": socket.gethostname(), "seed": workspace.recipe.seed, "versions": versions()},
        lambda: {"peak_host_bytes": peak_host(), "peak_device_bytes": peak_device(device)},
    )


def check_disk(folder: Path, needed: int) -> None:
    """Raises DiskSpaceError where the stage would fill the disk."""
    free = free_disk(folder)
    if free < needed:
        raise DiskSpaceError(f"{folder} needs {bytes_text(needed)}, its disk has {bytes_text(free)} free")


def check_memory(who: str, least: Peaks, device: torch.device, ways_out: str) -> str:
    """The device and the host could hold it, were nothing else there: what was found.

    Raises:
        DeviceMemoryError: one could not; it names the ways out.
    """
    found = []
    for where, needed, there in (
        ("this machine", BASE_MEMORY + least.host, total_host()),
        (str(device), least.device, total_device(device)),
    ):
        if not needed:
            continue
        if there is not None and needed > there:
            raise DeviceMemoryError(
                f"{who} needs {bytes_text(needed)} of memory at least, {where} has {bytes_text(there)}; {ways_out}"
            )
        found.append(
            f"{bytes_text(needed)} at least, {where} has {bytes_text(there) if there else 'what is not known'}"
        )
    return "; ".join(found)


def in_threads(units: Iterable[Unit], job: Callable[[Unit, threading.Event], None], workers: int) -> None:
    """Run `job` for every unit on `workers` threads; the first error stops the others at their next tensor."""
    stop = threading.Event()
    futures: list[Future[None]] = []
    with computing(workers) as pool:
        try:
            with signals_held():
                futures += [pool.submit(job, unit, stop) for unit in units]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            for future in futures:
                future.cancel()
    errors = [future.exception() for future in futures if not future.cancelled() and future.exception()]
    errors.sort(key=lambda error: isinstance(error, Stopped))
    if errors:
        assert errors[0] is not None
        raise errors[0]


def check_stop(stop: threading.Event) -> None:
    """Raises Stopped once another worker failed or the run was interrupted."""
    if stop.is_set():
        raise Stopped("stopped")
