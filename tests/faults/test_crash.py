"""Stopping every stage at every system call that changes the disk, and going on from there."""

from __future__ import annotations

import signal
from collections import Counter

import pytest

from faults.harness import FOLDERS, Matrix, everywhere
from faults.inject import Call, Fault

FLUSHES_AND_RENAMES = ("fsync", "replace")


def none_wrong(matrix: Matrix, stage: str, faults: list[Fault], *options: str) -> None:
    """Whatever the fault, the stage ends as it should, and the same command then ends with the wanted bytes."""
    examined = matrix.examine(stage, faults, *options)
    assert len(examined) == len(faults) > 0
    wrong = [problem for _, problems, _ in examined for problem in problems]
    assert not wrong, "\n".join([f"{len(wrong)} problems", *wrong[:20]])


@pytest.mark.parametrize("stage", FOLDERS)
def test_killed_at_every_call_a_stage_goes_on_to_the_same_bytes(matrix: Matrix, stage: str) -> None:
    """Before each call, and inside each write. Nothing is drawn by chance and nothing left out."""
    calls = matrix.calls(stage)
    assert calls == sized_as(matrix.calls(stage), calls), "the calls come in another order each time"
    none_wrong(matrix, stage, everywhere(calls, sent=signal.SIGKILL))


@pytest.mark.parametrize("stage", FOLDERS)
def test_signals_at_every_flush_and_rename_end_in_order(matrix: Matrix, stage: str) -> None:
    """SIGTERM and Ctrl-C by turns; `scripts/crash_test.py --enumerate` sends both at every call."""
    faults = [
        Fault(at, sent=signal.SIGTERM if at % 2 else signal.SIGINT)
        for at, call in enumerate(matrix.calls(stage), start=1)
        if call.kind in FLUSHES_AND_RENAMES
    ]
    none_wrong(matrix, stage, faults)


@pytest.mark.parametrize("stage", FOLDERS)
def test_killed_while_it_begins_anew_a_stage_goes_on(matrix: Matrix, stage: str) -> None:
    """`--restart` removes what is there, file by file."""
    removals = {"unlink", "rmdir"}
    calls = matrix.calls(stage, "--restart")
    faults = [
        Fault(at, sent=signal.SIGKILL)
        for at, call in enumerate(calls, start=1)
        if call.kind in removals and call.path.startswith((FOLDERS[stage], "state"))
    ]
    assert len(faults) > 5
    none_wrong(matrix, stage, faults, "--restart")


@pytest.mark.parametrize("stage", FOLDERS)
def test_nothing_is_named_before_it_is_on_the_disk(matrix: Matrix, stage: str) -> None:
    """A power cut loses what was not flushed: bytes before a rename, the rename before the journal."""
    flushed: set[str] = set()
    named: list[str] = []
    for call in matrix.calls(stage):
        if call.kind == "write":
            flushed.discard(call.path)
        elif call.kind == "fsync":
            flushed.add(call.path)
            named = [path for path in named if folder_of(path) != call.path]
        elif call.kind == "replace":
            assert f"{call.path}.mmq-tmp" in flushed, f"{call.path} was renamed before its bytes were flushed"
            if call.path == "journal.json":
                assert not named, f"the journal was replaced before the renames of {named} were flushed"
            named.append(call.path)
    assert not named


@pytest.mark.parametrize("stage", FOLDERS)
def test_each_stage_meets_every_kind_of_call(matrix: Matrix, stage: str) -> None:
    """The journal after each unit, the small files at the end, and the index last of a folder's files."""
    calls = matrix.calls(stage)
    renamed = [call.path for call in calls if call.kind == "replace"]
    folder = [path for path in renamed if path.startswith(FOLDERS[stage])]
    shards = [path for path in folder if path.endswith(".safetensors")]
    assert folder[-1] == f"{FOLDERS[stage]}/model.safetensors.index.json"
    assert {path.rpartition("/")[2] for path in folder} >= {"config.json", "tokenizer.json", "chat_template.jinja"}
    assert renamed.count("journal.json") >= len(shards) + 1
    assert renamed[-1] == "journal.json"
    counts = Counter(call.kind for call in calls)
    # One more: the lock's text is written and not renamed.
    assert counts["open"] == counts["replace"] + 1
    # The folder above a new one; the work_dir's own lies outside of what is watched.
    made = [call.path for call in calls if call.kind == "mkdir" and call.path != "."]
    assert counts["fsync"] == 2 * counts["replace"] + len(made)
    if stage == "awq":
        assert counts["unlink"] == 2, "the hidden states after each layer"


def folder_of(path: str) -> str:
    return path.rpartition("/")[0] or "."


def sized_as(calls: list[Call], others: list[Call]) -> list[Call]:
    """The calls with the others' sizes: JSON files hold times, whose digits differ."""
    return [Call(call.kind, call.path, other.size) for call, other in zip(calls, others, strict=True)]
