"""Stopping and going on: the real command, changed inputs, lost files, torn journals, locks, status.

`faults/` stops a tiny model at every system call. Most processes here are forked from a server that has torch loaded,
and send themselves the signal at a given system call: so the moment is hit exactly, and the signals, processes and
locks are real all the same.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.test_cli import cli, events, refused, succeed
from conftest import DEVICE, SAMPLES, digests, edit_json, write_recipe
from faults import harness
from faults.harness import FOLDERS, FORK
from faults.inject import Fault, Injector
from mmq.cli.app import app
from mmq.errors import LockedError
from mmq.families.registry import ARCHITECTURES
from mmq.machine.device import named_device
from mmq.source.synth import Sizes, write_checkpoint, write_samples
from mmq.workdir.lock import lock
from storage.test_storage import edit_tensors


def _child(arguments: list[str], root: str, call: str, number: int, sent: int, stderr: str) -> None:
    """Run a command; at the `number`-th `call` of a kind below `root` send this process a signal."""
    os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    Injector(Path(root), Fault(number, sent=signal.Signals(sent), kind=call)).arm()
    app(arguments)


def stopped(
    project: Path, stage: str, call: str, number: int, sent: int = signal.SIGKILL, options: list[str] | None = None
) -> tuple[int, str]:
    """Exit code and standard error of a stage that gets a signal at a moment."""
    stderr = project / "stderr"
    arguments = [stage, str(project / "recipe.yaml"), *(options or [])]
    process = FORK.Process(target=_child, args=(arguments, str(project), call, number, int(sent), str(stderr)))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    text = stderr.read_text(encoding="utf-8")
    stderr.unlink()
    return process.exitcode, text


def up_to(project: Path, finished: Path, stage: str) -> Path:
    """Put what the stages before this one made into a project; its recipe."""
    harness.up_to(finished / "run", stage, project / "run")
    return project / "recipe.yaml"


def assert_same_outputs(project: Path, finished: Path, stage: str) -> None:
    """The stage's folder is as in the undisturbed run, and nothing is left over."""
    folder = FOLDERS[stage]
    assert digests(project / "run" / folder) == digests(finished / "run" / folder)
    assert not list((project / "run").rglob("*.mmq-tmp"))
    assert not list((project / "run").rglob("hidden-*"))


def is_complete(work_dir: Path, stage: str) -> bool:
    """Whether the journal says that the stage has ended."""
    path = work_dir / "journal.json"
    stages = json.loads(path.read_text(encoding="utf-8"))["stages"] if path.exists() else {}
    return bool(stages.get(stage, {}).get("complete"))


def test_a_stage_killed_again_and_again_ends_with_the_same_bytes(project: Path, finished: Path) -> None:
    recipe = up_to(project, finished, "awq")
    for number in (3, 4, 6, 9, 12):
        assert stopped(project, "awq", "fsync", number)[0] == -signal.SIGKILL
    succeed("awq", recipe, "--quiet")
    assert_same_outputs(project, finished, "awq")


def test_the_hint_after_a_signal_repeats_the_overrides(project: Path) -> None:
    """Without them the same command would be refused as another run, or quietly use other settings."""
    options = ["--set", "work_dir=elsewhere"]
    _, message = stopped(project, "dequant", "fsync", 5, signal.SIGTERM, options)
    assert "--set work_dir=elsewhere" in message


@pytest.fixture(scope="session")
def bigger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose stages take long enough to be met from outside, and its undisturbed run in `wanted`."""
    folder = tmp_path_factory.mktemp("bigger")
    write_checkpoint(folder / "source", Sizes(layers=4), shards=24, shuffle=True)
    write_samples(folder / "samples.jsonl", 12)
    recipe = write_recipe(folder, n_grid=40)
    for stage in FOLDERS:
        succeed(stage, recipe, "--quiet", "--set", "work_dir=wanted")
    return folder


@pytest.fixture
def slow(bigger: Path, tmp_path: Path) -> Path:
    """A copy of the bigger project."""
    return Path(shutil.copytree(bigger, tmp_path / "slow"))


@contextmanager
def running(recipe: Path, command: str) -> Iterator[subprocess.Popen[str]]:
    """The real command in the background; it does not outlive the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mmq", command, recipe, "--set", "workers=1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Until something is seen in the work_dir."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the command ended before it was met"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def finished_units(work_dir: Path, stage: str) -> int:
    """How many units the journal names."""
    path = work_dir / "journal.json"
    if not path.exists():
        return 0
    return len(json.loads(path.read_text(encoding="utf-8"))["stages"].get(stage, {}).get("units", {}))


def test_the_real_command_killed_twice_ends_with_the_same_bytes(slow: Path) -> None:
    recipe, run = slow / "recipe.yaml", slow / "run"
    for stage, units in (("dequant", 2), ("awq", 1)):
        with running(recipe, "run") as process:
            wait_for(process, lambda stage=stage, units=units: finished_units(run, stage) >= units)  # type: ignore[misc]
            process.kill()
            assert process.wait() == -signal.SIGKILL
    assert finished_units(run, "awq") < 5
    succeed("run", recipe, "--quiet")
    for folder in FOLDERS.values():
        made = digests(run / folder)
        if folder == FOLDERS["restore"]:
            assert made.pop("README.md"), "the model card, which says how long this run took"
        assert made == digests(slow / "wanted" / folder)


@pytest.mark.parametrize(("sent", "wanted"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_the_real_command_holds_its_lock_until_a_signal_ends_it(slow: Path, sent: int, wanted: int) -> None:
    recipe, run = slow / "recipe.yaml", slow / "run"
    succeed("dequant", recipe, "--quiet")
    with running(recipe, "awq") as process:
        wait_for(process, lambda: finished_units(run, "awq") >= 1)
        process.send_signal(signal.SIGSTOP)
        message = refused("awq", recipe)
        assert f"{run} is in use by process {process.pid} " in message
        with pytest.raises(LockedError), lock(run):
            pass
        assert "layer-00000" in succeed("status", recipe, "--json"), "status takes no lock"
        process.send_signal(sent)
        process.send_signal(signal.SIGCONT)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == wanted, stderr
        assert f"mmq awq {recipe}" in stderr
        assert "Traceback" not in stderr
    assert 1 <= finished_units(run, "awq") < 5
    assert not list(run.rglob("*.mmq-tmp"))
    succeed("awq", recipe, "--quiet")
    assert digests(run / "awq") == digests(slow / "wanted" / "awq")


def test_a_dead_processs_lock_is_no_obstacle(project: Path) -> None:
    assert stopped(project, "dequant", "fsync", 5)[0] == -signal.SIGKILL
    assert (project / "run" / "lock").read_text(encoding="utf-8").startswith("process ")
    succeed("dequant", project / "recipe.yaml", "--quiet")


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), lock(tmp_path):
        raise RuntimeError
    with lock(tmp_path), pytest.raises(LockedError, match=str(os.getpid())), lock(tmp_path):
        pass


CHANGES = {
    "awq.n_grid": "awq.n_grid=7",
    "awq.min_tokens": "awq.min_tokens=0",
    "awq.group_size": "awq.group_size=64",
    "awq.duo_scaling": "awq.duo_scaling=both",
    "awq.propagate_quantized": "awq.propagate_quantized=false",
    "awq.kv_cache_scheme": "awq.kv_cache_scheme=null",
    "awq.calibration": "awq.calibration.sequence_length=32",
}


@pytest.mark.parametrize("field", CHANGES)
def test_awq_does_not_go_on_with_other_settings(project: Path, finished: Path, field: str) -> None:
    recipe = up_to(project, finished, "awq")
    assert stopped(project, "awq", "replace", 7)[0] == -signal.SIGKILL
    before = digests(project / "run" / "awq")
    message = refused("awq", recipe, "--set", CHANGES[field])
    assert field in message
    assert "--restart" in message
    assert digests(project / "run" / "awq") == before
    succeed("awq", recipe, "--quiet")
    assert_same_outputs(project, finished, "awq")
    assert field in refused("awq", recipe, "--set", CHANGES[field])


def test_awq_does_not_go_on_with_another_text(finished_copy: Path) -> None:
    samples = finished_copy / "samples.jsonl"
    text = samples.read_text(encoding="utf-8")
    assert "experts" in text
    samples.write_text(text.replace("experts", "layers"), encoding="utf-8")
    assert "awq.calibration" in refused("awq", finished_copy / "recipe.yaml")


def test_restore_does_not_go_on_with_other_settings(finished_copy: Path) -> None:
    message = refused("restore", finished_copy / "recipe.yaml", "--set", "restore.attention_activations=none")
    assert "restore.attention_activations" in message


def test_a_result_with_the_hubs_names_alone_stays_as_it_is(finished_copy: Path, finished: Path) -> None:
    """As all had them before there was a choice, and by default after that: their journals don't say it."""
    recipe, hub = finished_copy / "recipe.yaml", ("--set", "restore.expert_targets=hub")
    succeed("restore", recipe, "--quiet", "--restart", *hub)
    journal = json.loads((finished_copy / "run/journal.json").read_text(encoding="utf-8"))
    assert "restore.expert_targets" not in journal["stages"]["restore"]["fingerprint"]
    before = digests(finished_copy / "run/hybrid")
    said = refused("restore", recipe)
    assert said == refused("run", recipe) and digests(finished_copy / "run/hybrid") == before
    assert said.startswith(
        'restore was begun with restore.expert_targets = "hub", now it is "both": going on would mix'
    )
    assert said.endswith("set it back, or run `mmq restore --restart` to begin restore anew")
    assert "restore is complete" in succeed("restore", recipe, *hub)
    succeed("verify", recipe, "--quiet")
    succeed("restore", recipe, "--quiet", "--restart")
    assert_same_outputs(finished_copy, finished, "restore")
    said = refused("restore", recipe, *hub)
    assert said.startswith('restore was begun with restore.expert_targets = "both", now it is "hub"')


@pytest.mark.parametrize("then", [None, "both"])
def test_one_name_of_the_experts_is_no_choice(tmp_path: Path, then: str | None) -> None:
    """Most families' experts have the common names, whatever a run was begun with."""
    write_checkpoint(tmp_path / "source", Sizes(1, 128, 128, 4), family=ARCHITECTURES["qwen3_moe"])
    write_samples(tmp_path / "samples.jsonl", SAMPLES)
    recipe = write_recipe(tmp_path, n_grid=3, source="fp8")
    for stage in ("awq", "restore"):
        succeed(stage, recipe, "--quiet", "--set", "restore.expert_targets=hub")

    def begun_with(content: dict[str, Any]) -> None:
        fingerprint = content["stages"]["restore"]["fingerprint"]
        assert "restore.expert_targets" not in fingerprint
        fingerprint |= {"restore.expert_targets": then} if then else {}

    edit_json(tmp_path / "run/journal.json", begun_with)
    before = digests(tmp_path / "run/hybrid")
    for choice in ("hub", "both"):
        assert "restore is complete" in succeed("restore", recipe, "--set", f"restore.expert_targets={choice}")
        config = json.loads((tmp_path / "run/hybrid/config.json").read_text(encoding="utf-8"))
        targets = config["quantization_config"]["config_groups"]["group_0"]["targets"]
        assert targets == [r"re:.*experts\.\d+\.(down_proj|gate_proj|up_proj)$"]
    succeed("restore", recipe, "--quiet", "--restart")
    assert digests(tmp_path / "run/hybrid") == before


@pytest.mark.parametrize("stage", FOLDERS)
def test_no_stage_goes_on_with_another_source(finished_copy: Path, stage: str) -> None:
    recipe = finished_copy / "recipe.yaml"
    router = "model.layers.0.block_sparse_moe.gate.weight"
    edit_tensors(finished_copy / "source", lambda tensors: tensors.update({router: tensors[router].to(torch.bfloat16)}))
    assert "model.source" in refused(stage, recipe)


@pytest.mark.parametrize("stage", FOLDERS)
def test_no_stage_goes_on_with_a_source_of_another_config(finished_copy: Path, stage: str) -> None:
    edit_json(finished_copy / "source" / "config.json", lambda config: config.update(rope_theta=10000))
    assert "model.source" in refused(stage, finished_copy / "recipe.yaml")


def test_restore_does_not_go_on_with_another_awq_output(finished_copy: Path) -> None:
    recipe = finished_copy / "recipe.yaml"
    succeed("awq", recipe, "--quiet", "--restart", "--set", "awq.n_grid=3", "--set", "awq.min_tokens=0")
    assert "awq (its output)" in refused("restore", recipe)
    succeed("restore", recipe, "--quiet", "--restart")
    succeed("verify", recipe, "--quiet")


HARMLESS = ["awq.device=auto", "workers=1", "awq.memory_budget=1GiB", "awq.source=fp8"]


def test_what_does_not_change_the_bytes_may_change(project: Path, finished: Path) -> None:
    if named_device("auto").type != DEVICE.type:
        pytest.skip("auto would be another device here, whose sums differ in the last bits")
    recipe = up_to(project, finished, "awq")
    assert stopped(project, "awq", "replace", 7)[0] == -signal.SIGKILL
    assert finished_units(project / "run", "awq") >= 1
    options = [part for setting in HARMLESS for part in ("--set", setting)]
    succeed("awq", recipe, "--quiet", *options)
    assert_same_outputs(project, finished, "awq")
    succeed("restore", recipe, "--quiet", *options)
    assert_same_outputs(project, finished, "restore")


@pytest.mark.parametrize("stage", FOLDERS)
def test_a_finished_stage_says_so_and_changes_nothing(finished_copy: Path, stage: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished_copy / "run").rglob("*") if path.name != "lock"}
    assert f"{stage} is complete" in succeed(stage, finished_copy / "recipe.yaml")
    after = {path: path.stat().st_mtime_ns for path in (finished_copy / "run").rglob("*") if path.name != "lock"}
    assert after == before


@pytest.mark.parametrize("stage", FOLDERS)
def test_restart_makes_a_stage_anew(finished_copy: Path, finished: Path, stage: str) -> None:
    folder = finished_copy / "run" / FOLDERS[stage]
    (folder / "left-over.txt").write_text("from another run")
    others = {f: digests(finished_copy / "run" / f) for f in FOLDERS.values() if f != FOLDERS[stage]}
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    succeed(stage, finished_copy / "recipe.yaml", "--quiet", "--restart")
    assert_same_outputs(finished_copy, finished, stage)
    assert {f: digests(finished_copy / "run" / f) for f in others} == others


def test_restart_with_other_settings_is_a_new_run(finished_copy: Path) -> None:
    recipe = finished_copy / "recipe.yaml"
    options = ["--set", "awq.group_size=64"]
    succeed("run", recipe, "--quiet", "--restart", *options)
    config = json.loads((finished_copy / "run" / "hybrid" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 64


def lose(path: Path) -> str:
    """Remove a file."""
    path.unlink()
    return f"{path} is gone"


def cut(path: Path) -> str:
    """Take a byte off a file's end."""
    size = path.stat().st_size
    os.truncate(path, size - 1)
    return f"{path} has {size - 1} bytes instead of {size}"


@pytest.mark.parametrize("damage", [lose, cut])
@pytest.mark.parametrize("stage", FOLDERS)
def test_a_finished_units_lost_file_is_named(finished_copy: Path, stage: str, damage: Callable[[Path], str]) -> None:
    message = damage(sorted((finished_copy / "run" / FOLDERS[stage]).glob("*.safetensors"))[1])
    found = refused(stage, finished_copy / "recipe.yaml")
    assert message in found
    assert f"mmq {stage} --restart" in found


@pytest.mark.parametrize(("stage", "before"), [("awq", "dequant"), ("restore", "awq")])
def test_a_stage_checks_what_it_reads(project: Path, finished: Path, stage: str, before: str) -> None:
    recipe = up_to(project, finished, stage)
    message = cut(sorted((project / "run" / FOLDERS[before]).glob("*.safetensors"))[1])
    assert message in refused(stage, recipe)


def test_lost_hidden_states_are_named(project: Path, finished: Path) -> None:
    recipe = up_to(project, finished, "awq")
    assert stopped(project, "awq", "replace", 7)[0] == -signal.SIGKILL
    (hidden,) = (project / "run" / "state" / "awq").glob("hidden-*.safetensors")
    assert lose(hidden) in refused("awq", recipe)


GARBAGE: dict[str, bytes] = {
    "empty": b"",
    "torn": b'{"format": 1, "stages": {"dequant": {"finger',
    "binary": b"\xff\x00\xfe",
    "list": b"[]",
    "null": b"null",
    "no stages": b'{"format": 1}',
    "stages is a list": b'{"format": 1, "stages": []}',
    "stage is a number": b'{"format": 1, "stages": {"dequant": 5}}',
    "unit without files": b'{"format": 1, "stages": {"dequant": {"units": {"x": 5}}}}',
    "file without digest": b'{"format": 1, "stages": {"dequant": {"units": {"x": {"y": [1]}}}}}',
    "fingerprint is null": b'{"format": 1, "stages": {"dequant": {"fingerprint": null, "units": {}}}}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", GARBAGE)
@pytest.mark.parametrize("command", ["dequant", "status"])
def test_a_garbage_journal_is_refused(project: Path, command: str, content: str) -> None:
    journal = project / "run" / "journal.json"
    journal.parent.mkdir()
    journal.write_bytes(GARBAGE[content])
    assert str(journal) in refused(command, project / "recipe.yaml")
    assert journal.read_bytes() == GARBAGE[content]
    assert digests(project / "run").keys() <= {"journal.json", "lock"}


@pytest.mark.parametrize("version", [0, 4, "1", None])
def test_a_journal_of_another_format_is_refused(finished_copy: Path, version: object) -> None:
    edit_json(finished_copy / "run" / "journal.json", lambda journal: journal.update(format=version))
    message = refused("dequant", finished_copy / "recipe.yaml")
    assert f"format {version!r}" in message


def test_a_moved_work_dir_goes_on(project: Path, finished: Path) -> None:
    recipe = up_to(project, finished, "awq")
    assert stopped(project, "awq", "replace", 7)[0] == -signal.SIGKILL
    moved = project.parent / "elsewhere" / "moved"
    moved.parent.mkdir()
    (project / "run").rename(moved)
    for stage in ("awq", "restore", "verify"):
        succeed(stage, recipe, "--quiet", "--set", f"work_dir={moved}")
    for folder in FOLDERS.values():
        assert digests(moved / folder) == digests(finished / "run" / folder)
    assert not (project / "run").exists()


def status(recipe: Path, *options: object) -> dict[str, Any]:
    """What `mmq status --json` says; it must change nothing."""
    before = digests(recipe.parent)
    (found,) = events(succeed("status", recipe, "--json", *options))
    assert digests(recipe.parent) == before
    return found


def test_status_at_every_point(project: Path) -> None:
    recipe = project / "recipe.yaml"
    found = status(recipe)
    assert found["work_dir"] == str(project / "run")
    assert [(s["stage"], s["state"], s["done"], s["last"]) for s in found["stages"]] == [
        ("dequant", "not begun", 0, None),
        ("awq", "not begun", 0, None),
        ("restore", "not begun", 0, None),
    ]
    assert [s["units"] for s in found["stages"]] == [4, 3, 3]
    assert found["next"] == f"mmq dequant {recipe}"
    assert not (project / "run").exists()

    # One worker: the second shard's rename comes after the journal's for the first.
    assert stopped(project, "dequant", "replace", 4, options=["--set", "workers=1"])[0] == -signal.SIGKILL
    found = status(recipe)
    assert found["stages"][0]["state"] == "begun"
    assert found["stages"][0]["done"] == 1
    assert found["stages"][0]["last"].startswith("model-0000")
    assert found["next"] == f"mmq dequant {recipe}"

    for stage, following in (("dequant", "awq"), ("awq", "restore"), ("restore", "verify")):
        succeed(stage, recipe, "--quiet")
        found = status(recipe)
        mine = next(entry for entry in found["stages"] if entry["stage"] == stage)
        assert mine["state"] == "complete"
        assert mine["done"] == mine["units"]
        assert found["next"] == f"mmq {following} {recipe}"


def test_status_in_the_middle_of_awq(project: Path, finished: Path) -> None:
    recipe = up_to(project, finished, "awq")
    assert stopped(project, "awq", "replace", 7)[0] == -signal.SIGKILL
    found = status(recipe)["stages"][1]
    assert 0 < found.pop("percent") < 100
    assert found == {
        "stage": "awq", "state": "begun", "done": 1, "units": 3, "last": "layer-00000", "removed": [],
    }  # fmt: skip


def test_status_of_fp8_has_no_dequant(project: Path) -> None:
    found = status(project / "recipe.yaml", "--set", "awq.source=fp8")
    assert [entry["stage"] for entry in found["stages"]] == ["awq", "restore"]


def test_status_for_people(finished_copy: Path) -> None:
    output = cli("status", finished_copy / "recipe.yaml").stdout
    assert "complete" in output
    assert f"mmq verify {finished_copy / 'recipe.yaml'}" in output
