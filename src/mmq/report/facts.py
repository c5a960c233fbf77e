"""All that a run measured, read from its work_dir: journal, statistics of the layers, verify.json and eval.json.

Reading takes no lock and changes nothing, so it may happen while the run goes on.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmq.errors import CheckpointError, JournalError, MmqError
from mmq.families import sizes
from mmq.families.table import Architecture
from mmq.prove import by_layer, evaluate, verify
from mmq.serve.outputs import output_tensors
from mmq.serve.quantization_config import has_two_names, names_both
from mmq.stages import awq, restore
from mmq.stages.pipeline import plans, stages_of
from mmq.storage.checkpoint import Checkpoint, read_json
from mmq.storage.shards import TensorSpec
from mmq.workdir.layer_files import LayerFiles
from mmq.workdir.output_shards import LAYER
from mmq.workdir.versions import versions
from mmq.workdir.workspace import HYBRID, Workspace


@dataclass(frozen=True)
class StageFacts:
    """One stage of the pipeline, or an evaluation.

    Attributes:
        units: finished units in the order they were finished.
        planned: how many there will be; None where the source can't tell.
        fingerprint: the inputs that decide the stage's bytes, by the name a user knows them by.
        runs: what each run of the stage took, as the journal has it.
    """

    name: str
    complete: bool
    units: list[str]
    planned: int | None
    fingerprint: dict[str, Any]
    runs: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        """Of all runs together."""
        return float(sum(run["seconds"] for run in self.runs))

    @property
    def peak_host_bytes(self) -> int:
        """The largest of any run; 0 where none was noted."""
        return max((run.get("peak_host_bytes") or 0 for run in self.runs), default=0)

    @property
    def peak_device_bytes(self) -> int:
        """The largest of any run; 0 on a CPU."""
        return max((run.get("peak_device_bytes") or 0 for run in self.runs), default=0)


@dataclass(frozen=True)
class Component:
    """One of the model card's components in the source and in the result.

    Attributes:
        dtype_before, dtype_after: names for people, by size, the largest part first: "fp8 + fp32".
    """

    name: str
    parameters: int
    bytes_before: int
    bytes_after: int
    dtype_before: str
    dtype_after: str


@dataclass(frozen=True)
class RunFacts:
    """All that a run measured.

    Attributes:
        recipe: as it was validated, defaults included.
        source: the recipe's `model.source`, a folder or a hub id.
        layers: the awq stage's statistics, one entry a finished layer with experts, in order.
        stages: those that the recipe needs, then the evaluations that were begun.
        components: all of `sizes.COMPONENTS`; empty where the source can't be read.
        sizes_measured: the sizes after are those of the finished checkpoint, not computed from config.json.
        verify, evaluation: verify.json and eval.json; None where there is none of this result.
        versions: of the packages that made it; where runs differ, all of a package's, in order.
        missing: what is not there yet, a sentence each.
        dense_layers: the awq stage's statistics of layers without experts.
        by_layer: by_layer.json; None where there is none of this result.
    """

    recipe: dict[str, Any]
    source: str
    work_dir: Path
    layers: list[dict[str, Any]]
    stages: list[StageFacts]
    components: list[Component]
    sizes_measured: bool
    verify: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    versions: dict[str, str]
    missing: list[str]
    dense_layers: list[dict[str, Any]] = field(default_factory=list)
    by_layer: dict[str, Any] | None = None

    @property
    def all_layers(self) -> list[dict[str, Any]]:
        """Statistics of all finished layers, in order."""
        return sorted([*self.layers, *self.dense_layers], key=lambda layer: int(layer["layer"]))

    @property
    def complete(self) -> bool:
        """All stages that the recipe needs have ended."""
        return all(stage.complete for stage in self.stages if stage.name not in evaluate.WORK)

    @property
    def seconds(self) -> float:
        """Of all runs of all stages, the evaluations included."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def parameters(self) -> int:
        return sum(component.parameters for component in self.components)

    @property
    def bytes_before(self) -> int:
        return sum(component.bytes_before for component in self.components)

    @property
    def bytes_after(self) -> int:
        return sum(component.bytes_after for component in self.components)


def read_run(workspace: Workspace) -> RunFacts:
    """Read a finished or unfinished run.

    Raises:
        JournalError: nothing has begun in the work_dir, or its journal can't be read.
        CheckpointError: a record of the run is missing or damaged.
    """
    if not any(workspace.journal.stage(name).begun for name in (*stages_of(workspace.recipe), *evaluate.WORK)):
        raise JournalError(f"nothing has begun in {workspace.work_dir}; run `mmq run` first")
    missing: list[str] = []
    stages = _stages(workspace, missing)
    components, measured = _components(workspace)
    layers = _layers(workspace)
    return RunFacts(
        recipe=_recipe(workspace),
        source=workspace.recipe.model.source,
        work_dir=workspace.work_dir,
        layers=[layer for layer in layers if "tokens_per_expert" in layer],
        stages=stages,
        components=components,
        sizes_measured=measured,
        verify=_verified(workspace, missing),
        evaluation=_evaluated(workspace, missing),
        versions=_versions(stages),
        missing=missing,
        dense_layers=[layer for layer in layers if "tokens_per_expert" not in layer],
        by_layer=_by_layer(workspace, missing),
    )


def _recipe(workspace: Workspace) -> dict[str, Any]:
    """The recipe that makes what is there: a finished result's config.json may be older than how experts are named by
    default now."""
    recipe = workspace.recipe.model_dump(mode="json")
    if workspace.journal.stage(restore.name).complete:
        try:
            two, config = has_two_names(workspace.architecture), Checkpoint.open(workspace.folder(HYBRID)).config
        except MmqError:
            return recipe
        if two:
            recipe["restore"]["expert_targets"] = "both" if names_both(config) else "hub"
    return recipe


def loss_share(layer: dict[str, Any]) -> float | None:
    """A layer's loss with the chosen scales relative to round-to-nearest's; None where one was too large for a number,
    or there was none to reduce."""
    before, after = layer["loss_round_to_nearest"], layer["loss_chosen"]
    return after / before if before and after is not None else None


def loss_shares(layers: Iterable[dict[str, Any]]) -> dict[int, float]:
    """`loss_share` by layer, of those that have one."""
    return {layer["layer"]: share for layer in layers if (share := loss_share(layer)) is not None}


def _stages(workspace: Workspace, missing: list[str]) -> list[StageFacts]:
    planned: dict[str, int] = {}
    try:
        planned = {plan.stage: len(plan.units) for plan in plans(workspace, stages_of(workspace.recipe))}
        planned |= {name: len(work_of(workspace.source)) for name, work_of in evaluate.WORK.items()}
    except MmqError as error:
        missing.append(f"The source can't be read, so sizes are not known: {error}.")
    journals = [workspace.journal.stage(name) for name in stages_of(workspace.recipe)]
    journals += [journal for name in evaluate.WORK if (journal := workspace.journal.stage(name)).begun]
    for journal in journals:
        if not journal.complete:
            total = f" of {planned[journal.name]}" if journal.name in planned else ""
            missing.append(f"{journal.name} is not complete: {len(journal.units)}{total} units are done.")
    return [
        StageFacts(
            journal.name, journal.complete, journal.units, planned.get(journal.name), journal.fingerprint, journal.runs
        )
        for journal in journals
    ]


def _layers(workspace: Workspace) -> list[dict[str, Any]]:
    """Statistics of the finished layers: the stage's collection, or in an unfinished run its records."""
    files, journal = LayerFiles.of(workspace, awq.name), workspace.journal.stage(awq.name)
    if journal.complete:
        return _read_list(files.folder / awq.STATISTICS)
    done = sorted(unit for unit in journal.units if unit.startswith(LAYER))
    return [read_json(files.folder / f"{unit}.json") for unit in done]


def _read_list(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None
    if not isinstance(content, list):
        raise CheckpointError(f"{path} is not a JSON list")
    return content


def _components(workspace: Workspace) -> tuple[list[Component], bool]:
    """Sizes before and after, and whether the latter are the result's own."""
    try:
        source = workspace.source
        finished = workspace.journal.stage(restore.name).complete
        result = Checkpoint.open(workspace.folder(HYBRID)) if finished else None
    except MmqError:
        return [], False
    arch = source.architecture
    parameters = _summed(source.specs.values(), arch)
    before = _summed(source.checkpoint.specs.values(), arch)
    if result is not None:
        after = _summed(result.specs.values(), arch)
    else:
        tensors = output_tensors(workspace.recipe, source.config, arch, "hybrid")
        after = {name: _Sum(0, own.nbytes, own.dtypes) for name, own in sizes.components(tensors).items()}
    found = [
        Component(
            name,
            parameters[name].elements,
            before[name].nbytes,
            after[name].nbytes,
            _dtypes(before[name].dtypes),
            _dtypes(after[name].dtypes),
        )
        for name in sizes.COMPONENTS
        if parameters[name].elements or name not in sizes.RARE_COMPONENTS
    ]
    return found, result is not None


@dataclass(frozen=True)
class _Sum:
    """Tensors of one component; dtypes by size, the largest part first."""

    elements: int
    nbytes: int
    dtypes: tuple[str, ...]


def _summed(specs: Iterable[TensorSpec], arch: Architecture) -> dict[str, _Sum]:
    """Sums over headers by component; all of sizes.COMPONENTS, also where there is nothing."""
    elements = dict.fromkeys(sizes.COMPONENTS, 0)
    nbytes: dict[str, Counter[str]] = {name: Counter() for name in sizes.COMPONENTS}
    for spec in specs:
        component = arch.component(spec.name)
        elements[component] += math.prod(spec.shape)
        nbytes[component][spec.dtype] += spec.nbytes
    return {
        name: _Sum(elements[name], own.total(), tuple(dtype for dtype, _ in own.most_common()))
        for name, own in nbytes.items()
    }


def _dtypes(names: tuple[str, ...]) -> str:
    return " + ".join(sizes.DTYPE_LABELS.get(name, name) for name in names)


def _verified(workspace: Workspace, missing: list[str]) -> dict[str, Any] | None:
    """verify.json, if it is of this result."""
    if not workspace.journal.stage(restore.name).complete:
        return None
    try:
        report, reason = verify.read_report(workspace)
    except MmqError as error:
        report, reason = None, str(error)
    if report is None:
        missing.append(f"Whether the result is what it must be is not known: {reason}. Run `mmq verify`.")
    return report


def _evaluated(workspace: Workspace, missing: list[str]) -> dict[str, Any] | None:
    """eval.json, if it is of this result."""
    journal, restored = workspace.journal.stage(evaluate.name), workspace.journal.stage(restore.name)
    if not restored.complete:
        return None
    if not journal.begun:
        missing.append("The result was not compared with its source on held-out text: run `mmq eval`.")
    if not journal.complete:
        return None
    if journal.fingerprint.get(evaluate.RESULT_FIELD) != restored.digest(HYBRID):
        missing.append("eval.json is of an earlier result: run `mmq eval --restart`.")
        return None
    return read_json(workspace.work_dir / evaluate.REPORT_NAME)


def _by_layer(workspace: Workspace, missing: list[str]) -> dict[str, Any] | None:
    """by_layer.json, if it is of this result; it is made on demand, so that nothing is missing where it was not."""
    journal, restored = workspace.journal.stage(by_layer.name), workspace.journal.stage(restore.name)
    if not restored.complete or not journal.complete:
        return None
    if journal.fingerprint.get(evaluate.RESULT_FIELD) != restored.digest(HYBRID):
        missing.append(f"{by_layer.REPORT_NAME} is of an earlier result: run `mmq {by_layer.name} --restart`.")
        return None
    return read_json(workspace.work_dir / by_layer.REPORT_NAME)


def _versions(stages: Iterable[StageFacts]) -> dict[str, str]:
    """Of the runs, in order; of this process where no run noted any."""
    found: dict[str, list[str]] = {}
    for stage in stages:
        for run in stage.runs:
            for package, version in run.get("versions", {}).items():
                of_package = found.setdefault(package, [])
                if version not in of_package:
                    of_package.append(version)
    return {package: ", ".join(listed) for package, listed in found.items()} or versions()
