"""The kept tokens: when they are taken, when made anew, and that they are whole."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.test_cli import refused, succeed
from conftest import SAMPLES, digests, edit_json
from mmq.errors import MmqError
from mmq.quantize.layer import LayerQuantizer
from mmq.workdir.lock import lock
from source.conftest import WINDOW, Row, described, kept, no_library, tokens_of, write_sources


def test_the_command_and_awq_keep_the_same_and_use_each_others(
    project: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = described(project / "recipe.yaml")
    (path,) = kept(project)
    assert found["kept_in"] == str(path)
    assert path.name == f"{found['inputs_fingerprint']}.safetensors"
    assert digests(path.parent) == digests(kept(finished)[0].parent)
    no_library(monkeypatch)
    again = described(project / "recipe.yaml")
    assert again == found | {"reused": True}
    succeed("awq", project / "recipe.yaml", "--quiet", "--set", "awq.source=fp8")
    assert digests(project / "run" / "awq") == digests(finished / "run" / "awq")
    journal = json.loads((project / "run" / "journal.json").read_text(encoding="utf-8"))
    assert journal["stages"]["awq"]["fingerprint"]["awq.calibration"] == found["tokens_fingerprint"]


def test_a_resumed_stage_needs_neither_the_hub_nor_the_tokenizer(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_sources(hub, {"hub": "set", "column": "body", "samples": 9}, {"path": "samples.jsonl", "samples": 2})
    quantize = LayerQuantizer.quantize

    def stop(self: LayerQuantizer, layer: int, *rest: Any) -> Any:
        if layer == 1:
            raise MmqError("stopped here")
        return quantize(self, layer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(LayerQuantizer, "quantize", stop)
        assert refused("awq", recipe, "--quiet") == "stopped here"
    journal = json.loads((hub / "run" / "journal.json").read_text(encoding="utf-8"))
    assert list(journal["stages"]["awq"]["units"]) == ["layer-00000"]
    no_library(monkeypatch)
    succeed("awq", recipe, "--quiet")
    assert "awq is complete" in succeed("awq", recipe)


def test_other_inputs_are_noticed_in_spite_of_the_kept_tokens(finished_copy: Path) -> None:
    recipe = finished_copy / "recipe.yaml"
    assert "complete" in succeed("awq", recipe)
    template = finished_copy / "source" / "chat_template.jinja"
    before = template.read_text(encoding="utf-8")
    template.write_text("{{ 'Well:' }}" + before, encoding="utf-8")
    assert "awq.calibration" in refused("awq", recipe)
    template.write_text(before, encoding="utf-8")
    # A complete stage needs its samples no more; begun anew, it does.
    (finished_copy / "samples.jsonl").unlink()
    assert "complete" in succeed("awq", recipe)
    assert "there is no calibration file" in refused("awq", recipe, "--restart")


def test_a_dry_run_keeps_nothing(project: Path) -> None:
    succeed("run", project / "recipe.yaml", "--dry-run")
    tokens_of(project / "recipe.yaml", cache=True)
    assert not (project / "run").exists()


def test_a_refused_recipe_keeps_nothing(project: Path) -> None:
    (project / "samples.jsonl").write_text("words\n", encoding="utf-8")
    assert "samples.jsonl:1 is not JSON" in refused("calibration", project / "recipe.yaml")
    assert not (project / "run").exists()


def change_file(name: str) -> Callable[[Path], Any]:
    """Add a space to a file's end: the tokens may stay, the input is another one."""

    def change(project: Path) -> None:
        path = project / name
        path.write_bytes(path.read_bytes() + b" ")

    return change


def change_recipe(change: Callable[[Row], Any]) -> Callable[[Path], Any]:
    """Change the calibration section."""

    def apply(project: Path) -> None:
        content = yaml.safe_load((project / "recipe.yaml").read_text(encoding="utf-8"))
        change(content["awq"]["calibration"])
        (project / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")

    return apply


def change_hub(**values: Any) -> Callable[[Path], Any]:
    return change_recipe(lambda section: section["files"][1].update(values))


OTHERS: dict[str, Callable[[Path], Any]] = {
    "sequence_length": change_recipe(lambda section: section.update(sequence_length=WINDOW + 1)),
    "samples": change_recipe(lambda section: section["files"][0].update(samples=4)),
    "order": change_recipe(lambda section: section["files"].reverse()),
    "file": change_file("samples.jsonl"),
    "tokenizer": change_file("source/tokenizer.json"),
    "tokenizer config": lambda project: edit_json(
        project / "source" / "tokenizer_config.json", lambda config: config.update(padding_side="left")
    ),
    "chat template": change_file("source/chat_template.jinja"),
    "named template": lambda project: (
        (project / "source/additional_chat_templates").mkdir(),
        (project / "source/additional_chat_templates/tool_use.jinja").write_text("x", encoding="utf-8"),
    ),
    "hub samples": change_hub(samples=6),
    "split": change_hub(split="train[:50%]"),
    "column": change_hub(column="turns"),
    "filter": change_hub(filter={"kind": "code"}),
    "seed": change_hub(seed=1),
    "revision": change_hub(revision="main"),
    "folder": change_file("set/train.jsonl"),
}
SAME: dict[str, Callable[[Path], Any]] = {
    "readme": lambda project: (project / "source" / "README.md").write_text("words", encoding="utf-8"),
    "search": lambda project: write_recipe_field(project, "n_grid", 5),
}


def write_recipe_field(project: Path, key: str, value: Any) -> None:
    content = yaml.safe_load((project / "recipe.yaml").read_text(encoding="utf-8"))
    content["awq"][key] = value
    (project / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.mark.parametrize("name", [*OTHERS, *SAME])
def test_what_the_kept_tokens_depend_on(hub: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_sources(
        hub, {"path": "samples.jsonl", "samples": 3}, {"hub": "set", "column": "body", "samples": 5, "seed": 0}
    )
    assert described(recipe)["reused"] is False
    no_library(monkeypatch)
    assert described(recipe)["reused"] is True
    (OTHERS | SAME)[name](hub)
    if name in SAME:
        assert described(recipe)["reused"] is True
    else:
        assert "gone" in refused("calibration", recipe)
    assert len(kept(hub)) == 1


def flip(at: float) -> Callable[[bytes], bytes]:
    """Change one byte, a share of the length from the front."""

    def change(data: bytes) -> bytes:
        position = int(at * (len(data) - 1))
        return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]

    return change


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "garbage": lambda data: b"garbage",
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "no content": lambda data: (2).to_bytes(8, "little") + b"{}",
} | {f"byte at {at:.0%}": flip(at) for at in (0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1)}


def test_damaged_kept_tokens_are_made_anew(project: Path) -> None:
    recipe = project / "recipe.yaml"
    found = described(recipe)
    (path,) = kept(project)
    whole = path.read_bytes()
    for name, damage in DAMAGES.items():
        path.write_bytes(damage(whole))
        assert described(recipe) == found, name
        assert path.read_bytes() == whole
    path.write_bytes(flip(0.5)(whole))
    succeed("awq", recipe, "--quiet", "--set", "awq.source=fp8")
    assert path.read_bytes() == whole


def test_a_folder_in_the_place_of_kept_tokens_is_no_traceback(project: Path) -> None:
    described(project / "recipe.yaml")
    (path,) = kept(project)
    path.unlink()
    path.mkdir()
    assert str(path.name) in refused("calibration", project / "recipe.yaml")


def test_kept_tokens_of_other_inputs_are_not_taken(project: Path) -> None:
    """A file under a name that isn't its own, as a copying hand leaves it."""
    recipe = project / "recipe.yaml"
    described(recipe)
    (first,) = kept(project)
    other = described(recipe, "--set", "awq.calibration.sequence_length=20")
    second = Path(other["kept_in"])
    second.write_bytes(first.read_bytes())
    assert described(recipe, "--set", "awq.calibration.sequence_length=20") == other


def test_tokens_are_kept_whole_or_not_at_all(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = project / "recipe.yaml"
    (project / "run/state/calibration").mkdir(parents=True)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "the disk is full" in refused("calibration", recipe)
    assert kept(project) == []
    (project / "run/state/calibration/killed.safetensors.mmq-tmp").write_bytes(b"half")
    described(recipe)
    assert [path.suffix for path in kept(project)] == [".safetensors"]


def test_beside_a_run_the_command_describes_and_keeps_nothing(project: Path) -> None:
    with lock(project / "run"):
        found = described(project / "recipe.yaml")
        assert "another process is at work" in succeed("calibration", project / "recipe.yaml")
    assert found["total"]["samples"] == SAMPLES
    assert found["kept_in"] is None
    assert kept(project) == []
