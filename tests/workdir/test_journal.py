"""The journal: what it notes of runs, content that changed under it, and journals of an older format."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from cli.test_cli import refused, succeed
from conftest import DEVICE, edit_json
from mmq.errors import JournalError
from mmq.storage.atomic import write_bytes
from mmq.workdir.journal import Journal
from mmq.workdir.versions import PACKAGES
from stages.test_resume import FOLDERS, assert_same_outputs, stopped, up_to


def as_format_1(journal: dict[str, Any]) -> None:
    """What the first release wrote for the same run."""
    journal["format"] = 1
    for stage in journal["stages"].values():
        stage.pop("runs")
    if "awq" in journal["stages"]:
        for field in ("seed", "awq.search"):
            del journal["stages"]["awq"]["fingerprint"][field]


def read(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "journal.json").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("stage", FOLDERS)
def test_a_run_begun_with_format_1_goes_on(project: Path, finished: Path, stage: str) -> None:
    recipe = up_to(project, finished, stage)
    assert stopped(project, stage, "replace", 7)[0] == -signal.SIGKILL
    edit_json(project / "run" / "journal.json", as_format_1)
    units = read(project / "run")["stages"][stage]["units"]
    assert units
    if stage == "awq":
        # It searched in full: there was no other way.
        assert 'awq.search = "full", now it is "paired"' in refused(stage, recipe)
    succeed(stage, recipe, "--quiet", "--set", "awq.search=full")
    if stage != "awq":
        assert_same_outputs(project, finished, stage)
    journal = read(project / "run")
    assert journal["format"] == 3
    (run,) = journal["stages"][stage]["runs"]
    assert run["units"] == len(journal["stages"][stage]["units"]) - len(units)


def test_format_1_is_migrated_with_the_settings_it_had(finished_copy: Path) -> None:
    edit_json(finished_copy / "run" / "journal.json", as_format_1)
    for stage in FOLDERS:
        assert "is complete" in succeed(stage, finished_copy / "recipe.yaml", "--set", "awq.search=full")
    options = "--set", "awq.search=full", "--set", "seed=5"
    assert "seed = 0, now it is 5" in refused("awq", finished_copy / "recipe.yaml", *options)


def test_runs_of_a_stage_are_noted(project: Path, finished: Path) -> None:
    recipe = up_to(project, finished, "awq")
    assert stopped(project, "awq", "replace", 7)[0] == -signal.SIGKILL
    succeed("awq", recipe, "--quiet")
    runs = read(project / "run")["stages"]["awq"]["runs"]
    assert [run["units"] for run in runs] == [1, 2]
    for run in runs:
        assert run["seconds"] > 0
        assert run["peak_host_bytes"] > 50 * 2**20
        assert (run["peak_device_bytes"] > 0) == (DEVICE.type != "cpu")
        assert run["seed"] == 0
        assert run["host"] == os.uname().nodename
        assert run["versions"].keys() == {"mmq", "python", *PACKAGES}
    assert read(project / "run")["stages"]["awq"]["fingerprint"]["seed"] == 0
    before = read(project / "run")
    succeed("awq", recipe, "--quiet")
    assert read(project / "run") == before, "a run that has nothing to do notes nothing"


def test_restart_forgets_the_runs(finished_copy: Path) -> None:
    succeed("dequant", finished_copy / "recipe.yaml", "--quiet", "--restart")
    (run,) = read(finished_copy / "run")["stages"]["dequant"]["runs"]
    assert run["units"] == 4


def flip(path: Path, offset: int = -3) -> None:
    """Change one byte of a file, whose size stays."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("stage", "before"), [("awq", "dequant"), ("restore", "awq")])
def test_a_changed_byte_between_stages_is_found(project: Path, finished: Path, stage: str, before: str) -> None:
    recipe = up_to(project, finished, stage)
    shards = sorted((project / "run" / FOLDERS[before]).glob("*.safetensors"))
    for shard in shards:
        kept = shard.read_bytes()
        flip(shard)
        message = refused(stage, recipe, "--quiet")
        assert str(shard) in message
        assert f"mmq {before} --restart" in message
        shard.write_bytes(kept)
    succeed(stage, recipe, "--quiet")
    assert_same_outputs(project, finished, stage)


def test_changed_hidden_states_are_found(project: Path, finished: Path) -> None:
    recipe = up_to(project, finished, "awq")
    assert stopped(project, "awq", "replace", 7)[0] == -signal.SIGKILL
    (hidden,) = (project / "run" / "state" / "awq").glob("hidden-*.safetensors")
    flip(hidden)
    assert f"{hidden} is not what awq wrote" in refused("awq", recipe)
    flip(hidden)
    succeed("awq", recipe, "--quiet")
    assert_same_outputs(project, finished, "awq")


def test_content_is_read_once_and_only_what_was_written_passes(tmp_path: Path) -> None:
    stage = Journal(tmp_path).stage("s")
    stage.begin({})
    stage.finish_unit("u", {"a": write_bytes(tmp_path / "a", b"content")})
    assert stage.check_content("a")
    assert not stage.check_content("a"), "read a second time"
    (tmp_path / "b").write_bytes(b"content")
    with pytest.raises(JournalError, match="is not what s wrote"):
        stage.check_content("b")
    (tmp_path / "a").write_bytes(b"Content")
    with pytest.raises(JournalError, match="is not what s wrote"):
        Journal(tmp_path).stage("s").check_content("a")
