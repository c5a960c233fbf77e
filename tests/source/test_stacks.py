"""Sources whose experts lie in stacks, and config.jsons whose decoder has a section of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import edit_json
from typer.testing import CliRunner

from mmq.cli.app import app
from mmq.errors import CheckpointError
from mmq.families.qwen3_5_moe import QWEN3_5_MOE
from mmq.families.registry import architecture_of
from mmq.recipe import Recipe
from mmq.serve.quantization_config import output_config, unquantized
from mmq.source.formats import format_of
from mmq.source.model import SourceModel
from mmq.source.synth import STORED, Sizes, model_config, write_checkpoint
from mmq.storage.checkpoint import Checkpoint

LAYER = "model.language_model.layers.1.mlp.experts."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "source", Sizes(experts=4), shards=1, family=QWEN3_5_MOE, stored=STORED["bf16-stacked"])
    return tmp_path / "source"


def opened(folder: Path) -> SourceModel:
    checkpoint = Checkpoint.open(folder)
    return SourceModel(checkpoint, architecture_of(checkpoint.config))


def test_each_expert_is_a_view_of_its_rows(folder: Path) -> None:
    checkpoint = opened(folder).checkpoint
    (path,) = folder.glob("*.safetensors")
    stored, content = load_file(path), path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    seen = 0
    with checkpoint.reader() as reader:
        for layer in (LAYER, "mtp.layers.0.mlp.experts."):
            for expert in range(4):
                rows = stored[f"{layer}gate_up_proj"][expert]
                wanted = {
                    "gate_proj": rows[:128],
                    "up_proj": rows[128:],
                    "down_proj": stored[f"{layer}down_proj"][expert],
                }
                for linear, values in wanted.items():
                    name = f"{layer}{expert}.{linear}.weight"
                    assert torch.equal(reader[name], values) and checkpoint.specs[name].shape == values.shape
                    # What is read ahead are these bytes of the file and no others.
                    begin, end = checkpoint._span(header, name)
                    there = content[8 + length + begin : 8 + length + end]
                    assert there == values.contiguous().view(torch.uint8).numpy().tobytes()
                    seen += 1
    assert seen == 24 == len(checkpoint.parts) - 12  # of the other layer
    assert not [name for name in checkpoint.specs if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "down_proj",
            lambda t: t[:3].clone(),
            r"the shape \[3, 256, 128\], config.json's sizes make it \[4, 256, 128\]",
        ),
        ("gate_up_proj", lambda t: t[:, :200].clone(), r"make it \[4, 256, 256\]"),
        ("gate_up_proj", lambda t: t[0].clone(), r"make it \[4, 256, 256\]"),
        ("gate_up_proj", lambda t: t[:, :, :0].clone(), r"make it \[4, 256, 256\]"),
        ("down_proj", lambda t: t.to(torch.float8_e4m3fn), "is F8_E4M3 and holds all experts of a layer"),
        ("down_proj", lambda t: t.float(), r"experts\.0\.down_proj\.weight is F32 instead of BF16"),
        ("3.up_proj.weight", lambda _: torch.zeros(128, 256).bfloat16(), "is there twice, by itself and in"),
        ("down_proj", lambda _: None, r"experts\.0\.down_proj\.weight is missing"),
    ],
)
def test_what_is_no_stack_of_these_experts_is_refused(
    folder: Path, name: str, change: Callable[[torch.Tensor | None], torch.Tensor | None], words: str
) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    changed = change(tensors.pop(LAYER + name, None))
    tensors |= {} if changed is None else {LAYER + name: changed}
    save_file(tensors, path)
    edit_json(folder / "model.safetensors.index.json", lambda c: c.update(weight_map=dict.fromkeys(tensors, path.name)))
    with pytest.raises(CheckpointError, match=words):
        opened(folder)


def test_only_families_with_stacks_are_made_with_them(tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["synth", str(tmp_path / "a"), "--family", "qwen3_moe", "--format", "bf16-stacked"])
    assert said.exit_code == 2 and "releases of qwen3_moe store each expert by itself" in said.output
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("text_config"), "text_config is missing"),
        (lambda c: c.update(text_config=[]), "text_config is no object"),
        (lambda c: c.update(tie_word_embeddings=True), "tie_word_embeddings says one thing, text_config.tie_word"),
        (lambda c: c["text_config"].update(num_experts="4"), "num_experts is '4'"),
        (lambda c: c["vision_config"].update(depth=10**9), "vision_config.depth is 1000000000, more than 1000"),
        (lambda c: c["vision_config"].update(depth=-1), "vision_config.depth is no number"),
        (lambda c: c["vision_config"].update(hidden_size=None), "vision_config.hidden_size is None"),
        (lambda c: c["text_config"].update(layer_types=["linear_attention"]), "layer_types does not name the kind"),
    ],
)
def test_a_section_that_says_something_else_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    edit_json(folder / "config.json", change)
    with pytest.raises(CheckpointError, match=words):
        opened(folder)


def test_a_decoder_without_its_tower_is_taken(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.pop("vision_config"))
    assert not [weight for weight in opened(folder).architecture.carried_weights if "visual" in weight.name]


@pytest.mark.parametrize("inside", [False, True])
def test_quantization_is_described_beside_the_section(inside: bool) -> None:
    """Wherever the source has it; the decoder's rotary settings stay in the section."""
    config = model_config(Sizes(), QWEN3_5_MOE)
    settings = config.pop("quantization_config")
    places = [config["text_config"], config]
    for place, given in zip(places if inside else reversed(places), (settings, None), strict=True):
        place["quantization_config"] = given
    before, arch = json.dumps(config), architecture_of(config)
    assert format_of(arch.settings(config)).name == "block fp8"
    awq = {"calibration": {"files": [{"path": "z"}]}}
    recipe = Recipe.model_validate({"model": {"source": "x"}, "work_dir": "y", "awq": awq})
    result = output_config(arch, recipe, config, [])
    assert result["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "quantization_config" not in result["text_config"]
    rope = result["text_config"].pop("rope_parameters")
    assert rope == {"partial_rotary_factor": 0.25, "rope_theta": 5000000, "rope_type": "default"}
    assert "rope_parameters" not in result
    del result["quantization_config"]
    assert result == unquantized(arch, config) and json.dumps(config) == before
