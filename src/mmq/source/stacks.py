"""Sources that store all experts of a layer in one tensor, seen as those that store each by itself."""

from __future__ import annotations

from mmq.errors import CheckpointError, shown
from mmq.families.table import Architecture
from mmq.storage.checkpoint import Checkpoint, Part
from mmq.storage.shards import TensorSpec

STACKED_DTYPES = ("BF16", "F32", "F16")


def unstacked(checkpoint: Checkpoint, arch: Architecture) -> Checkpoint:
    """The checkpoint with each expert's matrices under names of their own, as views of what lies in the files;
    config.json's sizes must be numbers.

    Raises:
        CheckpointError: a stack has another shape than config.json's sizes, is quantized, or an expert is there twice.
    """
    parts: dict[str, Part] = {}
    shards: dict[str, dict[str, TensorSpec]] = {}
    for shard, specs in checkpoint.shards.items():
        shards[shard] = {}
        for name, spec in specs.items():
            own = _parts(checkpoint, arch, spec)
            shards[shard] |= {
                part: TensorSpec(part, spec.dtype, (place.last - place.first, spec.shape[2]))
                for part, place in own.items()
            } or {name: spec}
            for part in sorted(own.keys() & checkpoint.specs.keys()):
                raise CheckpointError(f"{checkpoint.folder}: {part} is there twice, by itself and in {name}")
            parts |= own
    return Checkpoint(checkpoint.folder, checkpoint.config, shards, parts) if parts else checkpoint


def _parts(checkpoint: Checkpoint, arch: Architecture, spec: TensorSpec) -> dict[str, Part]:
    """What a stack is made of, by the names that it would have by itself; empty where a tensor is none."""
    prefix = next((prefix for prefix in arch.carried_layers if spec.name.startswith(prefix)), None)
    local = spec.name.removeprefix(prefix) if prefix else arch.split(spec.name)[1]
    stack = next((stack for stack in arch.stacks if local == stack.name), None)
    if stack is None or local == spec.name:
        return {}
    prefix = spec.name.removesuffix(local)
    config = arch.settings(checkpoint.config)
    experts, hidden, inner = (config[key] for key in (arch.experts_key, arch.hidden_key, arch.intermediate_key))
    rows, columns = (hidden, inner) if stack.linears == (arch.down,) else (inner, hidden)
    expected = (experts, rows * len(stack.linears), columns)
    if spec.shape != expected:
        raise CheckpointError(
            f"{checkpoint.folder}: {spec.name} has the shape {shown(list(spec.shape))}, config.json's sizes make it"
            f" {list(expected)}"
        )
    if spec.dtype not in STACKED_DTYPES:
        raise CheckpointError(
            f"{checkpoint.folder}: {spec.name} is {spec.dtype} and holds all experts of a layer; only those in bf16 are"
            " read from one tensor"
        )
    return {
        f"{prefix}{arch.expert.format(expert=expert)}{linear}.weight": Part(
            spec, expert, place * rows, (place + 1) * rows
        )
        for expert in range(experts)
        for place, linear in enumerate(stack.linears)
    }
