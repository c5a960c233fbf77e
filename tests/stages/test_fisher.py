"""What errors of a block's output cost: against autograd through a plain model, killed on the way, other settings."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mmq.stages.awq
import mmq.stages.awq_fisher
from cli.test_cli import refused, succeed
from conftest import SAMPLES, digests, edit_json, write_recipe
from mmq.prove.verify import verify_checkpoint
from mmq.quantize.fisher import fisher, following, spread_samples
from mmq.quantize.rounding import Fisher
from mmq.recipe import load
from mmq.source.synth import Sizes, write_checkpoint, write_samples
from mmq.stages.awq_checks import calibration_tokens
from mmq.stages.pipeline import run_stages
from mmq.storage.shards import save_tensors
from mmq.tensors.experts_gradient import ERRING
from mmq.workdir.layer_files import LayerFiles
from mmq.workdir.workspace import Workspace
from reference import dequantized, hidden_states, read_folder, rms_norm
from stages.test_resume import stopped

TOKENS = 400


@pytest.fixture(scope="module")
def weighed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after its stages, and in `fisher` the matrices as they were on the way, and the gradients."""
    folder = tmp_path_factory.mktemp("weighed")
    write_checkpoint(folder / "source", Sizes(layers=3), shards=3, shuffle=True)
    write_samples(folder / "samples.jsonl", SAMPLES)
    recipe = write_recipe(folder, source="fp8", rounding="compensated", fisher_tokens=TOKENS, n_grid=4)
    remove = mmq.stages.awq.remove_fisher

    def keep(files: LayerFiles, *arguments: object) -> None:
        shutil.copytree(files.folder, folder / "fisher")
        torch.save(gradients, folder / "fisher/gradients.pt")
        remove(files, *arguments)  # type: ignore[arg-type]

    gradients: list[torch.Tensor] = []

    def note(gradient: torch.Tensor) -> Fisher:
        gradients.insert(0, gradient.float())
        return fisher(gradient)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmq.stages.awq, "remove_fisher", keep)
        patch.setattr(mmq.stages.awq_fisher, "fisher", note)
        run_stages(Workspace.of(load(recipe)), ["awq", "restore"])
    return folder


@pytest.fixture
def again(weighed: Path, tmp_path: Path) -> Path:
    """The same project before its stages."""
    return shutil.copytree(weighed, tmp_path / "again", ignore=shutil.ignore_patterns("run", "fisher"))


def test_the_matrices_are_those_of_a_plain_models_gradients(weighed: Path) -> None:
    config, stored = read_folder(weighed / "source")
    weights, tokens = dequantized(stored), calibration_tokens(Workspace.of(load(weighed / "recipe.yaml")))
    chosen = spread_samples(tokens.lengths, TOKENS)
    assert len(chosen) < SAMPLES
    found: list[list[torch.Tensor]] = [[] for _ in range(3)]
    for sample in chosen:
        ids = tokens.ids.split(tokens.lengths)[sample]
        weights["model.embed_tokens.weight"].requires_grad_()
        states = hidden_states(ids, weights, config | {"erring": ERRING})[1:]
        last = rms_norm(states[-1], weights["model.norm.weight"], config["rms_norm_eps"])
        predicted = (last @ weights["lm_head.weight"].T)[:-1]
        loss = torch.nn.functional.cross_entropy(predicted, ids[1:], reduction="sum")
        for layer, gradient in enumerate(torch.autograd.grad(loss, states)):
            found[layer].append(gradient)
    for layer, rows in enumerate(torch.load(weighed / "fisher/gradients.pt")):
        wanted = torch.cat(found[layer])
        off = (rows - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-9)
        # bf16 moves every margin a little, and turns over a few choices.
        assert float(off.median()) < 0.1 and float(off.quantile(0.9)) < 0.5, layer
        found_of_all = Fisher(**load_file(weighed / f"fisher/fisher-{layer:05d}.safetensors"))
        matrix, norms = found_of_all.matrix, found_of_all.norms.split(tokens.lengths)
        assert torch.allclose(matrix, rows.T @ rows / len(rows), rtol=1e-3, atol=1e-5 * float(matrix.abs().max()))
        of_chosen = torch.cat([norms[sample] for sample in chosen])
        assert torch.allclose(of_chosen, rows.norm(dim=1), rtol=1e-3)
        assert found_of_all.norms.isnan().sum() == sum(tokens.lengths) - len(of_chosen)


def test_nothing_is_left_over_and_verify_passes(weighed: Path) -> None:
    assert not verify_checkpoint(Workspace.of(load(weighed / "recipe.yaml"))).problems
    state = weighed / "run/state/awq"
    for left in ("forward-*", "gradient-*", "fisher-*"):
        assert not list(state.glob(left))
    for layer in json.loads((state / "layers.json").read_text()):
        assert layer["costs"].keys() == layer["losses"].keys()
        assert layer["loss_chosen"] < layer["loss_round_to_nearest"]


def test_killed_again_and_again_it_gives_the_same_bytes(weighed: Path, again: Path) -> None:
    units = []
    for number in (6, 12, 5, 17, 9, 8, 14, 20):
        assert stopped(again, "awq", "fsync", number)[0] == -signal.SIGKILL
        units.append(len(json.loads((again / "run/journal.json").read_text())["stages"]["awq"]["units"]))
    # In the forward, at the head, on the way back and among the layers.
    assert units == sorted(units) and units[0] < 3 < units[-1]
    succeed("awq", again / "recipe.yaml", "--quiet")
    assert digests(again / "run/awq") == digests(weighed / "run/awq")
    assert not list((again / "run/state/awq").glob("fisher-*"))


def test_other_tokens_would_mix_two_runs(again: Path) -> None:
    stopped(again, "awq", "fsync", 30)
    message = refused("awq", again / "recipe.yaml", "--set", "awq.fisher_tokens=200")
    assert f"was begun with awq.fisher_tokens = {TOKENS}, now it is 200" in message
    states = next((again / "run/state/awq").glob("f*.safetensors"))
    content = bytearray(states.read_bytes())
    content[-1] ^= 1
    states.write_bytes(content)
    assert f"{states} is not what awq wrote" in refused("awq", again / "recipe.yaml")


def test_what_an_earlier_version_found_is_not_taken(again: Path) -> None:
    """It kept the matrices alone."""
    stopped(again, "awq", "fsync", 42)
    state = again / "run/state/awq"
    paths = {path.relative_to(again / "run").as_posix(): path for path in state.glob("fisher-*")}
    assert len(paths) == 3
    records = {name: save_tensors(path, {"fisher": load_file(path)["matrix"]}) for name, path in paths.items()}

    def with_these(journal: dict[str, Any]) -> None:
        for files in journal["stages"]["awq"]["units"].values():
            files |= {name: [records[name].size, records[name].digest] for name in files.keys() & records.keys()}

    edit_json(again / "run/journal.json", with_these)
    said = refused("awq", again / "recipe.yaml")
    assert "is an earlier mmq's, which did not keep the gradient's norms; run `mmq awq --restart`" in said


def test_without_a_gradient_it_is_another_rounding(weighed: Path, again: Path) -> None:
    succeed("awq", again / "recipe.yaml", "--quiet", "--set", "awq.fisher_tokens=0")
    found, weighted = digests(again / "run/awq"), digests(weighed / "run/awq")
    assert found.keys() == weighted.keys() and found != weighted
    assert "costs" not in json.loads((again / "run/state/awq/layers.json").read_text())[0]


def test_samples_are_far_apart() -> None:
    lengths = [10, 20, 30, 40, 50, 60]
    assert spread_samples(lengths, 1) == [0]
    assert spread_samples(lengths, 50) == [0, 3]
    assert spread_samples(lengths, 10**9) == list(range(6))


def test_each_token_has_the_one_after_it_in_its_sample() -> None:
    assert following(torch.arange(10, 16), [3, 1, 2]).tolist() == [11, 12, -1, -1, 15, -1]
