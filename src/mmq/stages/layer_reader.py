"""A model's layers onto the device, from the fp8 source or from the dequant stage's folder."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from mmq.machine.transfer import Lane
from mmq.quantize.decoder_layer import embed
from mmq.quantize.layer import LayerContent
from mmq.source.model import SourceModel
from mmq.stages.awq_checks import dequant_output
from mmq.storage.checkpoint import Checkpoint, TensorReader
from mmq.workdir.workspace import BF16, Workspace


class _Weights(Protocol):
    """Where a layer's dequantized tensors come from."""

    checkpoint: Checkpoint

    def read(self, reader: TensorReader, name: str, device: torch.device | None = None) -> torch.Tensor: ...

    def read_stack(self, reader: TensorReader, names: list[str], lane: Lane, target: torch.Tensor) -> None: ...


@dataclass
class _Bf16Folder:
    """The dequant stage's output."""

    checkpoint: Checkpoint

    def read(self, reader: TensorReader, name: str, device: torch.device | None = None) -> torch.Tensor:
        return reader[name]

    def read_stack(self, reader: TensorReader, names: list[str], lane: Lane, target: torch.Tensor) -> None:
        for name, own in zip(names, target, strict=True):
            lane.to_device(reader[name], own)


class LayerReader:
    """Reads layers, and what lies outside them. One thread at a time may read, another bring bytes near.

    Attributes:
        stopping: set, no more bytes are brought near.

    Raises:
        JournalError: the recipe names the dequant stage's folder, and it is not complete.
    """

    def __init__(self, workspace: Workspace, device: torch.device) -> None:
        self.workspace, self.source, self.device = workspace, workspace.source, device
        self.stopping = threading.Event()
        self._weights: _Weights = workspace.source
        if workspace.recipe.awq.source != "fp8":
            dequant_output(workspace)
            self._weights = _Bf16Folder(Checkpoint.open(workspace.folder(BF16)))
        self._lane = Lane(device)

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """bfloat16 [T, H] on the device: the embeddings of int64 [T]."""
        table = self.workspace.architecture.embedding
        self._bring_near([table])
        with self._weights.checkpoint.reader() as reader:
            return embed(reader[table], ids).to(self.device)

    @contextmanager
    def outside(self) -> Iterator[Callable[[str], torch.Tensor]]:
        """What reads the tensors that lie outside the layers, by their names."""
        self._bring_near(self.source.outside_names())
        with self._weights.checkpoint.reader() as reader:
            yield lambda name: self._weights.read(reader, name)

    def bring_near(self, layer: int, experts: range) -> None:
        """A layer's bytes into the system's page cache, which costs this process no memory: from the disk in large
        pieces, where mapped files would come page by page.

        Raises:
            JournalError: a shard is not what the dequant stage wrote.
        """
        self._bring_near(self._own_names(layer, experts))

    def read_now(self, layer: int, experts: range) -> LayerContent:
        """`read`, by the thread that computes with it."""
        content = self.read(layer, experts)
        self.lead(content)
        return content

    def lead(self, content: LayerContent) -> None:
        """What is computed from now on waits for the layer's copies."""
        self._lane.lead(content.tensors)

    def read(self, layer: int, experts: range) -> LayerContent:
        """Map a layer's tensors and stack some of its experts on the device: gate_up [E, 2I, H] and down [E, H, I]."""
        arch, source = self.workspace.architecture, self.source
        names = [(name, arch.split(name)[1]) for name in source.layer_names(layer)]
        hidden, inner = (int(source.config[key]) for key in (arch.hidden_key, arch.intermediate_key))
        experts = experts if arch.has_experts(layer) else range(0)
        with self._weights.checkpoint.reader() as reader, self._lane.running():
            content = LayerContent(
                torch.empty(len(experts), 2 * inner, hidden, dtype=torch.bfloat16, device=self.device),
                torch.empty(len(experts), hidden, inner, dtype=torch.bfloat16, device=self.device),
                # Copies: views would keep the shards mapped.
                {
                    local: self._weights.read(reader, name, self.device).clone()
                    for name, local in names
                    if arch.split_expert(local) is None
                },
            )
            for linear, target in (
                (arch.gate, content.gate_up[:, :inner]),
                (arch.up, content.gate_up[:, inner:]),
                (arch.down, content.down),
            ):
                weights = [f"{arch.expert_weight(layer, expert, linear)}.weight" for expert in experts]
                if weights:
                    self._weights.read_stack(reader, weights, self._lane, target)
        return content

    def _own_names(self, layer: int, experts: range) -> list[str]:
        """A layer's tensors that are read: all but the other experts'."""
        arch, names = self.workspace.architecture, []
        for name in self.source.layer_names(layer):
            parts = arch.split_expert(arch.split(name)[1])
            if parts is None or parts[0] in experts:
                names.append(name)
        return names

    def _bring_near(self, names: list[str]) -> None:
        checkpoint, team = self._weights.checkpoint, self.workspace.team
        whole = set()
        if not isinstance(self._weights, SourceModel):
            dequant = self.workspace.journal.stage("dequant")
            # Of several ranks each looks at its part of the shards, whose other tensors the others read.
            for shard in sorted({*map(checkpoint.shard_of, names)})[team.rank :: team.size]:
                if self.stopping.is_set():
                    return
                if dequant.check_content(f"{BF16}/{shard}"):
                    whole.add(shard)
        checkpoint.read_ahead((name for name in names if checkpoint.shard_of(name) not in whole), self.stopping)
