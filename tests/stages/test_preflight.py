"""What can be known is known before the first byte: the same sentence from `run`, a stage and `--dry-run`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cli.test_cli import cli, events, refused, succeed
from conftest import edit_json, write_recipe
from mmq.recipe import load
from mmq.source import calibration
from mmq.stages import awq_checks, preflight
from mmq.stages.base import free_disk
from mmq.stages.pipeline import STAGES, run_stages
from mmq.workdir.workspace import Workspace
from stages.test_bad_input import CALIBRATIONS, IN_AWQ, SOURCES, config, on_source, tensors

Change = Callable[[Path], Any]
BF16 = ["--set", "awq.source=bf16"]


def samples_in(folder: str) -> Change:
    def change(project: Path) -> None:
        (project / folder).mkdir(parents=True)
        shutil.copy(project / "samples.jsonl", project / folder / "samples.jsonl")
        write_recipe(project, calibration={"files": [{"path": f"{folder}/samples.jsonl"}], "sequence_length": 96})

    return change


def recipe_of(**awq: Any) -> Change:
    return lambda project: write_recipe(project, **awq)


def samples(**settings: Any) -> dict[str, Any]:
    return {"files": [{"path": "samples.jsonl"}], "sequence_length": 96} | settings


NORM = "model.layers.1.input_layernorm.weight"
LATE: dict[str, tuple[Change, str]] = {
    **{name: SOURCES[name] for name in sorted(IN_AWQ)},
    **{
        name: CALIBRATIONS[name]
        for name in ("missing", "too few", "not JSON", "no tokenizer", "broken chat template", "small vocabulary")
    },
    "no such device": (recipe_of(device="cuda:99"), "awq.device is 'cuda:99'"),
    "sequences beyond the positions": (
        recipe_of(calibration=samples(sequence_length=5000)),
        "awq.calibration.sequence_length is 5000, the model has 4096 positions",
    ),
    "no such set": (
        recipe_of(calibration=samples(files=[{"hub": "owner/nothing", "samples": 3}])),
        "the dataset owner/nothing can't be read",
    ),
    "samples among the outputs": (samples_in("run/awq"), "run/awq, which mmq writes"),
    "a tensor that no layer has": (
        tensors(lambda all_: all_.update({"model.layers.1.extra.weight": all_[NORM].clone()})),
        "layer 1 does not fit MiniMaxM2DecoderLayer",
    ),
    "a scale of the cache": (
        tensors(lambda all_: all_.update({"model.layers.1.self_attn.k_scale": all_[NORM][:1].clone()})),
        'Unexpected key(s) in state_dict: "self_attn.k_scale"',
    ),
    "an epsilon in words": (config(rms_norm_eps="small"), "rms_norm_eps"),
}  # fmt: skip


@pytest.mark.parametrize("fault", LATE)
def test_what_only_awq_met_is_refused_first_and_alike(project: Path, fault: str) -> None:
    """Before, `run` would dequantize the whole model first."""
    change, message = LATE[fault]
    change(project)
    recipe = project / "recipe.yaml"
    fp8 = ["--set", "awq.source=fp8"]
    first = refused("run", recipe, *BF16)
    assert message in first
    assert (
        first
        == refused("awq", recipe, *fp8)
        == refused("run", recipe, "--dry-run")
        == refused("awq", recipe, "--dry-run")
    )
    assert not [name for name in ("bf16", "hybrid", "journal.json") if (project / "run" / name).exists()]
    assert not list((project / "run").rglob("*.safetensors"))


def test_the_disk_must_hold_all_stages_together(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = project / "recipe.yaml"
    (event,) = events(succeed("run", recipe, "--dry-run", "--json"))
    sizes = [plan["bytes_written"] for plan in event["plan"]]
    # Each stage alone would have room.
    enough = max(sizes) + 10**6
    assert enough < sum(sizes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(total=10**12, used=0, free=enough))
    messages = {refused("run", recipe, *options) for options in ([], ["--dry-run"])}
    (message,) = messages
    assert all(str(project / "run" / name) in message for name in ("bf16", "awq", "state", "hybrid"))
    assert "together, their disk has" in message
    assert not (project / "run" / "bf16").exists()
    succeed("dequant", recipe, "--quiet")
    monkeypatch.undo()
    # What is done needs no room any more.
    left = sum(sizes[1:]) + 10**7
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(total=10**12, used=0, free=left))
    succeed("run", recipe, "--dry-run")


@pytest.mark.parametrize("command", ["run", "dequant"])
def test_a_work_dir_that_can_t_be_written_is_refused(
    project: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, target = project / "recipe.yaml", project / "file"
    target.write_text("", encoding="utf-8")
    inside = ["--set", "work_dir=file/run"]
    assert f"{target} is no folder" in refused(command, recipe, *inside)
    assert refused(command, recipe, *inside) == refused(command, recipe, *inside, "--dry-run")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != project)  # as root anything may be written
    message = refused(command, recipe)
    assert f"no permission to write into {project}" in message
    assert message == refused(command, recipe, "--dry-run")
    assert not (project / "run").exists()


def test_a_file_in_the_place_of_an_output_is_refused(project: Path) -> None:
    (project / "run").mkdir()
    (project / "run" / "hybrid").write_text("", encoding="utf-8")
    assert "run/hybrid is no folder" in refused("run", project / "recipe.yaml")
    (project / "run" / "hybrid").unlink()
    # What a run writes at its end, after hours.
    (project / "run" / "report").write_text("", encoding="utf-8")
    assert "run/report is no folder" in refused("run", project / "recipe.yaml")
    (project / "run" / "report").unlink()
    (project / "run" / "verify.json").mkdir()
    message = refused("run", project / "recipe.yaml", "--dry-run")
    assert "run/verify.json is a folder, a file of that name is to be written" in message
    assert message == refused("run", project / "recipe.yaml")
    assert not (project / "run" / "bf16").exists()


def test_too_little_memory_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmq.stages.base.total_host", lambda: 2**29)
    message = refused("run", project / "recipe.yaml")
    assert "of memory at least, this machine has 536.9 MB" in message
    assert not (project / "run" / "bf16").exists()


def test_a_dry_run_lists_what_it_checked(project: Path) -> None:
    recipe = project / "recipe.yaml"
    (event,) = events(succeed("run", recipe, "--dry-run", "--json"))
    names = [(entry["stage"], entry["checked"]) for entry in event["checks"]]
    assert {("all", "source"), ("all", "disk"), ("awq", "device"), ("awq", "vocabulary")} < set(names)
    found = {entry["checked"]: entry["found"] for entry in event["checks"]}
    assert found["sequence length"] == "96 of 4,096 positions"
    assert found["calibration samples, tokenizer and chat template"].startswith("12 samples, 1,")
    plain = succeed("run", recipe, "--dry-run")
    assert "Checked" in plain and "96 of 4,096" in plain
    (event,) = events(succeed("dequant", recipe, "--dry-run", "--json"))
    assert {entry["stage"] for entry in event["checks"]} == {"all"}


def test_every_stage_brings_its_checks(project: Path) -> None:
    """In the order of the stages, each once; of what has run before, none."""
    workspace = Workspace.of(load(project / "recipe.yaml"))
    alone = {name: [check.name for check in stage.checks(workspace, set())] for name, stage in STAGES.items()}
    assert "dequant output" in alone["awq"] and "awq output" in alone["restore"]
    behind = STAGES["awq"].checks(workspace, {"dequant"})
    assert [check.name for check in behind] == [name for name in alone["awq"] if name != "dequant output"]


def test_the_tokens_of_the_preflight_are_the_stages(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are read, rendered and tokenized once."""
    calls = []
    load_tokens = calibration.load_tokens
    monkeypatch.setattr(awq_checks, "load_tokens", lambda *given: calls.append(1) or load_tokens(*given))
    workspace = Workspace.of(load(project / "recipe.yaml", ["awq.source=fp8"]))
    run_stages(workspace, ["awq"])
    assert calls == [1]


def test_a_finished_stage_is_not_checked_again(finished_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """restore is made anew though the machine has no such device any more, and too little memory for awq."""
    recipe = finished_copy / "recipe.yaml"
    edit_json(finished_copy / "run/journal.json", lambda journal: journal["stages"].pop("restore"))
    shutil.rmtree(finished_copy / "run/hybrid")
    monkeypatch.setattr(awq_checks, "present_device", lambda name: pytest.fail("looked for a device"))
    monkeypatch.setattr("mmq.stages.base.total_host", lambda: 1)
    succeed("restore", recipe, "--quiet")
    workspace = Workspace.of(load(recipe))
    assert preflight.preflight(workspace, list(STAGES.values())) == []


def test_a_finished_stage_needs_its_samples_no_more(finished_copy: Path) -> None:
    recipe = finished_copy / "recipe.yaml"
    edit_json(finished_copy / "run/journal.json", lambda journal: journal["stages"].pop("restore"))
    shutil.rmtree(finished_copy / "run/hybrid")
    shutil.rmtree(finished_copy / "run/state/calibration")
    (finished_copy / "samples.jsonl").unlink()
    # Its other settings are compared all the same.
    assert "awq was begun with awq.n_grid" in refused("run", recipe, "--set", "awq.n_grid=5")
    succeed("run", recipe, "--quiet")
    assert (finished_copy / "run/hybrid/config.json").exists()
    # Begun anew, it does need them.
    assert "there is no calibration file" in refused("awq", recipe, "--restart")
    assert (finished_copy / "run/awq/config.json").exists()


def test_what_a_run_was_begun_with_is_compared_first(finished_copy: Path) -> None:
    """dequant is made anew only once it is known that awq can go on."""
    recipe, run = finished_copy / "recipe.yaml", finished_copy / "run"
    edit_json(run / "journal.json", lambda journal: journal["stages"].pop("restore"))
    message = refused("run", recipe, "--dry-run", "--set", "awq.n_grid=5")
    assert "awq was begun with awq.n_grid = 20, now it is 5" in message
    assert message == refused("run", recipe, "--set", "awq.n_grid=5")
    begun = json.loads((run / "journal.json").read_text(encoding="utf-8"))
    assert begun["stages"]["awq"]["complete"]


def test_a_dry_run_takes_the_stages_before_for_done(project: Path) -> None:
    """Its own command says that they must run first."""
    for stage in ("awq", "restore"):
        succeed(stage, project / "recipe.yaml", "--dry-run")
        assert "is not complete" in refused(stage, project / "recipe.yaml")


def test_heads_that_don_t_share_keys_evenly_are_refused(project: Path) -> None:
    """transformers' attention repeats each key head a whole number of times; torch would fail at the first layer."""
    on_source(lambda source: edit_json(source / "config.json", lambda c: c.update(num_key_value_heads=3)))(project)
    assert "num_attention_heads is 4, not a multiple of num_key_value_heads = 3" in refused(
        "dequant", project / "recipe.yaml"
    )


def test_free_disk_is_that_of_the_folder_above(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "a" / "b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)


def test_restart_checks_what_is_complete(finished_copy: Path) -> None:
    """It begins anew, so that all is read again."""
    (finished_copy / "samples.jsonl").write_text("words\n", encoding="utf-8")
    result = cli("run", finished_copy / "recipe.yaml", "--restart", "--quiet")
    assert result.exit_code == 2 and "is not JSON" in result.stderr
    assert (finished_copy / "run/bf16/config.json").exists() and (finished_copy / "run/hybrid/config.json").exists()


def test_other_settings_of_a_later_stage_are_met_before_an_earlier_one_writes(finished_copy: Path) -> None:
    """bf16/ is gone and would be made anew for hours before awq met the other grid."""
    path = finished_copy / "recipe.yaml"
    edit_json(finished_copy / "run/journal.json", lambda content: content["stages"].pop("dequant"))
    shutil.rmtree(finished_copy / "run/bf16")
    said = refused("run", path, *BF16, "--set", "awq.n_grid=7")
    assert said.startswith("awq was begun with awq.n_grid = 20, now it is 7")
    assert said == refused("run", path, *BF16, "--set", "awq.n_grid=7", "--dry-run")
    assert not (finished_copy / "run/bf16").exists()
    # restore's input may come out as it was; what else it was begun with is compared.
    edit_json(finished_copy / "run/journal.json", lambda content: content["stages"].pop("awq"))
    succeed("run", path, "--dry-run")
    said = refused("run", path, "--dry-run", "--set", "restore.attention_activations=none")
    assert said.startswith("restore was begun with restore.attention_activations")
