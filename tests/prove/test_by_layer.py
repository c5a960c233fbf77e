"""`mmq eval --by-layer`: each layer's KL against checkpoints mixed by hand, and that it goes on where stopped."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import mmq.prove.by_layer
from cli.test_cli import refused, succeed
from conftest import DEVICE, SAMPLES, cpu_only, edit_json, write_recipe
from mmq.families.registry import ARCHITECTURES
from mmq.families.table import Architecture
from mmq.prove.by_layer import work_of
from mmq.prove.evaluate import HYBRID_MODEL, evaluate_checkpoint
from mmq.prove.streamed import EvalSettings, eval_recipe
from mmq.recipe import load
from mmq.source.calibration import load_tokens
from mmq.source.synth import Sizes, write_checkpoint, write_samples
from mmq.stages.pipeline import run_stages
from mmq.storage.atomic import FileRecord
from mmq.workdir.workspace import Workspace
from prove.stops import raising
from reference import Weights, dequantized, divergence, read_folder
from stages.test_resume import stopped

FEW = ("--samples", 8, "--sequence-length", 64, "--quiet")
SETTINGS = EvalSettings(samples=8, sequence_length=64)
# All experts are chosen: no rounding on the way moves a token to another one.
SIZES = Sizes(layers=3, top_k=8)
Report = dict[str, Any]


def made(folder: Path, family: Architecture, sizes: Sizes, **awq: Any) -> Path:
    """A finished project."""
    write_checkpoint(folder / "source", sizes, shards=3, shuffle=True, family=family)
    write_samples(folder / "samples.jsonl", SAMPLES)
    path = write_recipe(folder, source="fp8", **awq)
    run_stages(Workspace.of(load(path)), ["awq", "restore"])
    return folder


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, rounded with compensation, evaluated with and without `--by-layer`. Don't write."""
    folder = made(tmp_path_factory.mktemp("evaluated"), ARCHITECTURES["minimax_m2"], SIZES, rounding="compensated")
    succeed("eval", folder / "recipe.yaml", *FEW, "--by-layer")
    return folder


@pytest.fixture
def copy(evaluated: Path, tmp_path: Path) -> Path:
    """A copy of the project that was evaluated without `--by-layer`, to do anything with."""
    folder = tmp_path / "copy"
    shutil.copytree(evaluated, folder)
    (folder / "run/by_layer.json").unlink()
    shutil.rmtree(folder / "run/state/eval-by-layer")
    edit_json(folder / "run/journal.json", lambda journal: journal["stages"].pop("eval --by-layer"))
    return folder


def report_of(project: Path, name: str = "by_layer.json") -> Report:
    content: Report = json.loads((project / "run" / name).read_text(encoding="utf-8"))
    return content


def transformers_logits(folder: Path, config: Report, weights: Weights, samples: list[torch.Tensor]) -> list[Any]:
    """[T, vocabulary] of each sample, by transformers' class in fp32, from a checkpoint written for it."""
    folder.mkdir()
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(plain | {"dtype": "float32"}), encoding="utf-8")
    tensors = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(ids[None]).logits[0] for ids in samples]


def test_layers_are_those_of_checkpoints_mixed_by_hand(evaluated: Path, tmp_path: Path) -> None:
    """The source with one layer's tensors from the result, dequantized, through transformers' own class. The streamed
    model computes in bf16."""
    config, tensors = read_folder(evaluated / "source")
    source, hybrid = dequantized(tensors), dequantized(read_folder(evaluated / "run/hybrid")[1])
    tokens = load_tokens(eval_recipe(load(evaluated / "recipe.yaml"), SETTINGS), evaluated / "source")
    samples = list(tokens.ids.split(tokens.lengths))
    truth = transformers_logits(tmp_path / "source", config, source, samples)
    report, count = report_of(evaluated), sum(len(ids) - 1 for ids in samples)
    assert [entry["layer"] for entry in report["layers"]] == [0, 1, 2]
    for entry in report["layers"]:
        prefix = f"model.layers.{entry['layer']}."
        mixed = {name: (hybrid if name.startswith(prefix) else source)[name] for name in source}
        found = transformers_logits(tmp_path / prefix, config, mixed, samples)
        kl = [divergence(*(part[:-1] for part in pair)) * (len(pair[0]) - 1) for pair in zip(truth, found, strict=True)]
        mean = sum(kl) / count
        assert entry["kl"] == pytest.approx(mean, rel=0.15)
    # The first layer's own error is that of the result after it, which has the same inputs there.
    first = report_of(evaluated, "eval.json")["layers"][0]["relative_error"]
    assert report["layers"][0]["relative_error"] == first[HYBRID_MODEL.name]


def test_a_single_layer_is_the_whole_result(tmp_path: Path) -> None:
    """One layer with experts after a dense one, and a shared expert: its KL is the result's, to the bit. Dense layers
    are none of the layers."""
    folder = made(tmp_path, ARCHITECTURES["glm4_moe"], Sizes(layers=2))
    whole = evaluate_checkpoint(Workspace.of(load(folder / "recipe.yaml")), SETTINGS, layers=True)
    (entry,) = whole["by_layer"]["layers"]
    (result,) = (variant for variant in whole["variants"] if variant["variant"] == HYBRID_MODEL.name)
    assert entry["layer"] == 1 and entry["kl"] > 0
    assert {key: result[key] for key in result if key not in ("variant", "kinds")} == {
        key: entry[key] for key in entry if key not in ("layer", "relative_error")
    }
    assert entry["relative_error"] == whole["layers"][1]["relative_error"][HYBRID_MODEL.name]
    assert json.loads((folder / "run/by_layer.json").read_text()) == whole["by_layer"]


@pytest.mark.parametrize(
    ("function", "call"),
    [("read_layer", 2), ("read_layer", 4), ("run_layer", 4), ("run_layer", 8), ("relative_error", 2), ("measure", 1)],
)
def test_a_stopped_run_goes_on_to_the_same_result(evaluated: Path, copy: Path, function: str, call: int) -> None:
    with raising(mmq.prove.by_layer, function, call):
        evaluate_checkpoint(Workspace.of(load(copy / "recipe.yaml")), SETTINGS, layers=True)
    assert not (copy / "run/by_layer.json").exists()
    succeed("eval", copy / "recipe.yaml", *FEW, "--by-layer")
    assert report_of(copy)["layers"] == report_of(evaluated)["layers"]
    assert_clean(copy)


@pytest.mark.parametrize("rename", [2, 5, 7])
def test_a_killed_run_goes_on_to_the_same_result(evaluated: Path, copy: Path, rename: int) -> None:
    code, _ = stopped(copy, "eval", "replace", rename, options=[*map(str, FEW), "--by-layer"])
    assert code == -signal.SIGKILL, "the moment never came"
    succeed("eval", copy / "recipe.yaml", *FEW, "--by-layer")
    assert report_of(copy)["layers"] == report_of(evaluated)["layers"]
    assert_clean(copy)


def assert_clean(project: Path) -> None:
    assert not list((project / "run").rglob("*.mmq-tmp"))
    assert not list((project / "run").rglob("hidden-*"))
    assert json.loads((project / "run/journal.json").read_text())["stages"]["eval --by-layer"]["complete"]


def test_other_samples_are_refused_by_name(evaluated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(evaluated, folder)
    recipe = folder / "recipe.yaml"
    succeed("eval", recipe, "--samples", 2, "--quiet", "--restart")
    message = refused("eval", recipe, "--samples", 2, "--by-layer")
    assert "eval --by-layer was begun with data (its tokens)" in message
    assert message.endswith("run `mmq eval --by-layer --restart` to begin eval --by-layer anew")
    assert report_of(folder)["layers"] == report_of(evaluated)["layers"]
    succeed("eval", recipe, "--samples", 2, "--by-layer", "--restart", "--quiet")
    assert report_of(folder)["tokens"]["samples"] == 2


def test_the_disk_is_looked_at_before_either(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the evaluation but not for the streams of all layers: nothing is forgotten. And what is asked for is
    what is kept at the most."""
    asked: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr("mmq.prove.streamed.check_disk", lambda _, needed: asked.append(needed))
        original, kept = mmq.prove.by_layer.ByLayer.finish_layer, []

        def measured(self: Any, layer: int, hidden: FileRecord, record: Report) -> None:
            kept.append(sum(path.stat().st_size for path in self.files.folder.glob("hidden-*")))
            original(self, layer, hidden, record)

        patch.setattr(mmq.prove.by_layer.ByLayer, "finish_layer", measured)
        succeed("eval", copy / "recipe.yaml", *FEW, "--by-layer", "--restart")
    assert asked[1] == 2 * 4 * report_of(copy)["tokens"]["read"] * SIZES.hidden * 2
    assert 0.8 * asked[1] < max(kept) < asked[1]
    before = report_of(copy), report_of(copy, "eval.json")
    monkeypatch.setattr(
        "mmq.stages.base.free_disk", lambda folder: 10 if folder.name == "eval-by-layer" else 2 * asked[0]
    )
    message = refused("eval", copy / "recipe.yaml", *FEW, "--by-layer", "--restart")
    assert f"{copy / 'run/state/eval-by-layer'} needs" in message and "10 B free" in message
    assert (report_of(copy), report_of(copy, "eval.json")) == before


def test_the_work_is_the_forwards(evaluated: Path) -> None:
    """1 + 2 + 3 streams of single layers and the source's three times; each meets the head."""
    source = Workspace.of(load(evaluated / "recipe.yaml")).source
    assert work_of(source) == {"layer-00000": 2, "layer-00001": 3, "layer-00002": 4, "head": 4}
    stages = json.loads(succeed("status", evaluated / "recipe.yaml", "--json"))["stages"]
    assert [stage["stage"] for stage in stages][-2:] == ["eval", "eval --by-layer"]
    assert stages[-1]["state"] == "complete" and stages[-1]["percent"] == 100


@cpu_only
def test_two_ranks_find_the_same(evaluated: Path, copy: Path) -> None:
    """Both evaluations, the column between nearest and compensated rounding among them."""
    assert DEVICE.type == "cpu"
    command = [sys.executable, "-m", "mmq", "eval", copy / "recipe.yaml", *FEW, "--by-layer", "--restart"]
    subprocess.run([*map(str, command), "--devices", "2"], check=True, timeout=300)
    for name in ("by_layer.json", "eval.json"):
        one, other = report_of(evaluated, name), report_of(copy, name)
        for key in ("variants", "samples", "layers", "tokens"):
            assert one.get(key) == other.get(key)
    assert_clean(copy)
