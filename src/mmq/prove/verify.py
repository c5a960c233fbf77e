"""Proof of a finished hybrid checkpoint: it is read back and compared with the source, tensor by tensor.

Only the reading of files is shared with the stages: formulas are written again (`formats`), so that a fault in the
stages' tensor code can't hide itself.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from mmq.errors import CheckpointError, JournalError
from mmq.prove.check_config import Original, check_config, check_names, mapping
from mmq.prove.check_tensors import check_tensors
from mmq.prove.findings import Report
from mmq.prove.judged import judged_layer
from mmq.stages.preflight import Passed, check_outputs, contents
from mmq.storage.atomic import FileRecord, file_digest, write_json
from mmq.storage.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint, read_json
from mmq.text import bytes_text
from mmq.workdir.layer_files import LayerFiles
from mmq.workdir.workspace import HYBRID, Workspace

REPORT_NAME = "verify.json"


def verify_checkpoint(workspace: Workspace) -> Report:
    """Check the hybrid folder against the source and write verify.json beside it; on all ranks.

    Raises:
        JournalError: restore has not ended.
        RecipeError: verify.json can't be written.
        CheckpointError: the source can't be read.
    """
    _check(workspace)
    folder, source = workspace.folder(HYBRID), workspace.source.checkpoint
    report = Report(folder, workspace.work_dir / REPORT_NAME, files=finished_files(workspace))
    try:
        result = Checkpoint.open(folder)
    except CheckpointError as error:
        report.problems.append(str(error))
    else:
        # What Checkpoint.open looked at: every name of the index is in its shard, and every tensor in the index.
        report.count("tensors in index and shards", len(result.specs))
        arch = workspace.architecture
        shared = workspace.recipe.awq.shared_experts == "source"
        original = Original(arch, source, workspace.source.format.storage, shared, bool(workspace.rounded))
        check_names(report, original, result, workspace.kv_cache_scheme is not None)
        check_config(report, original, result)
        if not report.problems:
            judged = partial(judged_layer, workspace)
            workers, team = workspace.recipe.worker_count, workspace.team
            check_tensors(report, original, result, judged, workers, workspace.reporter, team)
    if workspace.team.leads:
        write_json(report.path, report.as_json())
    return report


def checked(workspace: Workspace) -> list[Passed]:
    """What `verify_checkpoint` would refuse, and what it would compare, looked at without a tensor's bytes; nothing is
    written. Raises as it does."""
    found, folder = _check(workspace), workspace.folder(HYBRID)
    source = workspace.source
    try:
        result = Checkpoint.open(folder)
    except CheckpointError as error:
        found["result"] = f"verify would find: {error}"
    else:
        found["result"] = f"{contents(result)} in {folder}"
        size = bytes_text(source.checkpoint.nbytes + result.nbytes)
        found["to compare"] = f"{source.layer_count()} layers and what lies outside them, {size} to read"
    if workspace.recipe.awq.rounding != "nearest":
        files = LayerFiles.of(workspace, "awq")
        routed = [layer for layer in range(source.layer_count()) if workspace.architecture.has_experts(layer)]
        kept = sum(files.evidence(layer).is_file() for layer in routed)
        found["evidence of rounding"] = f"of {kept} of {len(routed)} layers"
    return [Passed("verify", what, said) for what, said in found.items()]


def _check(workspace: Workspace) -> dict[str, str]:
    """Refuse what can't be verified, or told of: what was looked at. Raises as `verify_checkpoint`."""
    if not workspace.journal.stage("restore").complete:
        raise JournalError(f"{workspace.folder(HYBRID)} is not complete; run `mmq restore` first")
    return {"outputs": check_outputs(workspace, ()), "source": contents(workspace.source.checkpoint)}


def finished_files(workspace: Workspace) -> dict[str, list[Any]]:
    """Size and xxh3-128 of the hybrid folder's files by name: shards as restore wrote them, the small ones as they are.

    The model card is not among them, nor is what mmq did not put there.
    """
    folder, restore = workspace.folder(HYBRID), workspace.journal.stage("restore")
    records = [record for unit in restore.units for record in restore.files(unit).values()]
    small = [CONFIG_NAME, INDEX_NAME, *(path.name for path in workspace.source.checkpoint.carried_files())]
    records += [
        FileRecord(name, path.stat().st_size, file_digest(path)) for name in small if (path := folder / name).is_file()
    ]
    return {record.name: [record.size, record.digest] for record in records}


def read_report(workspace: Workspace) -> tuple[dict[str, Any] | None, str]:
    """verify.json if it is about the hybrid folder's files as they are now, else None and why not, as a clause.

    Raises:
        CheckpointError: it is no JSON object, or the source can't be read.
    """
    path = workspace.work_dir / REPORT_NAME
    if not path.is_file():
        return None, "it was not verified"
    record, now = read_json(path), finished_files(workspace)
    then = mapping(record.get("files"))
    changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if changed:
        return None, f"it is not what was verified: {changed[0]} differs" + (
            f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        )
    return record, ""
