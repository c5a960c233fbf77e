"""Weights of the two sides that eval compares: the fp8 source and the hybrid checkpoint, dequantized layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from mmq.errors import CheckpointError
from mmq.families.table import Architecture
from mmq.machine.team import ALONE, Team
from mmq.quantize.layer import LayerContent
from mmq.source.model import SourceModel
from mmq.storage.checkpoint import Checkpoint, TensorReader
from mmq.tensors.fp8 import dequantize_block
from mmq.tensors.int4 import QuantizedStack, quantize_in_place
from mmq.tensors.smoothing import applied_scale
from mmq.workdir.output_shards import scale_name


class LayerWeights(Protocol):
    """A checkpoint whose layers come dequantized."""

    @property
    def checkpoint(self) -> Checkpoint: ...

    def names(self, layer: int) -> tuple[list[str], list[str]]:
        """Weights of the layer's experts under their dequantized names, and all its other tensors."""

    def read(self, reader: TensorReader, tensor: str, device: torch.device) -> torch.Tensor:
        """A dequantized tensor."""


@dataclass(frozen=True)
class SourceWeights:
    """The fp8 source."""

    source: SourceModel

    @property
    def checkpoint(self) -> Checkpoint:
        return self.source.checkpoint

    def names(self, layer: int) -> tuple[list[str], list[str]]:
        arch, names = self.source.architecture, self.source.layer_names(layer)
        experts = [tensor for tensor in names if arch.split_expert(arch.split(tensor)[1])]
        return experts, [tensor for tensor in names if tensor not in set(experts)]

    def read(self, reader: TensorReader, tensor: str, device: torch.device) -> torch.Tensor:
        return self.source.read(reader, tensor, device)


@dataclass(frozen=True)
class HybridWeights:
    """The hybrid checkpoint, dequantized from its own bytes."""

    checkpoint: Checkpoint
    architecture: Architecture

    @cached_property
    def _by_layer(self) -> dict[int | None, list[str]]:
        result: dict[int | None, list[str]] = {}
        for tensor in self.checkpoint.specs:
            result.setdefault(self.architecture.split(tensor)[0], []).append(tensor)
        return result

    def names(self, layer: int) -> tuple[list[str], list[str]]:
        arch, names = self.architecture, self._by_layer.get(layer, [])
        inside = {tensor: arch.split_expert(arch.split(tensor)[1]) for tensor in names}
        experts = [t.removesuffix("_packed") for t, parts in inside.items() if parts and parts[2] == "weight_packed"]
        known = self.checkpoint.specs
        scales = {scale_name(t) for t in names if t.endswith(".weight") and scale_name(t) in known}
        return experts, [t for t, parts in inside.items() if parts is None and t not in scales]

    def read(self, reader: TensorReader, tensor: str, device: torch.device) -> torch.Tensor:
        packed = f"{tensor}_packed"
        if packed in reader.names:
            scale = reader[f"{tensor}_scale"].to(device)
            rows, columns = reader[f"{tensor}_shape"].tolist()
            values = unpack_from_int32(reader[packed].to(device), 4, torch.Size([rows, columns]))
            group = columns // scale.shape[1]
            return QuantizedStack(values.unsqueeze(0), scale.unsqueeze(0), group).dequantize(torch.bfloat16)[0]
        weight = reader[tensor].to(device)
        if weight.dtype == torch.float8_e4m3fn:
            return dequantize_block(weight, reader[scale_name(tensor)].to(device).float())
        return weight


def read_layer(
    weights: LayerWeights, arch: Architecture, layer: int, device: torch.device, team: Team = ALONE
) -> LayerContent:
    """A dequantized layer with its experts stacked on the device: gate_up [E, 2I, H] and down [E, H, I] in bfloat16; of
    several ranks, this one's experts.

    Raises:
        CheckpointError: an expert is missing.
    """
    expert_names, other_names = weights.names(layer)
    count = int(arch.settings(weights.checkpoint.config)[arch.experts_key])
    count = count if arch.has_experts(layer) else 0
    if len(set(expert_names)) != count * len(arch.expert_linears):
        raise CheckpointError(f"{weights.checkpoint.folder}: layer {layer} has not all of its {count} experts")
    own = team.part(count)
    mine = [name for name in expert_names if _expert(arch, name) in own]
    return _stacked(weights, arch, own, [*mine, *other_names], device)


def _stacked(
    weights: LayerWeights, arch: Architecture, experts: range, names: list[str], device: torch.device
) -> LayerContent:
    """Some of a layer's tensors."""
    with weights.checkpoint.reader() as reader:
        tensors = ((arch.split(tensor)[1], weights.read(reader, tensor, device)) for tensor in names)
        return LayerContent.stacked(arch, experts, tensors, device)


def nearest_smoothed(
    source: LayerContent,
    smoothed: LayerWeights,
    arch: Architecture,
    layer: int,
    inner: Callable[[], torch.Tensor],
    group_size: int,
    device: torch.device,
    team: Team = ALONE,
) -> LayerContent:
    """The source's experts rounded to nearest under a result's smoothing, with all else as the result has it.

    Args:
        source: overwritten.
        smoothed: the result, of whose layer all but the experts is read.
        inner: gives float32 [E, I], the scales of the down layers' inputs; asked for where there are experts.
    """
    rest = _stacked(smoothed, arch, range(0), smoothed.names(layer)[1], device).rest
    if arch.has_experts(layer):
        before, after = (content[arch.smooth_norm].to(device) for content in (source.rest, rest))
        applied = applied_scale(before, after, arch.norm_offset)
        scales = inner().to(device)
        own = scales[team.part(len(scales)).start :][: len(source.down)]
        divisors = torch.cat([torch.ones_like(own), own], dim=1).unsqueeze(2)  # gate's rows stay as they are
        quantize_in_place(source.gate_up, applied, divisors, group_size)
        quantize_in_place(source.down, own.unsqueeze(1), None, group_size)
    return LayerContent(source.gate_up, source.down, rest)


def _expert(arch: Architecture, name: str) -> int:
    """The number of the expert that a weight is of."""
    parts = arch.split_expert(arch.split(name)[1])
    assert parts is not None
    return parts[0]


def take_kv_scales(arch: Architecture, content: LayerContent) -> dict[str, torch.Tensor]:
    """Take `k_scale` and `v_scale`, float32 [1] each, out of a layer's tensors; the source's layers have none."""
    found = {scale: content.rest.pop(f"{arch.attention_module}.{scale}", None) for scale in ("k_scale", "v_scale")}
    return {scale: value for scale, value in found.items() if value is not None}
