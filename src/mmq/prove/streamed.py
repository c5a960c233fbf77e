"""What the evaluations share: held-out tokens, both checkpoints layer by layer, and the frame that begins and resumes.

Hidden states go through the decoder layers; one layer of one checkpoint is in memory at a time. After each layer the
hidden states are on disk and the journal says so. The head comes last, and with it the report.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from mmq.errors import CalibrationError, DeviceMemoryError, JournalError, one_line
from mmq.families.rotary import check_length
from mmq.machine.device import free_device, present_device
from mmq.prove.measures import predictions
from mmq.prove.memory import eval_memory
from mmq.prove.weights import HybridWeights, LayerWeights, SourceWeights
from mmq.quantize.decoder_layer import embed, transformers_config
from mmq.quantize.head import Head
from mmq.quantize.memory import Peaks
from mmq.quantize.routed_experts import LEAST_BUDGET, SPARE_MEMORY, default_budget
from mmq.recipe import Calibration, FileSamples, Recipe
from mmq.source.calibration import load_tokens
from mmq.source.model import SourceModel
from mmq.source.samples import read_files, read_samples
from mmq.stages.awq_checks import widest_layer
from mmq.stages.base import begin_run, check_disk, check_memory, free_disk, share_journal
from mmq.stages.preflight import Passed, check_outputs
from mmq.storage.atomic import FileRecord, make_folder, remove_temporaries, write_json
from mmq.storage.checkpoint import Checkpoint, read_json
from mmq.text import bytes_text
from mmq.workdir.journal import StageJournal
from mmq.workdir.layer_files import LayerFiles
from mmq.workdir.output_shards import layer_unit
from mmq.workdir.versions import versions
from mmq.workdir.workspace import HYBRID, Workspace

DEFAULT_DATA = "builtin:eval"
HEAD = "head"
# The fingerprint's field that says of which result the evaluation is.
RESULT_FIELD = "hybrid (restore's output)"


@dataclass(frozen=True)
class EvalSettings:
    """What to evaluate on.

    Attributes:
        data: JSONL as for calibration, from the recipe's root if relative.
        samples: lines from the top; all by default.
        sequence_length: tokens kept of each sample; by default as many as calibration keeps.
    """

    data: str = DEFAULT_DATA
    samples: int | None = None
    sequence_length: int | None = None


def units_of(source: SourceModel) -> list[str]:
    """What the journal names: every layer, then the head."""
    return [*map(layer_unit, range(source.layer_count())), HEAD]


class Streamed:
    """One run of an evaluation.

    Attributes:
        name: in the journal, and as a command.
        state: the folder of its files below the work_dir's state/.
        report_name: of its file in the work_dir.
        streams: at most so many hidden states are kept after a layer.
        at_once: so many are in memory.
        budget: bytes of working memory, where it is not what suits the device.
    """

    name: ClassVar[str]
    state: ClassVar[str]
    report_name: ClassVar[str]
    streams: int
    at_once: int
    budget: int | None

    def __init__(self, workspace: Workspace, settings: EvalSettings) -> None:
        self.workspace, self.settings, self.team = workspace, settings, workspace.team
        self.report_path = workspace.work_dir / self.report_name
        self.files = LayerFiles.of(workspace, self.state)
        self.journal: StageJournal = workspace.journal.stage(self.name)
        self.arch, self.source = workspace.architecture, workspace.source
        self.layers = range(self.source.layer_count())
        self.hybrid = _finished_hybrid(workspace)
        self.weights: dict[str, LayerWeights] = {
            "source": SourceWeights(self.source),
            "hybrid": HybridWeights(self.hybrid, self.arch),
        }
        self.configs = {
            key: transformers_config(self.arch, weights.checkpoint.config) for key, weights in self.weights.items()
        }
        length = settings.sequence_length or workspace.recipe.awq.calibration.sequence_length
        check_length(length, "the sequence length", self.source.config, self.arch)
        self.device = present_device(workspace.recipe.awq.device)
        self.budget = workspace.recipe.awq.memory_budget
        self.recipe = eval_recipe(workspace.recipe, settings)
        self.tokens = load_tokens(self.recipe, self.source.checkpoint.folder)
        self.contents = [content for *_, content in read_samples(self.recipe, read_files(self.recipe))]
        if max(self.tokens.lengths) < 2:
            raise CalibrationError(f"no sample of {settings.data} has two tokens: there is nothing to predict")

    def work(self) -> dict[str, int]:
        """How much each unit is of the whole, in any measure."""
        return dict.fromkeys(units_of(self.source), 1)

    def compute(self, pending: list[int]) -> None:
        """The layers that the journal lacks, then the head and the report; by all ranks."""
        raise NotImplementedError

    def check(self, restart: bool) -> list[Passed]:
        """Refuse what can't be done, before anything is written or forgotten; the leading rank's.

        Returns:
            what was looked at, here and when this was made.

        Raises:
            RecipeError: the report can't be written.
            DeviceMemoryError: the device, or the host, could not hold what is computed.
            DiskSpaceError: the hidden states would fill the disk.
            JournalError: it was begun with other inputs, or what it needs of an earlier stage is gone.
        """
        found = {
            "outputs": check_outputs(self.workspace, (), [self.report_name]),
            "result": f"{len(self.hybrid.specs):,} tensors in {self.hybrid.folder}",
            "device": str(self.device),
            "held-out samples": f"{len(self.tokens.lengths):,} samples, {self.tokens.ids.numel():,} tokens",
        }
        begun = not restart and (self.journal.units or self.journal.complete)
        if begun:
            self.journal.check_fingerprint(self._fingerprint())
            self.journal.check_files()
        done = "complete" if self.journal.complete else f"{len(self.journal.units)} units done"
        found["journal"] = done if begun else "nothing was begun"
        if restart or HEAD not in self.journal.units:
            least = self._memory(LEAST_BUDGET if self.device.type == "cuda" else 0)
            found["memory"] = check_memory(self.name, least, self.device, self._ways_out)
        if pending := list(self.layers) if restart else self._pending():
            found |= self.check_layers(pending)
        return [Passed(self.name, what, said) for what, said in found.items()]

    def _memory(self, budget: int) -> Peaks:
        arch, config = self.arch, self.source.config
        hidden, top_k = int(config[arch.hidden_key]), int(config[arch.top_k_key])
        rows, gpu = self.source.specs[arch.embedding].shape[0], self.device.type != "cpu"
        tokens, layer = self.tokens.ids.numel(), widest_layer(self.source)
        return eval_memory(layer, tokens, hidden, rows, top_k, self.at_once, budget, gpu, self.team.size)

    @property
    def _ways_out(self) -> str:
        """Of too little memory."""
        host = "; awq.device: cpu needs none of the GPU's" if self.device.type != "cpu" else ""
        return f"fewer or shorter samples (--samples, --sequence-length) need less{host}"

    def check_layers(self, pending: Sequence[int]) -> dict[str, str]:
        """`check` of layers that are to be computed: what was found, by what it is."""
        width = int(self.source.config[self.arch.hidden_key])
        states = self.streams * self.tokens.ids.numel() * width * torch.bfloat16.itemsize
        # The last layer's go only after the next one's are in place.
        check_disk(self.files.folder, 2 * states)
        free = bytes_text(free_disk(self.files.folder))
        return {"disk": f"{bytes_text(2 * states)} needed, {free} free"}

    def run(self, restart: bool) -> dict[str, Any]:
        """Run or resume: the report's content."""
        if self.team.leads:
            self._begin(restart)
        share_journal(self.workspace)
        self.journal = self.workspace.journal.stage(self.name)
        if not self.journal.complete:
            if HEAD not in self.journal.units:
                self._compute()
            if self.team.leads:
                self.files.remove_hidden()
                self.journal.finish()
                self.workspace.reporter.finish(self.name)
        self.team.together()
        return read_json(self.report_path)

    def _begin(self, restart: bool) -> None:
        """Begin anew or resume; the leading rank's."""
        if restart:
            self._forget()
        self.journal.begin(self._fingerprint())
        if self.journal.complete:
            self.workspace.reporter.note(f"{self.name} is complete: {self.report_path}")
            return
        make_folder(self.files.folder)
        remove_temporaries(self.files.folder)
        begin_run(self.workspace, self.journal)

    def _pending(self) -> list[int]:
        """Layers that the journal lacks."""
        return [layer for layer in self.layers if layer_unit(layer) not in self.journal.units]

    def _compute(self) -> None:
        reporter, pending = self.workspace.reporter, self._pending()
        reporter.start(self.name, self.work(), self.journal.units, sum(map(self._bytes_of, pending)))
        if len(pending) < len(self.layers):
            done = len(self.layers) - len(pending)
            reporter.note(f"{self.name} resumes: {done} of {len(self.layers)} layers are done")
        if self.device.type == "cuda":
            room = free_device(self.device) - self._memory(0).device - SPARE_MEMORY
            # Half of it is taken.
            self.budget = max(LEAST_BUDGET, min(self.budget or default_budget(self.device), 2 * room))
        try:
            self.compute(pending)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"{self.device} has too little memory left for {self.name}; {self._ways_out}: {one_line(error)}"
            ) from None

    def last_hidden(self) -> Path | None:
        """The hidden states after the last finished layer, the only ones that are kept."""
        done = [layer for layer in self.layers if layer_unit(layer) in self.journal.units]
        path = self.files.hidden(done[-1]) if done else None
        if self.team.leads:
            self.files.remove_hidden(but=path)
        return path

    def embedded(self, key: str) -> torch.Tensor:
        """bfloat16 [T, H] on the device: a checkpoint's embeddings of the tokens."""
        with self.weights[key].checkpoint.reader() as reader:
            return embed(reader[self.arch.embedding], self.tokens.ids).to(self.device)

    def heads(self) -> dict[str, Head]:
        """Each checkpoint's head; one copy where they agree, as they should."""
        arch, found = self.arch, {}
        truth: tuple[torch.Tensor, torch.Tensor, Head] | None = None
        for key, weights in self.weights.items():
            with weights.checkpoint.reader() as reader:
                head = reader[arch.head_of(reader.names)]
                norm, weight = reader[arch.final_norm].to(self.device), head.to(self.device)
                if truth is not None and torch.equal(norm, truth[0]) and torch.equal(weight, truth[1]):
                    found[key] = truth[2]
                    continue
                found[key] = Head(arch, self.configs[key], norm.clone(), weight.clone())
                truth = truth or (norm.clone(), weight.clone(), found[key])
        return found

    def finish_layer(self, layer: int, hidden: FileRecord, record: dict[str, Any]) -> None:
        """The states after a layer are on disk: its record, the journal, then the last layer's states may go; the
        leading rank's."""
        hidden_path, record_path = self.files.hidden(layer), self.files.record(layer)
        files = {
            self.files.in_journal(hidden_path): hidden,
            self.files.in_journal(record_path): write_json(record_path, record),
        }
        self._finish_unit(layer_unit(layer), files, layer - 1)
        self.files.remove_hidden(but=hidden_path)

    def finish_head(self, found: dict[str, Any], seconds: float) -> None:
        """Write the report; the leading rank's.

        Args:
            found: what is its own of this evaluation.
            seconds: of the head.
        """
        taken = [record["seconds"] for record in self.records()]
        report = {
            "settings": self.describe(),
            "tokens": {
                "samples": len(self.tokens.lengths),
                "read": self.tokens.ids.numel(),
                "predicted": predictions(self.tokens)[0].numel(),
                "fingerprint": self.tokens.fingerprint(),
            },
            **found,
            "versions": versions(),
            "seconds": {"layers": taken, HEAD: seconds, "total": round(sum(taken) + seconds, 3)},
        }
        files = {self.files.in_journal(self.report_path): write_json(self.report_path, report)}
        self._finish_unit(HEAD, files, self.layers[-1])
        self.workspace.reporter.unit(HEAD, seconds=seconds)

    def records(self) -> list[dict[str, Any]]:
        """What was found in each layer."""
        return [read_json(self.files.record(layer)) for layer in self.layers]

    def describe(self) -> dict[str, Any]:
        """The report's `settings`."""
        calibration = self.recipe.awq.calibration
        return {
            "source": str(self.source.checkpoint.folder),
            "source_fingerprint": self.source.checkpoint.fingerprint(),
            "hybrid": str(self.workspace.folder(HYBRID)),
            "data": [samples.model_dump() for samples in calibration.files],
            "sequence_length": calibration.sequence_length,
            "group_size": self.workspace.recipe.awq.group_size,
            "device": str(self.device),
        }

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "model.source": self.source.checkpoint.fingerprint(),
            RESULT_FIELD: self.workspace.journal.stage("restore").digest(HYBRID),
            "data (its tokens)": self.tokens.fingerprint(),
            "awq.group_size": self.workspace.recipe.awq.group_size,
        }

    def _bytes_of(self, layer: int) -> int:
        """Bytes of a layer in both checkpoints."""
        found = 0
        for weights in self.weights.values():
            specs = weights.checkpoint.specs
            found += sum(spec.nbytes for tensor, spec in specs.items() if self.arch.split(tensor)[0] == layer)
        return found

    def _forget(self) -> None:
        """Begin anew."""
        self.journal.reset()
        self.report_path.unlink(missing_ok=True)
        if self.files.folder.exists():
            shutil.rmtree(self.files.folder)

    def _finish_unit(self, unit: str, files: dict[str, FileRecord], before: int) -> None:
        """Journal a unit; the hidden states of the layer before it are needed no more."""
        if before >= 0:
            self.journal.forget_files(layer_unit(before), [self.files.in_journal(self.files.hidden(before))])
        self.journal.finish_unit(unit, files)


def eval_recipe(recipe: Recipe, settings: EvalSettings) -> Recipe:
    """The recipe with the held-out samples in calibration's place, so that both are tokenized alike."""
    calibration = Calibration(
        files=[FileSamples(path=settings.data, samples=settings.samples)],
        sequence_length=settings.sequence_length or recipe.awq.calibration.sequence_length,
    )
    return recipe.model_copy(update={"awq": recipe.awq.model_copy(update={"calibration": calibration})})


def _finished_hybrid(workspace: Workspace) -> Checkpoint:
    """The hybrid folder. Raises JournalError where it is not complete, or was made from another source."""
    restore, folder = workspace.journal.stage("restore"), workspace.folder(HYBRID)
    if not restore.complete:
        raise JournalError(f"{folder} is not complete; run `mmq restore` first")
    restore.check_files(HYBRID)
    source = workspace.source.checkpoint
    if restore.fingerprint.get("model.source") != source.fingerprint():
        raise JournalError(f"{folder} was made from another source than {source.folder}")
    return Checkpoint.open(folder)
