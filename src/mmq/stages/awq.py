"""Stage 2, awq: the experts of one decoder layer after the other, and the KV cache's scales, in one pass.

One layer is in memory at a time. While it computes, the next one is read and the last one's files are written: shard,
statistics and hidden states are on disk before the journal says so, and a killed run goes on from the hidden states.

Of several ranks each reads, searches, quantizes and writes its own experts of every layer. All hold the hidden states,
and find the same; the leading one writes down what is not of the experts.
"""

from __future__ import annotations

import socket
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mmq.errors import CalibrationError, DeviceMemoryError, JournalError, one_line
from mmq.machine.device import (
    free_device,
    named_device,
    open_files,
    peak_device,
    peak_host,
    peak_reserved,
    present_device,
    release_memory,
    reset_peak_device,
    resident_host,
)
from mmq.machine.threads import one_thread
from mmq.machine.transfer import Lane
from mmq.quantize.layer import LayerContent, LayerQuantizer, LayerResult
from mmq.quantize.memory import awq_memory, fisher_state
from mmq.quantize.rounding import EVIDENCE, Fisher
from mmq.quantize.routed_experts import LEAST_BUDGET, SPARE_MEMORY, default_budget
from mmq.serve.quantization_config import output_config
from mmq.source.model import SourceModel
from mmq.source.samples import most_fisher_tokens, most_tokens
from mmq.source.tokens import CACHE_NAME, Tokens, save_tokens
from mmq.stages import awq_fisher
from mmq.stages.awq_checks import calibration_tokens, check_groups, gradient_memory, widest_layer
from mmq.stages.awq_checks import checks as checks
from mmq.stages.awq_fisher import FisherPass, load_fisher, remove_fisher
from mmq.stages.base import BASE_MEMORY, Plan, Unit
from mmq.stages.layer_reader import LayerReader
from mmq.storage.atomic import FileRecord, make_folder, write_json
from mmq.storage.checkpoint import finish_folder, read_json
from mmq.storage.shards import (
    begin_shard,
    file_order,
    fill_shard,
    finish_shard,
    save_tensors,
    shard_size,
    write_shard,
)
from mmq.text import gib_text
from mmq.workdir.journal import StageJournal
from mmq.workdir.layer_files import LayerFiles
from mmq.workdir.output_shards import layer_unit, layers_and_rest, quantized_specs, shard_name
from mmq.workdir.workspace import AWQ, BF16, STATE, Workspace

name = "awq"
output = AWQ
OUTSIDE = "outside"
STATISTICS = "layers.json"
# Multiply-adds that take as long as a byte of a file, in order of magnitude: the layers' share of the work beside that
# of what is only copied.
OPERATIONS_PER_BYTE = 1000


def plan(workspace: Workspace) -> Plan:
    """One unit per decoder layer and one for all that lies outside them."""
    source, recipe = workspace.source, workspace.recipe
    check_groups(source, recipe.awq.group_size)
    fp8 = recipe.awq.source == "fp8"
    tokens = most_tokens(recipe)
    arithmetic = tokens * operations_per_token(source, recipe.awq.n_grid) // OPERATIONS_PER_BYTE
    units, reads = [], []
    tensors: list[str] = []
    for layer in layers_and_rest(workspace):
        names = source.outside_names() if layer is None else source.layer_names(layer)
        read = sum((source.checkpoint.specs if fp8 else source.specs)[tensor].nbytes for tensor in names)
        reads.append(read)
        specs = quantized_specs(workspace, layer)
        tensors += (spec.name for spec in specs)
        written = shard_size(specs)
        if layer is None:
            units.append(Unit(OUTSIDE, read, written))
        else:
            searched = arithmetic if source.architecture.has_experts(layer) else 0
            units.append(Unit(layer_unit(layer), read, written, searched))
    widest = widest_layer(source)
    hidden_states = tokens * int(source.config[source.architecture.hidden_key])
    device = named_device(recipe.awq.device)
    budget = recipe.awq.memory_budget or default_budget(device)
    largest = max(unit.written for unit in units)
    compensated = recipe.awq.rounding == "compensated"
    top_k, ranks = int(source.config[source.architecture.top_k_key]), workspace.team.size
    gpu = device.type != "cpu"
    memory = awq_memory(widest, largest, hidden_states, budget, gpu, compensated, ranks, top_k)
    # The hidden states after a layer and, until its journal entry is written, those after the layer before it.
    states = 2 * hidden_states * torch.bfloat16.itemsize
    if compensated:
        states += sum(map(source.architecture.has_experts, range(source.layer_count()))) * _evidence_bytes(source)
    if recipe.awq.weighs_outputs:
        taken = most_fisher_tokens(recipe)
        once = arithmetic * taken // max(1, tokens) // recipe.awq.n_grid
        units = awq_fisher.units(source, reads[:-1], once) + units
        states += fisher_state(source.layer_count(), taken, int(source.config[source.architecture.hidden_key]))
        memory = memory.at_least(
            gradient_memory(source, tokens, taken, recipe.awq.calibration.sequence_length, gpu), gpu
        )
    folder = source.checkpoint.folder if fp8 else workspace.folder(BF16)
    return Plan(name, folder, workspace.folder(AWQ), units, BASE_MEMORY + memory.host, memory.device, states, tensors)


def _evidence_bytes(source: SourceModel) -> int:
    """At most, of the tokens of a layer that verify gets, with the scales of all experts' down inputs in fp32."""
    arch, config = source.architecture, source.config
    width = int(config[arch.hidden_key]) * torch.bfloat16.itemsize
    inner = int(config[arch.intermediate_key])
    # index and weight of each choice: at most as many as there are experts.
    choices = source.expert_count() * (torch.int64.itemsize + torch.float32.itemsize)
    return EVIDENCE * (width + choices) + source.expert_count() * inner * torch.float32.itemsize


def fingerprint(workspace: Workspace) -> dict[str, Any]:
    awq = workspace.recipe.awq
    return {
        "model.source": workspace.source.checkpoint.fingerprint(),
        "awq.calibration": _calibration(workspace),
        "awq.n_grid": awq.n_grid,
        "awq.duo_scaling": awq.duo_scaling,
        "awq.search": awq.search,
        "awq.group_size": awq.group_size,
        "awq.min_tokens": awq.min_tokens,
        "awq.rounding": awq.rounding,
        # Where these decide nothing, runs that were begun before there were the keys go on.
        **({"awq.fisher_tokens": awq.fisher_tokens} if awq.weighs_outputs else {}),
        **({"awq.shared_experts": awq.shared_experts} if workspace.architecture.shared else {}),
        "awq.propagate_quantized": awq.propagate_quantized,
        "awq.kv_cache_scheme": awq.kv_cache_scheme.model_dump() if awq.kv_cache_scheme else None,
        "seed": workspace.recipe.seed,
        # Where it is the default nothing depends on it, as above.
        **({"restore.attention": "fp8_block"} if workspace.rounded else {}),
    }


def _calibration(workspace: Workspace) -> str:
    """The tokens' fingerprint. A complete stage needs samples and tokenizer no more: where they can't be read again, it
    is what it was."""
    journal = workspace.journal.stage(name)
    try:
        return calibration_tokens(workspace).fingerprint()
    except CalibrationError:
        if not journal.complete:
            raise
        return str(journal.fingerprint.get("awq.calibration"))


def work(workspace: Workspace, plan: Plan, journal: StageJournal) -> None:
    with _Stage(workspace, plan, journal) as stage:
        if workspace.recipe.awq.weighs_outputs:
            stage.weigh_outputs()
        for layer in range(workspace.source.layer_count()):
            if layer_unit(layer) not in journal.units:
                stage.quantize_layer(layer)
                release_memory()
        stage.finish_writing()
        if OUTSIDE not in journal.units and workspace.team.leads:
            stage.carry_outside()


def complete(workspace: Workspace, plan: Plan, journal: StageJournal) -> None:
    """config.json and the index; the layers' statistics in one file. No hidden states are needed any more."""
    config = output_config(workspace.architecture, workspace.recipe, workspace.source.checkpoint.config, [])
    shards = [shard_name(workspace, layer) for layer in layers_and_rest(workspace)]
    finish_folder(workspace.source.checkpoint, plan.folder, config, shards)
    files, layers = LayerFiles.of(workspace, name), range(workspace.source.layer_count())
    write_json(files.folder / STATISTICS, [read_json(files.record(layer)) for layer in layers])
    journal.forget_files(layer_unit(layers[-1]), [files.in_journal(files.hidden(layers[-1]))])
    remove_fisher(files, layers, journal)
    files.remove_hidden()


class _Stage:
    """One run of the stage: hidden states, the thread that reads ahead, and the thread that writes behind."""

    def __init__(self, workspace: Workspace, plan: Plan, journal: StageJournal) -> None:
        self.workspace, self.plan, self.journal = workspace, plan, journal
        self.source: SourceModel = workspace.source
        self.team = workspace.team
        self.experts = self.team.part(self.source.expert_count())
        self.layers = range(self.source.layer_count())
        self.device = present_device(workspace.recipe.awq.device)
        self.layer_reader = LayerReader(workspace, self.device)
        self.files = LayerFiles.of(workspace, name)
        tokens = calibration_tokens(workspace)
        if self.team.leads:
            make_folder(self.files.folder)
            workspace.calibration = save_tokens(tokens, workspace.folder(STATE) / CACHE_NAME)
        self.quantizer = LayerQuantizer(
            workspace.architecture,
            self.source.config,
            workspace.recipe.awq,
            tokens.lengths,
            tokens.ids,
            self.device,
            self._say,
            self._excluded(),
            self.team,
            workspace.smooths_norm,
            bool(workspace.rounded),
        )
        self.hidden = self._hidden_states(tokens)
        self.two_layers_fit = self._fit_memory()
        self.down = Lane(self.device)
        self.writer, self.writers = one_thread("mmq-writer"), self.team.apart("writers")
        self.reader = one_thread("mmq-reader")
        self.pending: Future[None] | None = None
        self.ahead: Future[LayerContent | None] | None = None

    def _fit_memory(self) -> bool:
        """On a GPU: take what working memory there is, where the recipe names none. Whether the next layer has room
        beside the one at work; on a CPU one layer is the promise."""
        if self.device.type != "cuda":
            return False
        layer = widest_layer(self.source)
        largest = max(unit.written for unit in self.plan.units)
        top_k = int(self.source.config[self.source.architecture.top_k_key])
        compensated = self.workspace.recipe.awq.rounding == "compensated"
        fixed = awq_memory(layer, largest, self.hidden.numel(), 0, True, compensated, self.team.size, top_k).device
        room = free_device(self.device) - fixed
        if self.workspace.recipe.awq.memory_budget is None:
            self.quantizer.budget = max(LEAST_BUDGET, min(self.quantizer.budget, room - SPARE_MEMORY))
        return room >= self.quantizer.budget + layer // self.team.size

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, *_: object) -> None:
        # What is being written is a layer's work and is waited for; what is being read is nothing lost.
        self.layer_reader.stopping.set()
        self.reader.shutdown(wait=True, cancel_futures=True)
        self.writer.shutdown(wait=True)

    def weigh_outputs(self) -> None:
        """Find out what errors of the layers' outputs cost, as far as it is not known yet."""
        tokens = calibration_tokens(self.workspace)
        FisherPass(self.workspace, self.journal, tokens, self.layer_reader, self.reader).run()
        release_memory()

    def quantize_layer(self, layer: int) -> None:
        """All of one layer; its files are written while the next one computes."""
        self.workspace.reporter.step(layer_unit(layer), "reading", 0, 1)
        reset_peak_device(self.device)
        begin, waited = time.perf_counter(), self.team.waited
        content = self._take_layer(layer)
        reading = round(time.perf_counter() - begin, 3)
        self._read_ahead(layer + 1)
        result = self._quantize(layer, content)
        result.statistics["seconds"] = {"reading": reading} | result.statistics["seconds"]
        taken = {
            "memory_budget": self.quantizer.budget,
            "host_bytes": resident_host(),
            "peak_host_bytes": peak_host(),
            "open_files": open_files(),
            "peak_device_bytes": peak_device(self.device),
            "peak_device_reserved_bytes": peak_reserved(self.device),
        }
        result.statistics.update(taken)
        if self.team.size > 1:
            seconds = round(time.perf_counter() - begin, 3)
            own = taken | {
                "host": socket.gethostname(),
                "seconds": seconds,
                "waited": round(self.team.waited - waited, 3),
            }
            result.statistics["ranks"] = self.team.everyone(own)
        self.hidden = result.hidden
        if excluded := result.statistics["excluded_samples"]:
            self.workspace.reporter.note(
                f"layer {layer} leaves out the calibration samples {', '.join(map(str, excluded))}, for which it is NaN"
                " or infinite",
                layer=layer,
                excluded_samples=excluded,
            )
        self.finish_writing()
        self.down.follow()
        self.pending = self.writer.submit(self._write, layer, result)

    def _quantize(self, layer: int, content: LayerContent) -> LayerResult:
        """Quantize a layer; where a GPU's memory is short, without the next layer beside it, then in smaller steps.

        Raises:
            DeviceMemoryError: the smallest ones don't fit either.
        """
        while True:
            try:
                return self.quantizer.quantize(layer, content, self.hidden, self._fisher(layer))
            except torch.OutOfMemoryError as error:
                reason = one_line(error)
                if self.team.size > 1:
                    # The others are in the midst of the layer.
                    raise DeviceMemoryError(
                        f"{self.device} has too little memory for layer {layer} with awq.memory_budget ="
                        f" {gib_text(self.quantizer.budget)}; a smaller one needs less: {reason}"
                    ) from None
            # The experts may be overwritten in part, so the layer is read again, once there is room.
            del content
            if self.two_layers_fit:
                self.two_layers_fit = False
                if self.ahead is not None:
                    self.ahead.result()
                    self.ahead = None
            elif self.quantizer.budget > LEAST_BUDGET:
                self.quantizer.budget = max(LEAST_BUDGET, self.quantizer.budget // 2)
            else:
                raise DeviceMemoryError(
                    f"{self.device} has too little memory for layer {layer} even with awq.memory_budget ="
                    f" {gib_text(LEAST_BUDGET)}; fewer or shorter calibration samples need less: {reason}"
                )
            release_memory()
            torch.cuda.empty_cache()
            self.workspace.reporter.note(
                f"the memory of {self.device} is short: layer {layer} is begun anew with awq.memory_budget ="
                f" {gib_text(self.quantizer.budget)}",
                layer=layer,
                memory_budget=self.quantizer.budget,
            )
            content = self.layer_reader.read_now(layer, self.experts)

    def _fisher(self, layer: int) -> Fisher | None:
        """What errors of a layer's output cost, where that was found out."""
        if not (self.workspace.recipe.awq.weighs_outputs and self.workspace.architecture.has_experts(layer)):
            return None
        return load_fisher(self.files, layer, self.journal, self.team, self.device)

    def finish_writing(self) -> None:
        """Wait for the layer whose files are being written."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def carry_outside(self) -> None:
        """Embeddings, final norm, head: as the dequantized checkpoint has them."""
        path = self.plan.folder / shard_name(self.workspace, None)
        self.workspace.reporter.step(OUTSIDE, "copying", 0, 1)
        with (
            self.layer_reader.outside() as read,
            write_shard(path, quantized_specs(self.workspace, None)) as shard,
        ):
            for spec in shard.specs:
                shard.add(spec.name, read(spec.name))
        self.journal.finish_unit(OUTSIDE, {f"{AWQ}/{path.name}": shard.record})
        self.workspace.reporter.unit(OUTSIDE)

    def _say(self, layer: int, part: str, share: float, at: str) -> None:
        self.workspace.reporter.step(layer_unit(layer), part, share, 1.0, at)

    def _excluded(self) -> list[int]:
        """Samples that finished layers left out, counted from 1.

        Raises:
            JournalError: there are some, and the recipe does not allow it. The other way round nothing was left out,
                so that going on with `exclude` mixes nothing.
        """
        records = (read_json(self.files.record(layer)) for layer in range(self._done))
        found = [number for record in records for number in record.get("excluded_samples", [])]
        if found and self.workspace.recipe.awq.calibration.nonfinite == "error":
            raise JournalError(
                f"finished layers left out the calibration samples {', '.join(map(str, sorted(found)))}, which"
                " awq.calibration.nonfinite = error forbids; set it to exclude, or run `mmq awq --restart`"
            )
        return found

    @property
    def _done(self) -> int:
        """Finished layers."""
        return sum(layer_unit(layer) in self.journal.units for layer in self.layers)

    def _hidden_states(self, tokens: Tokens) -> torch.Tensor:
        """bf16 [T, H] on the device: the last finished layer's output, or the embeddings."""
        done = self._done
        if done == len(self.layers):
            return torch.empty(0)
        path = self.files.hidden(done - 1) if done else None
        if self.team.leads:
            self.files.remove_hidden(but=path)
        if path is not None:
            self.journal.check_content(self.files.in_journal(path))
            return load_file(path, device=str(self.device))["hidden_states"]
        return self.layer_reader.embedded(tokens.ids)

    def _take_layer(self, layer: int) -> LayerContent:
        """The layer that was read ahead, or read now."""
        content = None
        if self.ahead is None:
            self.layer_reader.bring_near(layer, self.experts)
        else:
            content, self.ahead = self.ahead.result(), None
        if content is None:
            return self.layer_reader.read_now(layer, self.experts)
        self.layer_reader.lead(content)
        return content

    def _read_ahead(self, layer: int) -> None:
        """While a layer computes: read the next one onto the device if both fit there, else bring its bytes near."""
        if layer >= len(self.layers):
            return
        if self.two_layers_fit:
            self.ahead = self.reader.submit(self._read_apart, layer)
        else:
            self.ahead = self.reader.submit(self.layer_reader.bring_near, layer, self.experts)

    def _read_apart(self, layer: int) -> LayerContent | None:
        """Read a layer beside the computations; None once stopping, or where it has no room there."""
        self.layer_reader.bring_near(layer, self.experts)
        if self.layer_reader.stopping.is_set():
            return None
        try:
            return self.layer_reader.read(layer, self.experts)
        except torch.OutOfMemoryError:
            self.two_layers_fit = False
            return None

    def _write(self, layer: int, result: LayerResult) -> None:
        """Shard, statistics and hidden states, then the journal, then the last layer's hidden states may go."""
        begin = time.perf_counter()
        path = self.plan.folder / shard_name(self.workspace, layer)
        record = self._write_shard(path, layer, result)
        if record is None:
            return
        hidden_path, statistics_path = self.files.hidden(layer), self.files.record(layer)
        hidden = save_tensors(hidden_path, {"hidden_states": self.down.to_host(result.hidden)})
        result.statistics["seconds"]["writing"] = round(time.perf_counter() - begin, 3)
        files = {
            f"{AWQ}/{path.name}": record,
            self.files.in_journal(hidden_path): hidden,
            self.files.in_journal(statistics_path): write_json(statistics_path, result.statistics),
        }
        if result.evidence:
            evidence_path = self.files.evidence(layer)
            files[self.files.in_journal(evidence_path)] = save_tensors(evidence_path, result.evidence)
        if layer:
            self.journal.forget_files(layer_unit(layer - 1), [self.files.in_journal(self.files.hidden(layer - 1))])
        self.journal.finish_unit(layer_unit(layer), files)
        self.files.remove_hidden(but=hidden_path)
        self.workspace.reporter.unit(layer_unit(layer), **_summary(result.statistics))

    def _write_shard(self, path: Path, layer: int, result: LayerResult) -> FileRecord | None:
        """The layer's shard. Of several ranks each writes its own experts' tensors into it, and the leading one has its
        record in the end."""
        arch, specs = self.workspace.architecture, quantized_specs(self.workspace, layer)
        prefix = arch.layer_prefix(layer)
        if self.team.size == 1:
            with write_shard(path, specs) as shard:
                for spec in shard.specs:
                    shard.add(spec.name, self.down.to_host(result.tensors[spec.name.removeprefix(prefix)]))
            return shard.record
        if self.team.leads:
            begin_shard(path, specs)
        self.writers.together()
        with fill_shard(path, specs) as put:
            for spec in file_order(specs):
                local = spec.name.removeprefix(prefix)
                if local in result.tensors and (self.team.leads or arch.split_expert(local) is not None):
                    put(spec.name, self.down.to_host(result.tensors[local]))
        self.writers.together()
        return finish_shard(path) if self.team.leads else None


def operations_per_token(source: SourceModel, n_grid: int) -> int:
    """Multiply-adds for one token in a layer: each point of the grid takes it through its experts once, which is
    nearly all of what a layer computes."""
    arch, config = source.architecture, source.config
    matrix = int(config[arch.hidden_key]) * int(config[arch.intermediate_key])
    return n_grid * int(config[arch.top_k_key]) * len(arch.expert_linears) * matrix


def _summary(statistics: dict[str, Any]) -> dict[str, Any]:
    """What is worth showing of a layer."""
    if "tokens_per_expert" not in statistics:
        return {"experts": "none", "seconds": round(sum(statistics["seconds"].values()), 1)}
    before, after = statistics["loss_round_to_nearest"], statistics["loss_chosen"]
    return {
        "loss": "-" if after is None else f"{after:.3e}",
        "of round-to-nearest": f"{after / before:.1%}" if before and after is not None else "-",
        "fewest tokens": min(statistics["tokens_per_expert"]),
        "topped up": sum(1 for count in statistics["topped_up"] if count),
        "kept as they were": _kept(statistics),
        "seconds": round(sum(statistics["seconds"].values()), 1),
    }


def _kept(statistics: dict[str, Any]) -> str:
    """What no scales were better for: the whole layer, or the norm and a number of experts."""
    if statistics["identity_kept"]:
        return "all"
    norm, down = statistics["norm"], statistics["down"]
    experts = sum(not ratio and not duo for ratio, duo in zip(down["ratio"], down["duo_scaling"], strict=True))
    alone = not norm["ratio"] and not norm["duo_scaling"]
    return f"norm and {experts} experts" if alone else f"{experts} experts"
