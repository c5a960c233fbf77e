"""The awq stage's first part, where the recipe asks for it: what errors of each layer's output cost, by a gradient.

Some calibration samples go through the source, and the loss's gradient comes back, one layer in memory at a time. What
goes into a layer stays on the disk until the gradient has come through it. Of several ranks each takes whole batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor, Future
from pathlib import Path

import torch
from safetensors.torch import load_file

from mmq.errors import DeviceMemoryError, JournalError, one_line
from mmq.machine.device import release_memory
from mmq.machine.team import Team
from mmq.quantize.decoder_layer import DecoderLayer, transformers_config
from mmq.quantize.fisher import SourceLayer, fisher, following, spread_samples
from mmq.quantize.head import Head
from mmq.quantize.rounding import Fisher
from mmq.source.model import SourceModel
from mmq.source.tokens import Tokens
from mmq.stages.base import Unit
from mmq.stages.layer_reader import LayerReader
from mmq.storage.shards import save_tensors
from mmq.workdir.journal import StageJournal
from mmq.workdir.layer_files import LayerFiles
from mmq.workdir.workspace import Workspace

HEAD = "gradient-head"


def forward_unit(layer: int) -> str:
    return f"forward-{layer:05d}"


def gradient_unit(layer: int) -> str:
    """Taking the gradient through a layer, to the output of the one before it."""
    return f"gradient-{layer:05d}"


def units(source: SourceModel, layer_bytes: list[int], arithmetic: int) -> list[Unit]:
    """All units, in order.

    Args:
        layer_bytes: of each layer, as it is read.
        arithmetic: of one forward through a layer's experts, in the plan's measure.
    """
    layers = range(source.layer_count())
    cost = [arithmetic if source.architecture.has_experts(layer) else 0 for layer in layers]
    found = [Unit(forward_unit(layer), layer_bytes[layer], 0, cost[layer]) for layer in layers]
    # Forward once more, and back: the weights get no gradient.
    back = [Unit(gradient_unit(layer), layer_bytes[layer], 0, 2 * cost[layer]) for layer in reversed(layers[1:])]
    return [*found, Unit(HEAD, 0, 0), *back]


def remove_fisher(files: LayerFiles, layers: Iterable[int], journal: StageJournal) -> None:
    """All layers are quantized: what errors of their outputs cost is not needed any more."""
    for layer in layers:
        unit = gradient_unit(layer + 1) if gradient_unit(layer + 1) in journal.units else HEAD
        if unit in journal.units:
            journal.forget_files(unit, [files.in_journal(files.fisher(layer))])
    journal.save()
    for layer in layers:
        files.fisher(layer).unlink(missing_ok=True)


def load_fisher(files: LayerFiles, layer: int, journal: StageJournal, team: Team, device: torch.device) -> Fisher:
    """What the pass found of a layer.

    Raises:
        JournalError: it is not what was written, or an earlier mmq wrote it, which kept the matrix alone.
    """
    path = files.fisher(layer)
    tensors = _load_file(files, path, journal, team, device)
    if tensors.keys() != {"matrix", "norms"}:
        raise JournalError(
            f"{path} is an earlier mmq's, which did not keep the gradient's norms; run `mmq {journal.name} --restart`"
            f" to begin {journal.name} anew"
        )
    return Fisher(**tensors)


def _load_file(
    files: LayerFiles, path: Path, journal: StageJournal, team: Team, device: torch.device
) -> dict[str, torch.Tensor]:
    """A finished unit's file, which the leading rank looks at for all."""
    if team.leads:
        journal.check_content(files.in_journal(path))
    return load_file(path, device=str(device))


class FisherPass:
    """One run of it, on all ranks.

    Args:
        ahead: a thread to bring bytes near in.
    """

    def __init__(
        self, workspace: Workspace, journal: StageJournal, tokens: Tokens, reader: LayerReader, ahead: Executor
    ) -> None:
        self.workspace, self.journal, self.reader, self.device = workspace, journal, reader, reader.device
        self.source, self.arch, self.team = workspace.source, workspace.architecture, workspace.team
        self.layers, self.experts = range(self.source.layer_count()), range(self.source.expert_count())
        self.config = transformers_config(self.arch, self.source.config)
        self.files = LayerFiles.of(workspace, journal.name)
        self.tokens, self.samples = tokens, spread_samples(tokens.lengths, workspace.recipe.awq.fisher_tokens)
        parts = tokens.ids.split(tokens.lengths)
        self.lengths = [tokens.lengths[sample] for sample in self.samples]
        self.ids = torch.cat([parts[sample] for sample in self.samples])
        self.ahead = ahead
        self._near: dict[int, Future[None]] = {}

    def run(self) -> None:
        """Do what the journal lacks; the matrices are in place for every rank when this returns.

        Raises:
            DeviceMemoryError: a layer and a batch of tokens don't fit.
            JournalError: a file is not what was written.
        """
        try:
            gradient = self._forward()
            # The leading rank wrote what all read.
            self.team.together()
            self._back(gradient)
            self.team.together()
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"{self.device} has too little memory for a whole layer and its gradient, which awq.fisher_tokens asks"
                f" for; 0 does without: {one_line(error)}"
            ) from None

    def _forward(self) -> torch.Tensor | None:
        """Through all layers to the loss: the gradient by the last layer's output, if it was taken now."""
        if HEAD in self.journal.units:
            return None
        pending = [layer for layer in self.layers if forward_unit(layer) not in self.journal.units]
        last = self.layers[-1]
        hidden = self._states(pending[0] - 1 if pending else last)
        for layer, after in zip(pending, [*pending[1:], last], strict=False):
            hidden = self._layer(layer, forward_unit(layer), after).forward(hidden)
            self._finish(forward_unit(layer), {self.files.forward(layer): {"hidden_states": hidden}})
        self.workspace.reporter.step(HEAD, "the loss and its gradient", 0, 1)
        gradient = self._head().gradient(hidden, following(self.ids, self.lengths).to(self.device))
        self._finish(HEAD, self._found(last, gradient), [(forward_unit(last), self.files.forward(last))])
        return gradient

    def _back(self, gradient: torch.Tensor | None) -> None:
        """Back through all layers but the first."""
        for layer in reversed(self.layers[1:]):
            unit, above = gradient_unit(layer), HEAD if layer == self.layers[-1] else gradient_unit(layer + 1)
            if unit in self.journal.units:
                continue
            if gradient is None:
                gradient = self._load(self.files.gradient(layer))
            below = self._states(layer - 1)
            gradient = self._layer(layer, unit, layer - 1).back(below, gradient)
            used = [
                (forward_unit(layer - 1), self.files.forward(layer - 1)),
                (above, self.files.gradient(layer)),
            ]
            self._finish(unit, self._found(layer - 1, gradient), used)

    def _layer(self, layer: int, unit: str, after: int) -> SourceLayer:
        """A layer on the device; the one that comes after it is brought near meanwhile."""
        self.workspace.reporter.step(unit, "reading", 0, 1)
        release_memory()
        if layer in self._near:
            self._near.pop(layer).result()
        else:
            self.reader.bring_near(layer, self.experts)
        content = self.reader.read_now(layer, self.experts)
        self._near = {after: self.ahead.submit(self.reader.bring_near, after, self.experts)}
        self.workspace.reporter.step(unit, "computing", 0.2, 1)
        decoder = DecoderLayer(self.arch, self.config, layer, content.rest, self.device)
        return SourceLayer(decoder, content, self.lengths, self.team)

    def _head(self) -> Head:
        arch = self.arch
        with self.reader.outside() as read:
            head = read(arch.head_of(self.source.specs))
            return Head(arch, self.config, read(arch.final_norm).to(self.device), head.to(self.device))

    def _found(self, layer: int, gradient: torch.Tensor) -> dict[Path, dict[str, torch.Tensor]]:
        """The files of the gradient by a layer's output."""
        found = {self.files.gradient(layer): {"gradient": gradient}} if layer else {}
        if self.arch.has_experts(layer):
            of_these = fisher(gradient)
            norms = [of_these.norms.new_full((length,), torch.nan) for length in self.tokens.lengths]
            for sample, own in zip(self.samples, of_these.norms.split(self.lengths), strict=True):
                norms[sample] = own
            found[self.files.fisher(layer)] = {"matrix": of_these.matrix, "norms": torch.cat(norms)}
        return found

    def _states(self, layer: int) -> torch.Tensor:
        """A layer's output, or of -1 the embeddings: bfloat16 [T, H] on the device."""
        if layer < 0:
            return self.reader.embedded(self.ids)
        return self._load(self.files.forward(layer))

    def _load(self, path: Path) -> torch.Tensor:
        (tensor,) = _load_file(self.files, path, self.journal, self.team, self.device).values()
        return tensor

    def _finish(
        self, unit: str, files: dict[Path, dict[str, torch.Tensor]], used: Iterable[tuple[str, Path]] = ()
    ) -> None:
        """Files of a unit, then the journal, then files that no one needs any more may go; the leading rank's.

        Args:
            used: such files, with the units that wrote them.
        """
        if not self.team.leads:
            return
        name = self.files.in_journal
        records = {
            name(path): save_tensors(path, {key: tensor.cpu() for key, tensor in tensors.items()})
            for path, tensors in files.items()
        }
        for owner, path in used:
            self.journal.forget_files(owner, [name(path)])
        self.journal.finish_unit(unit, records)
        for _, path in used:
            path.unlink(missing_ok=True)
        self.workspace.reporter.unit(unit)
