"""Stage 3, restore: the source's own bytes of all but the experts back into the quantized checkpoint.

Norms, router and experts come from the awq output, smoothed together; attention, dense layers, embeddings, head and the
router's bias are the source's bytes. That is only right if awq left everything that attention depends on alone, which
is checked first.
"""

from __future__ import annotations

import threading
from collections.abc import Set
from typing import Any

import torch

from mmq.errors import CheckpointError, JournalError
from mmq.serve.quantization_config import has_two_names, output_config
from mmq.stages.base import BASE_MEMORY, Check, Plan, Unit, check_stop, finish_unit, in_threads, own_units
from mmq.storage.checkpoint import Checkpoint, finish_folder
from mmq.storage.shards import shard_size, write_shard
from mmq.tensors.fp8 import block_scales, quantize_block
from mmq.workdir.journal import OUTPUT_OF, StageJournal
from mmq.workdir.output_shards import SCALE_NAME, hybrid_specs, layers_and_rest, scale_name, shard_name
from mmq.workdir.workspace import AWQ, HYBRID, Workspace

name = "restore"
output = HYBRID
EXPERT_TARGETS = "restore.expert_targets"


def plan(workspace: Workspace) -> Plan:
    """One output shard per decoder layer and one for the rest, as the awq stage has them."""
    source = workspace.source
    units = []
    tensors: list[str] = []
    for layer in layers_and_rest(workspace):
        specs = hybrid_specs(workspace, layer)
        tensors += (spec.name for spec in specs)
        units.append(Unit(shard_name(workspace, layer), sum(spec.nbytes for spec in specs), shard_size(specs)))
    largest = max(spec.nbytes for spec in source.specs.values())
    memory = BASE_MEMORY + workspace.recipe.worker_count * (largest + max(unit.read for unit in units))
    return Plan(name, workspace.folder(AWQ), workspace.folder(HYBRID), units, memory, tensors=tensors)


def checks(workspace: Workspace, before: Set[str]) -> list[Check]:
    return [] if "awq" in before else [Check("awq output", _awq_output, weights=False)]


def fingerprint(workspace: Workspace) -> dict[str, Any]:
    return {
        "model.source": workspace.source.checkpoint.fingerprint(),
        f"awq {OUTPUT_OF}": workspace.journal.stage("awq").digest(AWQ),
        "restore.attention_activations": workspace.recipe.restore.attention_activations,
        # Where it is the default nothing depends on it, and runs that were begun before there was the key go on.
        **({"restore.attention": "fp8_block"} if workspace.rounded else {}),
        **({EXPERT_TARGETS: "both"} if _expert_targets(workspace) == "both" else {}),
    }


def _expert_targets(workspace: Workspace) -> str:
    """As the recipe has it. Of most families it decides nothing: what they were begun with is no reason to stop."""
    if has_two_names(workspace.architecture):
        return workspace.recipe.restore.expert_targets
    return str(workspace.journal.stage(name).said(EXPERT_TARGETS))


def work(workspace: Workspace, plan: Plan, journal: StageJournal) -> None:
    source, reporter = workspace.source, workspace.reporter
    _awq_output(workspace)
    awq_journal = workspace.journal.stage("awq")
    quantized = Checkpoint.open(plan.source)
    pending = own_units(workspace, plan, journal)
    if pending:
        check_attention(workspace, quantized)

    layers = {shard_name(workspace, layer): layer for layer in layers_and_rest(workspace)}

    def restore(unit: Unit, stop: threading.Event) -> None:
        specs = hybrid_specs(workspace, layers[unit.name])
        done, total = 0, unit.read + unit.written
        reporter.step(unit.name, "reading", done, total)
        awq_journal.check_content(f"{AWQ}/{unit.name}")
        origins = {spec.name: _original(workspace, spec.name) for spec in specs}
        source.checkpoint.read_ahead(filter(None, origins.values()), stop)
        with (
            source.checkpoint.reader() as originals,
            quantized.reader() as results,
            write_shard(plan.folder / unit.name, specs) as shard,
        ):
            for spec in shard.specs:
                check_stop(stop)
                reporter.step(unit.name, "copying", done, total, spec.name)
                origin = origins[spec.name]
                tensor = originals[origin] if origin else results[spec.name]
                if origin in workspace.rounded:
                    # A shard has its scales where they fit in, not beside their weights.
                    scale = block_scales(tensor)
                    tensor = scale if spec.name == scale_name(origin) else quantize_block(tensor, scale)
                shard.add(spec.name, tensor)
                done += 2 * spec.nbytes
        finish_unit(workspace, journal, unit.name, {f"{HYBRID}/{unit.name}": shard.record})

    in_threads(pending, restore, workspace.recipe.worker_count)


def complete(workspace: Workspace, plan: Plan, journal: StageJournal) -> None:
    source = workspace.source
    kept = [name.removesuffix(".weight") for name in (*workspace.kept_scales, *_in_order(workspace))]
    config = output_config(workspace.architecture, workspace.recipe, source.checkpoint.config, kept)
    finish_folder(source.checkpoint, plan.folder, config, [unit.name for unit in plan.units])


def _in_order(workspace: Workspace) -> list[str]:
    """What is rounded to fp8, by layers and as the table has it."""
    arch, layers = workspace.architecture, range(workspace.source.layer_count())
    names = (arch.layer_prefix(layer) + weight.name for layer in layers for weight in arch.attention_of(layer))
    return [name for name in names if name in workspace.rounded]


def _awq_output(workspace: Workspace) -> str:
    """The awq stage's files are whole, and were calibrated with the attention that is restored. Raises JournalError."""
    folder, journal = workspace.folder(AWQ), workspace.journal.stage("awq")
    if not journal.complete:
        raise JournalError(f"{folder} is not complete; run `mmq awq` first")
    attention = {"restore.attention": "fp8_block" if workspace.rounded else None}
    journal.check_fingerprint(journal.fingerprint | attention)
    journal.check_files(AWQ)
    return f"{len(journal.units)} units in {folder}"


def check_attention(workspace: Workspace, quantized: Checkpoint) -> None:
    """Raises CheckpointError where awq changed a tensor that attention depends on."""
    source, arch = workspace.source, workspace.architecture
    groups = [[arch.embedding]]
    for layer in range(source.layer_count()):
        prefix = arch.layer_prefix(layer)
        tensors = [*arch.attention_inputs(layer), *(weight.name for weight in arch.kept(layer))]
        tensors += [w.name for w in arch.scaled(layer) if prefix + w.name in workspace.kept_scales]
        groups.append([prefix + local for local in tensors])
    with source.checkpoint.reader() as originals, quantized.reader() as results:
        for names in groups:
            scales = [source.scales[tensor] for tensor in names if tensor in source.scales]
            source.checkpoint.read_ahead([*names, *scales])
            quantized.read_ahead(names)
            for tensor in names:
                if not _same_bytes(source.read(originals, tensor), results[tensor]):
                    raise CheckpointError(
                        f"{tensor} differs between {source.checkpoint.folder} and"
                        f" {quantized.folder / quantized.shard_of(tensor)}: the original attention would not fit this"
                        " awq output; run `mmq awq --restart` to make it anew"
                    )


def _original(workspace: Workspace, name: str) -> str | None:
    """The source's tensor whose bytes a tensor of the hybrid checkpoint has; None for what awq made."""
    source, arch = workspace.source, workspace.architecture
    weight = name.removesuffix(SCALE_NAME) + "weight" if name.endswith(SCALE_NAME) else name
    layer, local = arch.split(weight)
    if weight in workspace.rounded:
        return weight
    if weight in workspace.kept_scales or (layer is not None and local in {kept.name for kept in arch.kept(layer)}):
        return name if weight == name else source.scales[weight]
    if arch.component(name) in ("embeddings", "head") or local == arch.router_bias:
        return name
    return None


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
