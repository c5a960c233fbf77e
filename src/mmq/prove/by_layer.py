"""What each layer does to the model by itself: KL with that layer as the result has it, and all others the source's.

Up to its layer such a stream is the source's, which branches off there; from then on it goes through the source's
layers. So there are as many streams after a layer as layers with experts before it: on disk, one at a time in memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mmq.errors import CheckpointError
from mmq.machine.device import release_memory
from mmq.prove.forward import run_layer
from mmq.prove.measures import Measured, measure, relative_error
from mmq.prove.streamed import HEAD, EvalSettings, Streamed
from mmq.prove.weights import read_layer, take_kv_scales
from mmq.quantize.decoder_layer import DecoderLayer
from mmq.quantize.layer import LayerContent
from mmq.source.model import SourceModel
from mmq.storage.shards import DTYPE_NAMES, TensorSpec, write_shard
from mmq.tensors.fp8 import is_finite
from mmq.workdir.output_shards import layer_unit
from mmq.workdir.workspace import Workspace

name = "eval --by-layer"
REPORT_NAME = "by_layer.json"
SOURCE = "source"
# Streams that meet the head at one time.
AT_ONCE = 3


def work_of(source: SourceModel) -> dict[str, int]:
    """The units, and how many forwards each is."""
    found, streams = {}, 0
    for layer in range(source.layer_count()):
        streams += source.architecture.has_experts(layer)
        found[layer_unit(layer)] = streams + 1
    return found | {HEAD: streams + 1}


class ByLayer(Streamed):
    """One run of it."""

    name = name
    state = "eval-by-layer"
    report_name = REPORT_NAME

    def __init__(self, workspace: Workspace, settings: EvalSettings) -> None:
        super().__init__(workspace, settings)
        self.routed = [layer for layer in self.layers if self.arch.has_experts(layer)]
        self.streams = len(self.routed) + 1
        self.at_once = AT_ONCE + 1

    def work(self) -> dict[str, int]:
        return work_of(self.source)

    def compute(self, pending: list[int]) -> None:
        path = self.last_hidden()
        truth = self.embedded(SOURCE) if path is None else self._read(path, SOURCE)
        for layer in pending:
            truth = self._run_layer(layer, truth)
        self._run_head(truth)

    def _run_layer(self, layer: int, truth: torch.Tensor) -> torch.Tensor:
        """All streams through one layer: the source's states [T, H] after it. All are on disk when this returns."""
        begin, unit = time.perf_counter(), layer_unit(layer)
        names = [*map(layer_unit, [number for number in self.routed if number <= layer]), SOURCE]
        specs = [TensorSpec(stream, DTYPE_NAMES[truth.dtype], tuple(truth.shape)) for stream in names]
        kept: dict[str, torch.Tensor] = {}
        # The names' order is the file's, and that in which they are computed.
        with write_shard(self.files.hidden(layer), specs) if self.team.leads else nullcontext() as shard:
            for stream, states in self._streams(layer, truth, names):
                if not is_finite(states):
                    raise CheckpointError(f"{stream}: the output of layer {layer} is NaN or infinite")
                if shard is not None:
                    shard.add(stream, states)
                if stream in (unit, SOURCE):
                    kept[stream] = states
        seconds = round(time.perf_counter() - begin, 3)
        error = {"relative_error": relative_error(kept[unit], kept[SOURCE])} if unit in kept else {}
        if shard is not None:
            self.finish_layer(layer, shard.record, {"layer": layer, **error, "seconds": seconds})
        # The others read what the leading rank has written.
        self.team.together()
        shown = {"by itself": f"{error['relative_error']:.2%}"} if error else {}
        self.workspace.reporter.unit(unit, **shown, seconds=seconds)
        return kept[SOURCE]

    def _streams(self, layer: int, truth: torch.Tensor, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Each stream's states after a layer: those that branched off before it, the one that does here, the source's.

        Args:
            truth: the source's before it.
        """
        unit = layer_unit(layer)
        decoder, content = self._layer(SOURCE, layer)
        for place, stream in enumerate(names):
            self.workspace.reporter.step(unit, "computing", place, len(names), stream)
            if stream == unit:
                continue
            before = truth if stream == SOURCE else self._read(self.files.hidden(layer - 1), stream)
            states = self._forward(decoder, content, before)
            if stream == SOURCE and unit in names:
                del decoder, content, before
                release_memory()
                yield unit, self._forward(*self._layer("hybrid", layer), truth)
            yield stream, states

    def _layer(self, key: str, layer: int) -> tuple[DecoderLayer, LayerContent]:
        """A checkpoint's layer, dequantized; the KV cache stays bf16."""
        content = read_layer(self.weights[key], self.arch, layer, self.device, self.team)
        take_kv_scales(self.arch, content)
        return DecoderLayer(self.arch, self.configs[key], layer, content.rest, self.device), content

    def _forward(self, decoder: DecoderLayer, content: LayerContent, hidden: torch.Tensor) -> torch.Tensor:
        group_size = self.workspace.recipe.awq.group_size
        return run_layer(decoder, content, hidden, self.tokens.lengths, group_size, budget=self.budget, team=self.team)

    def _read(self, path: Path, stream: str) -> torch.Tensor:
        """bfloat16 [T, H] on the device."""
        with safe_open(path, "pt") as file:
            states: torch.Tensor = file.get_tensor(stream)
        return states.to(self.device)

    def _run_head(self, truth: torch.Tensor) -> None:
        """Final norm, head and metrics of each stream, and the report."""
        begin = time.perf_counter()
        head, path = self.heads()[SOURCE], self.files.hidden(self.layers[-1])
        measured: dict[str, Measured] = {}
        for first in range(0, len(self.routed), AT_ONCE):
            self.workspace.reporter.step(HEAD, "computing", first, len(self.routed))
            names = map(layer_unit, self.routed[first : first + AT_ONCE])
            hidden = {SOURCE: truth} | {stream: self._read(path, stream) for stream in names}
            measured |= measure(hidden, dict.fromkeys(hidden, head), SOURCE, self.tokens, self.team)
        if self.team.leads:
            errors = {record["layer"]: record.get("relative_error") for record in self.records()}
            layers = [
                {"layer": layer, "relative_error": errors[layer], **measured[layer_unit(layer)].metrics()}
                for layer in self.routed
            ]
            self.finish_head({"layers": layers}, round(time.perf_counter() - begin, 3))


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """by_layer.json as a table for people."""
    return [
        {
            "layer": entry["layer"],
            "KL (nats)": f"{entry['kl']:.6f}",
            "KL ±": f"{entry['kl_standard_error']:.6f}" if entry["kl_standard_error"] else "",
            "same top-1": f"{entry['top1_agreement']:.2%}",
            "hidden after it": f"{entry['relative_error']:.2%}",
        }
        for entry in report["layers"]
    ]


def told(report: dict[str, Any], whole: float | None, most: int = 5) -> str:
    """Which layers cost most, in words.

    Args:
        report: content of by_layer.json.
        whole: the result's own KL on the same samples, where it is known.
    """
    layers = sorted(report["layers"], key=lambda entry: -float(entry["kl"]))
    total = sum(entry["kl"] for entry in layers)
    named = ", ".join(f"{entry['layer']} ({_with_error(entry)})" for entry in layers[:most])
    together = "" if whole is None else f", {whole:.5f} with all of them"
    return f"KL with one layer quantized and all others the source's: {total:.5f} summed up{together}; layers {named}"


def _with_error(entry: dict[str, Any]) -> str:
    error = entry["kl_standard_error"]
    return f"{entry['kl']:.6f}" + (f" ± {error:.6f}" if error else "")
