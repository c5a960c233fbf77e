"""Compensated rounding through all stages, on the small trained model: better than nearest, checked, the same bytes."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import mmq.quantize.rounding
from cli.test_cli import cli, refused, succeed
from conftest import DEVICE_NAME, digests
from mmq.prove.findings import Report
from mmq.prove.judged import judged_layer
from mmq.prove.weights import SourceWeights, read_layer
from mmq.quantize.decoder_layer import DecoderLayer, embed, transformers_config
from mmq.quantize.layer import LayerContent
from mmq.quantize.rounding import Compensation, Fisher, Metric, Rounded, Smoothing, damping, held_back, judge
from mmq.quantize.routed_experts import ExpertBlock, Smoothed, Weights, top_up
from mmq.recipe import load
from mmq.source.calibration import load_tokens
from mmq.tensors.int4 import quantize_stack
from mmq.workdir.workspace import Workspace
from quantize.test_memory import Shape, make_block
from stages.test_resume import stopped
from storage.test_storage import edit_tensors

EXPERT = "model.layers.1.block_sparse_moe.experts.{}.{}.weight_packed"


def write_recipe(folder: Path, **awq: Any) -> Path:
    recipe = {
        "model": {"source": "source"},
        "work_dir": "run",
        "awq": {
            "source": "fp8",
            "calibration": {
                "files": [{"path": "source/calibration.jsonl", "samples": 48}], "sequence_length": 256,
            },
            "rounding": "compensated",
            "device": DEVICE_NAME,
        }
        | awq,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model after all stages with compensated rounding. Don't write."""
    folder = tmp_path_factory.mktemp("trained")
    succeed("synth", folder / "source", "--trained", "--quiet")
    succeed("run", write_recipe(folder), "--quiet")
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def test_samples_held_back_say_that_it_is_better(trained: Path) -> None:
    layers = json.loads((trained / "run/state/awq/layers.json").read_text(encoding="utf-8"))
    assert len(layers) == 3
    for layer in layers:
        losses = layer["losses"]
        assert layer["held_back"] and layer["loss_tokens"] == 6 * 256
        assert layer["rounding"] == "compensated"
        (best,) = (losses[way] for way in ("compensated", "smoothed_compensated") if way in losses)
        assert losses.keys() >= {"probe", "smoothed_probe"}
        assert best < 0.8 * min(losses["nearest"], losses["smoothed_nearest"])
        # What the gradient says that errors cost is what rounding aims at, more than at their squares.
        costs = layer["costs"]
        (best,) = (costs[way] for way in ("compensated", "smoothed_compensated") if way in costs)
        assert best < 0.5 * min(costs["nearest"], costs["smoothed_nearest"])
        assert layer["loss_chosen"] < 0.8 * layer["loss_round_to_nearest"]


def test_the_output_is_nearer_to_the_source(trained: Path) -> None:
    """KL on text that was not calibrated on, of the hybrid and of rounding to nearest."""
    data = trained / "source/heldout.jsonl"
    options = "--data", data, "--samples", 24, "--sequence-length", 256, "--quiet"
    succeed("eval", trained / "recipe.yaml", *options)
    found = json.loads((trained / "run/eval.json").read_text(encoding="utf-8"))
    kl = {variant["variant"]: variant["kl"] for variant in found["variants"]}
    assert 0 < kl["hybrid"] < 0.8 * kl["round-to-nearest"]
    perplexity = {variant["variant"]: variant["perplexity"] for variant in found["variants"]}
    assert 10 < perplexity["source"] < 30


def test_killed_and_resumed_it_gives_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "source", tmp_path / "source")
    recipe = write_recipe(tmp_path)
    assert stopped(tmp_path, "awq", "replace", 9)[0] == -signal.SIGKILL
    succeed("run", recipe, "--quiet")
    found, expected = digests(tmp_path / "run/hybrid"), digests(trained / "run/hybrid")
    # The card tells how long it took.
    assert found.pop("README.md") and expected.pop("README.md")
    assert found == expected


def test_another_rounding_would_mix_two_runs(copy: Path) -> None:
    message = refused("awq", copy / "recipe.yaml", "--set", "awq.rounding=nearest")
    assert 'awq.rounding = "compensated", now it is "nearest"' in message


@pytest.mark.parametrize("linear", ["w1", "w2", "w3"])
def test_verify_finds_an_expert_that_is_anothers(copy: Path, linear: str) -> None:
    assert cli("verify", copy / "recipe.yaml", "--quiet").exit_code == 0
    one, other = (EXPERT.format(expert, linear) for expert in (3, 5))

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        if one in tensors:
            tensors[one], tensors[other] = tensors[other], tensors[one]

    edit_tensors(copy / "run/hybrid", swap)
    result = cli("verify", copy / "recipe.yaml", "--quiet")
    assert result.exit_code == 1
    for expert in (3, 5):
        assert f"experts.{expert}." in result.stderr
    assert "as the nearest ones" in result.stderr
    assert "codes or scales are not those that were judged" in result.stderr
    assert "loss_chosen on the tokens kept as evidence" in result.stderr


def test_verify_finds_a_single_code(copy: Path) -> None:
    name = EXPERT.format(7, "w2")

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors:
            tensors[name] = tensors[name].clone()
            tensors[name][11, 5] ^= 1 << 9

    edit_tensors(copy / "run/hybrid", flip)
    result = cli("verify", copy / "recipe.yaml", "--quiet")
    assert result.exit_code == 1
    (line,) = (line for line in result.stderr.splitlines() if "  - " in line)
    assert "experts.7: codes or scales are not those that were judged" in line


@pytest.mark.parametrize("kind", ["record", "evidence"])
def test_verify_wants_what_judged(copy: Path, kind: str) -> None:
    """Tokens or statistics that the stage did not write prove nothing."""
    state = copy / "run/state/awq"
    path = next(path for path in sorted(state.glob("*0001*")) if (path.suffix == ".json") == (kind == "record"))
    path.write_bytes(path.read_bytes().replace(b"e", b"f", 1) if kind == "record" else path.read_bytes()[:-1] + b"!")
    result = cli("verify", copy / "recipe.yaml", "--quiet")
    assert result.exit_code == 1 and path.name in result.stderr
    path.unlink()
    assert f"{path} is gone" in cli("verify", copy / "recipe.yaml", "--quiet").stderr


def test_verify_does_not_believe_the_statistics(trained: Path) -> None:
    """The losses that numpy finds from source, result and tokens, against those of the statistics; and a false one."""
    recipe = load(trained / "recipe.yaml")
    for layer in range(3):
        judged = judged_layer(Workspace.of(recipe), layer)
        assert judged is not None and judged.compensated and len(judged.x) == 256
        report = Report(trained, trained)
        judged.outputs = {kind: np.zeros(judged.x.shape) for kind in ("source", "stored", "nearest")}
        judged.outputs["source"] += 1
        judged.check(report, layer)
        assert len(report.problems) == 2


def test_every_eighth_sample_is_held_back() -> None:
    marks = held_back([3, 2] * 10)
    assert marks.sum() == 2 + 2 and marks[3 * 4 + 2 * 3 :][:2].all()
    # Of one sample the last eighth, of one token none.
    assert held_back([16]).tolist() == [False] * 14 + [True] * 2
    assert held_back([1]).tolist() == [False]


@pytest.mark.parametrize("tokens", [700, 6000], ids=["few rows", "many rows"])
def test_what_judges_is_what_errors_cost_at_their_tokens(tokens: int) -> None:
    """Of the samples held back: e^T G e of each token's error, and where an expert has 8 rows for each channel, times
    the gradient's norm; squares count alike."""
    block, gradients = make_block(Shape(5, 256, 128, tokens, 2, 0), 2**24), torch.randn(tokens, 256)
    gradients *= torch.randn(tokens, 1).exp()
    fisher = Fisher(gradients.T @ gradients / tokens, gradients.norm(dim=1))
    ones = Smoothing(torch.ones(256), torch.ones(5, 128))
    reference, lengths = block.outputs(Weights(block)), [tokens // 10] * 10
    verdict = judge(block, reference, lengths, tokens, ones, fisher=fisher)
    nearest = block.in_order(block.outputs(Smoothed(block, ones.norm, ones.inner)))
    held = held_back(lengths)
    error = (nearest - block.in_order(reference))[held].double()
    matrix = fisher.matrix.double() / fisher.matrix.diagonal().mean() + 0.1 * torch.eye(256)
    counts = (fisher.norms / fisher.norms.mean())[held] if tokens == 6000 else 1.0
    wanted = float((((error @ matrix) * error).sum(1) * counts).mean() / 256)
    assert verdict.statistics["costs"]["nearest"] == pytest.approx(wanted, rel=1e-3)
    assert verdict.statistics["losses"]["nearest"] == pytest.approx(float(error.square().mean()), rel=1e-3)


def to_nearest(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Each weight of [out, in] by itself, under given group scales."""
    steps = scale.float().repeat_interleave(128, 1)
    return (weight / steps).round().clamp(-8, 7) * steps


@pytest.mark.parametrize("rare", [0.6, 0.99], ids=["few rows", "no rows"])
def test_a_rare_experts_gate_and_up_are_fitted_to_all_tokens(rare: float) -> None:
    """An expert that the router hardly ever picks, or never: on the layer's other tokens its inner activations are
    nearer than rounded to nearest. With no rows, and none that top up, its down layer is rounded to nearest."""
    block = make_block(Shape(6, 256, 256, 2000, 2, 0), 2**28, rare)
    rows = int(block.counts[0])
    assert rows < 60 if rare < 0.9 else rows == 0
    plain = Smoothing(torch.ones(256), torch.ones(6, 256))
    # Channels that differ and go together, as real ones do.
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(256, 256, generator=generator) / 16 + torch.eye(256)
    block.x.copy_((block.x.float() @ mix * torch.rand(256, generator=generator)).bfloat16())
    found = Rounded(block, plain)
    Compensation(block, torch.arange(0, 2000, 2), 1000).fit([found], torch.ones(6, dtype=torch.bool))
    x, weight = block.x[1::2].float(), block.gate_up[:1].float()
    others = {
        "compensated": found.stored(0, 0, 1),
        "nearest": quantize_stack(weight.clone(), 128).dequantize(torch.float32),
    }
    error = {name: float((x @ (other - weight)[0].T).square().mean()) for name, other in others.items()}
    assert error["compensated"] < 0.6 * error["nearest"]
    if not rows:
        assert torch.equal(found.stored(1, 0, 1)[0], to_nearest(block.down[0].float(), found.scale[1][0]))


def first_layer(trained: Path) -> tuple[LayerContent, Any, list[torch.Tensor]]:
    """The trained model's first layer, its activation, and what its experts read of the calibration: inputs, router's
    scores, weights and choices."""
    workspace, cpu = Workspace.of(load(trained / "recipe.yaml")), torch.device("cpu")
    source, arch = workspace.source, workspace.architecture
    tokens = load_tokens(workspace.recipe, source.checkpoint.folder)
    content = read_layer(SourceWeights(source), arch, 0, cpu)
    decoder = DecoderLayer(arch, transformers_config(arch, source.config), 0, content.rest, cpu)
    with source.checkpoint.reader() as reader:
        hidden = embed(reader[arch.embedding], tokens.ids)
    x = decoder.block_input(decoder.attend(hidden, tokens.lengths))
    return content, decoder.activation, [x, *decoder.route(x)]


def test_weights_tell_what_an_expert_without_rows_will_see(trained: Path) -> None:
    """Down layers of trained experts whose rows are kept from them but for a few that top up: on those rows they are
    nearer than rounded to nearest under the same scales."""
    content, activation, (x, logits, weight, index) = first_layer(trained)
    compensated = nearest = 0.0
    for expert in range(4):
        own = (index == expert).any(1)
        given = (part[~own] for part in (x, index, weight))
        extra = top_up(logits[~own], index[~own], 128)
        block = ExpertBlock(*given, content.gate_up, content.down, activation, 128, extra)
        assert not block.counts[expert] and own.sum() > 256
        found = Rounded(block, Smoothing(torch.ones(256), torch.ones(16, 128)))
        which = torch.arange(16) == expert
        Compensation(block, torch.arange(len(block.x)), 1000).fit([found], which)
        gate, up = (x[own].float() @ content.gate_up[expert].float().T).chunk(2, dim=1)
        inner, down = torch.nn.functional.silu(gate) * up, content.down[expert].float()
        plain = to_nearest(down, found.scale[1][expert])
        compensated += float((inner @ (found.stored(1, expert, expert + 1)[0] - down).T).square().sum())
        nearest += float((inner @ (plain - down).T).square().sum())
    assert compensated < 0.92 * nearest


def test_down_makes_up_for_gate_and_up(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other tokens a block of trained experts is nearer for rows of gate and up that make up for each other through
    down, and nearer again for a down layer that is fitted to what they leave."""
    content, activation, (x, _, weight, index) = first_layer(trained)
    block = ExpertBlock(x, index, weight, content.gate_up, content.down, activation, 128, None)
    plain, other = Smoothing(torch.ones(256), torch.ones(16, 128)), torch.arange(1, len(x), 2)
    wanted = block.in_order(block.outputs(Weights(block)))

    def loss() -> float:
        found = Rounded(block, plain)
        Compensation(block, torch.arange(0, len(x), 2), 1000).fit([found], torch.ones(16, dtype=torch.bool))
        return float((block.in_order(block.outputs(found)) - wanted)[other].square().mean())

    both = loss()
    monkeypatch.setattr(mmq.quantize.rounding, "corrected", lambda weight, crossed, factor: weight)
    rows = loss()

    def apart(slopes: torch.Tensor, down: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
        return torch.eye(slopes.shape[1]).expand_as(slopes)

    monkeypatch.setattr(mmq.quantize.rounding, "through_down", apart)
    assert both < 0.98 * rows < 0.98 * 0.99 * loss()


def test_narrow_text_is_not_believed() -> None:
    """Rows of twenty different tokens, however many there are: on other rows, codes fitted to them alone do harm."""
    assert damping(3072, 20000) == damping(256, 640) == 0.1
    assert damping(256, 32) == 2.0
    block = make_block(Shape(2, 256, 128, 2000, 2, 0), 2**28)
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(20, 256, generator=generator)
    noise = torch.randn(2000, 256, generator=generator) * 0.05
    block.x.copy_((kinds[torch.randint(0, 20, (2000,), generator=generator)] + noise).bfloat16())
    other, weight = torch.randn(500, 256, generator=generator), block.gate_up.float()
    plain, losses = Smoothing(torch.ones(256), torch.ones(2, 128)), []
    for distinct in (2000, 20):
        found = Rounded(block, plain)
        Compensation(block, torch.arange(2000), distinct).fit([found], torch.ones(2, dtype=torch.bool))
        losses.append(float((other @ (found.stored(0, 0, 2) - weight).mT).square().mean()))
    nearest = quantize_stack(weight.clone(), 128).dequantize(torch.float32)
    losses.append(float((other @ (nearest - weight).mT).square().mean()))
    assert losses[1] < 0.8 * losses[0] and losses[1] < 1.05 * losses[2]


@pytest.mark.parametrize("weighed", [False, True], ids=["alike", "weighed"])
def test_moments_are_those_of_each_experts_rows(weighed: bool) -> None:
    """Of the fitted tokens alone, against a plain loop in fp64; down's inputs as rounded gate and up give them, their
    mean squares with the rows that top up. Where there are enough rows a token counts by its gradient's norm, one
    without a gradient as in the mean."""
    block = make_block(Shape(5, 256, 128, 700, 2, 400), 2**22)
    fitted, metric, each = torch.arange(0, 700, 3), None, torch.ones(700, dtype=torch.float64)
    outputs = torch.eye(256, dtype=torch.float64)
    if weighed:
        gradients = torch.randn(700, 256) * torch.randn(700, 1).exp()
        norms = gradients.norm(dim=1)
        norms[::7] = torch.nan
        metric = Metric.of(Fisher(gradients.T @ gradients, norms), 700, 8)
        outputs = metric.matrix.double()
        each = (norms.double() / norms.nanmean()).nan_to_num(1.0)
        assert float(each.min()) < 0.2 and float(each.max()) > 4
    fit = Compensation(block, fitted, 700, metric)
    rounded = (block.gate_up * (1 + 0.2 * torch.randn(block.gate_up.shape))).bfloat16()
    (inputs, counts), (middles, crossed, again, squares) = fit._inputs(0, 5), fit._middles(rounded.float(), 0, 5)
    costs = fit._costs(0, 5)
    assert torch.equal(counts, again)
    assert block.extra is not None
    starts = [0, *block.extra.ends]
    for expert in range(5):
        own = fitted[(block.index[fitted] == expert).any(1)]
        assert counts[expert] == len(own)
        x, count = block.x[own].double(), each[own].unsqueeze(1)
        wanted = x.T @ (count * x)
        near = 3e-3 * float(wanted.abs().max()) if weighed else 1e-3
        assert torch.allclose(inputs[expert].double(), wanted, rtol=1e-4, atol=near)
        top = block.extra.token[starts[expert] : starts[expert + 1]]

        def both(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            gate, up = (rows @ weight.double().T).chunk(2, 1)
            return torch.nn.functional.silu(gate) * up

        source, inner = both(x, block.gate_up[expert]), both(x, rounded[expert])
        scale = float((inner.T @ inner).abs().max())
        for found, wanted in ((middles, inner.T @ (count * inner)), (crossed, (source - inner).T @ (count * inner))):
            assert torch.allclose(found[expert].double(), wanted, rtol=0.02, atol=0.02 * scale)
        every = torch.cat([inner, both(block.x[top].double(), rounded[expert])])
        mean = (torch.cat([count, each[top].unsqueeze(1)]) * every.square()).sum(0) / max(1, len(every))
        assert torch.allclose(squares[expert].double(), mean, rtol=0.05, atol=0.02 * float(mean.max()))
        # Small errors of gate's and up's outputs, and what they do to the expert's, row by row; their products with
        # each other are drawn towards none.
        gate, up = (x @ block.gate_up[expert].double().T).chunk(2, 1)
        slope = torch.cat([torch.func.vmap(torch.func.vmap(torch.func.grad(torch.nn.functional.silu)))(gate) * up,
                           torch.nn.functional.silu(gate)], 1)  # fmt: skip
        down = block.down[expert].double()
        through = slope.unsqueeze(1) * torch.cat([down, down], 1)
        wanted = torch.einsum("r,rhi,hk,rkj->ij", count[:, 0], through, outputs, through) / (len(own) + 2 * 128)
        wanted.diagonal().mul_((len(own) + 2 * 128) / max(1, len(own)))
        assert torch.allclose(costs[expert].double(), wanted, rtol=0.03, atol=0.03 * float(wanted.abs().max()))
    everyone = block.x[fitted].double()
    wanted = everyone.T @ (each[fitted].unsqueeze(1) * everyone) / len(fitted)
    assert torch.allclose(fit.pooled.double(), wanted, rtol=1e-4, atol=3e-3 if weighed else 1e-5)
