"""What smoothing brings and what compensated rounding brings, by eval's column between the two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cli.test_cli import refused, succeed
from conftest import SAMPLES, TINY, write_recipe
from mmq.families.registry import ARCHITECTURES
from mmq.prove.evaluate import (
    HYBRID_MODEL,
    NEAREST,
    SMOOTHED_NEAREST,
    SOURCE,
    brought,
)
from mmq.prove.streamed import EvalSettings, eval_recipe
from mmq.recipe import load
from mmq.source.calibration import load_tokens
from mmq.source.synth import write_checkpoint, write_samples
from mmq.stages.pipeline import run_stages
from mmq.workdir.workspace import Workspace
from reference import Weights, dequantized, divergence, logits, read_folder, round_to_nearest

FEW = ("--samples", 10, "--sequence-length", 64, "--quiet")
Report = dict[str, Any]


def made(folder: Path, family: str) -> Path:
    """A project whose source was quantized twice, by the same search: into `nearest` and into `compensated`."""
    write_checkpoint(folder / "source", TINY, shards=3, shuffle=True, family=ARCHITECTURES[family])
    write_samples(folder / "samples.jsonl", SAMPLES)
    for rounding in ("nearest", "compensated"):
        # Every layer is calibrated on the source's states, so that what rounded before it changes no search, and
        # whether to smooth is judged by squares in both runs.
        path = write_recipe(folder, rounding=rounding, source="fp8", propagate_quantized=False, fisher_tokens=0)
        path = path.rename(folder / f"{rounding}.yaml")
        path.write_text(path.read_text().replace("work_dir: run", f"work_dir: {rounding}"))
        run_stages(Workspace.of(load(path)), ["awq", "restore"])
        succeed("eval", path, *FEW)
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniMax-M2's. Don't write."""
    return made(tmp_path_factory.mktemp("both"), "minimax_m2")


def variants(folder: Path, rounding: str) -> dict[str, Report]:
    report = json.loads((folder / rounding / "eval.json").read_text(encoding="utf-8"))
    return {entry.pop("variant"): entry for entry in report["variants"]}


@pytest.mark.parametrize("family", ["minimax_m2", "glm4_moe", "qwen3_next"])
def test_the_column_is_the_result_of_rounding_to_nearest(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Where both runs found the same scales, the one's column is the other's result, bit for bit. Norms with an offset
    and shared experts among them."""
    folder = request.getfixturevalue("both") if family == "minimax_m2" else made(tmp_path, family)
    for rounding in ("nearest", "compensated"):
        layers = json.loads((folder / rounding / "state/awq/layers.json").read_text(encoding="utf-8"))
        assert not any(layer.get("identity_kept", False) for layer in layers)
    one, other = variants(folder, "nearest"), variants(folder, "compensated")
    assert other[SMOOTHED_NEAREST.name] == one[HYBRID_MODEL.name]
    assert other[NEAREST.name] == one[NEAREST.name]
    assert other[HYBRID_MODEL.name]["kl"] < other[SMOOTHED_NEAREST.name]["kl"] < other[NEAREST.name]["kl"]
    assert SMOOTHED_NEAREST.name not in one


def test_the_column_is_that_of_the_plain_fp32_model(both: Path) -> None:
    """By the formula: the source's weights times what the result's norm lost, divided by the inner scales, rounded."""
    config, tensors = read_folder(both / "source")
    source, hybrid = dequantized(tensors), dequantized(read_folder(both / "compensated/hybrid")[1])
    mine: Weights = dict(hybrid)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        norm = f"{prefix}post_attention_layernorm.weight"
        applied = source[norm] / hybrid[norm]
        inner = load_file(both / f"compensated/state/awq/evidence-{layer:05d}.safetensors")["inner"].float()
        for expert in range(config["num_local_experts"]):
            gate, up, down = (
                f"{prefix}block_sparse_moe.experts.{expert}.{linear}.weight" for linear in ("w1", "w3", "w2")
            )
            bf16 = {name: source[name].bfloat16().float() for name in (gate, up, down)}
            mine[gate] = round_to_nearest(bf16[gate] * applied)
            mine[up] = round_to_nearest(bf16[up] * applied / inner[expert][:, None])
            mine[down] = round_to_nearest(bf16[down] * inner[expert])
    recipe = load(both / "compensated.yaml")
    tokens = load_tokens(eval_recipe(recipe, EvalSettings(samples=10, sequence_length=64)), both / "source")
    kl = count = 0.0
    for ids in tokens.ids.split(tokens.lengths):
        kl += divergence(*(logits(ids, weights, config)[:-1] for weights in (source, mine))) * (len(ids) - 1)
        count += len(ids) - 1
    assert variants(both, "compensated")[SMOOTHED_NEAREST.name]["kl"] == pytest.approx(kl / count, rel=0.1)


def test_what_each_part_brings_is_said(both: Path) -> None:
    kl = {key: {name: entry["kl"] for name, entry in variants(both, key).items()} for key in ("nearest", "compensated")}
    start, smoothed = kl["nearest"][NEAREST.name], kl["nearest"][HYBRID_MODEL.name]
    sentence = f"KL {start:.5f} of the source rounded to nearest, {smoothed:.5f} after smoothing"
    assert f"{sentence}, which is all that the result has" in succeed("eval", both / "nearest.yaml", *FEW[:-1])
    compensated = f"{sentence}, {kl['compensated'][HYBRID_MODEL.name]:.5f} with compensated rounding too"
    assert compensated in succeed("eval", both / "compensated.yaml", *FEW[:-1])
    report = json.loads((both / "nearest/eval.json").read_text(encoding="utf-8"))
    del report["settings"]["rounding"]
    assert brought(report) is None


def test_report_and_card_say_it(both: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(both, folder)
    for rounding in ("nearest", "compensated"):
        succeed("report", folder / f"{rounding}.yaml")
        report = json.loads((folder / rounding / "eval.json").read_text(encoding="utf-8"))
        sentence = brought(report)
        assert sentence is not None
        for path in ("report/report.html", "hybrid/README.md"):
            text = (folder / rounding / path).read_text(encoding="utf-8")
            assert sentence in text
            assert (SMOOTHED_NEAREST.name in text) == (rounding == "compensated")


def test_without_the_scales_it_is_refused_before_a_layer(both: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(both, folder)
    gone = folder / "compensated/state/awq/evidence-00001.safetensors"
    kept = gone.read_bytes()
    gone.unlink()
    # A complete evaluation needs them no more.
    succeed("eval", folder / "compensated.yaml", *FEW)
    message = refused("eval", folder / "compensated.yaml", *FEW, "--restart")
    assert message == f"{gone} is gone, without which nothing can be said of layer 1's rounding"
    # Nor is it forgotten for one that can't be made.
    assert variants(folder, "compensated") == variants(both, "compensated")
    gone.write_bytes(kept)
    succeed("eval", folder / "compensated.yaml", *FEW, "--restart")
    assert variants(folder, "compensated") == variants(both, "compensated")


def test_states_of_an_earlier_mmq_are_refused(both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-done evaluation whose hidden states lack the column."""
    folder = tmp_path / "copy"
    shutil.copytree(both, folder)
    recipe = folder / "compensated.yaml"
    with monkeypatch.context() as patch:
        patch.setattr("mmq.prove.evaluate.measure", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            succeed("eval", recipe, *FEW, "--restart")
    (path,) = (folder / "compensated/state/eval").glob("hidden-*")
    states = load_file(path)
    size = path.stat().st_size
    states[SOURCE.name + " of old"] = states.pop(SMOOTHED_NEAREST.name)
    save_file(states, path)
    journal = folder / "compensated/journal.json"
    journal.write_text(journal.read_text().replace(str(size), str(path.stat().st_size)))
    message = refused("eval", recipe, *FEW)
    assert "has no hidden states of round-to-nearest, same smoothing: another version of mmq began this" in message
    succeed("eval", recipe, *FEW, "--restart")
    assert variants(folder, "compensated") == variants(both, "compensated")
