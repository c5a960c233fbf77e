"""Stage 1, dequant: block fp8 to bf16, shard by shard; everything else byte for byte."""

from __future__ import annotations

import math
import threading
from collections.abc import Set
from typing import Any

import torch

from mmq.serve.quantization_config import unquantized
from mmq.stages.base import BASE_MEMORY, Check, Plan, Unit, check_stop, finish_unit, in_threads, own_units
from mmq.storage.checkpoint import finish_folder
from mmq.storage.shards import TensorSpec, shard_size, write_shard
from mmq.workdir.journal import StageJournal
from mmq.workdir.workspace import BF16, Workspace

name = "dequant"
output = BF16


def plan(workspace: Workspace) -> Plan:
    """One output shard per source shard; a shard of scales alone has no output."""
    source = workspace.source
    units = []
    largest = 0
    for shard, tensors in source.checkpoint.shards.items():
        specs = [source.specs[tensor] for tensor in tensors if tensor in source.specs]
        if not specs:
            continue
        largest = max([largest, *(spec.nbytes for spec in specs)])
        units.append(Unit(shard, sum(spec.nbytes for spec in tensors.values()), shard_size(specs)))
    open_shards = sum(sorted(unit.read for unit in units)[-workspace.recipe.worker_count :])
    # Mapped source shards count against the process though the system may drop them; then one tensor a worker.
    memory = BASE_MEMORY + open_shards + 2 * largest * workspace.recipe.worker_count
    return Plan(name, source.checkpoint.folder, workspace.folder(BF16), units, memory, tensors=[*source.specs])


def checks(workspace: Workspace, before: Set[str]) -> list[Check]:
    """The source's headers are all that it depends on."""
    return []


def fingerprint(workspace: Workspace) -> dict[str, Any]:
    return {
        "model.source": workspace.source.checkpoint.fingerprint(),
        "dequant.dtype": workspace.recipe.dequant.dtype,
    }


class Kept(threading.local):
    """Each thread's memory for a dequantized tensor: that of a new one would be fresh pages again, which the system
    clears one by one."""

    def __init__(self, numbers: int) -> None:
        self.memory = torch.empty(numbers, dtype=torch.bfloat16)

    def of(self, spec: TensorSpec) -> torch.Tensor:
        return self.memory[: math.prod(spec.shape)].view(spec.shape)


def work(workspace: Workspace, plan: Plan, journal: StageJournal) -> None:
    source, reporter = workspace.source, workspace.reporter
    kept = Kept(max((math.prod(source.specs[name].shape) for name in source.scales), default=0))

    def convert(unit: Unit, stop: threading.Event) -> None:
        specs = [source.specs[t] for t in source.checkpoint.shards[unit.name] if t in source.specs]
        done, total = 0, unit.read + unit.written
        # In large pieces, and where the disk fails the error has its sentence; a mapped file's would be a signal.
        reporter.step(unit.name, "reading", done, total)
        source.checkpoint.read_ahead(source.checkpoint.shards[unit.name], stop)
        with source.checkpoint.reader() as reader, write_shard(plan.folder / unit.name, specs) as shard:
            for spec in shard.specs:
                check_stop(stop)
                reporter.step(unit.name, "converting", done, total, spec.name)
                out = kept.of(spec) if spec.name in source.scales else None
                shard.add(spec.name, source.read(reader, spec.name, out=out))
                done += spec.nbytes + source.checkpoint.specs[spec.name].nbytes
        finish_unit(workspace, journal, unit.name, {f"{BF16}/{unit.name}": shard.record})

    in_threads(own_units(workspace, plan, journal), convert, workspace.recipe.worker_count)


def complete(workspace: Workspace, plan: Plan, journal: StageJournal) -> None:
    source = workspace.source
    config = unquantized(workspace.architecture, source.checkpoint.config)
    finish_folder(source.checkpoint, plan.folder, config, [unit.name for unit in plan.units])
