"""A family from outside the package: a table, handed over by a program or by an entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.conftest import SAMPLES, write_recipe

from mmq.errors import CheckpointError
from mmq.families import Architecture, families, grouped_query, register, registry
from mmq.families.registry import architecture_of
from mmq.prove.verify import verify_checkpoint
from mmq.recipe import load
from mmq.source.synth import Sizes, model_config, write_checkpoint, write_samples
from mmq.stages.pipeline import run_stages
from mmq.workdir.workspace import Workspace

# As a package of somebody else would have it: Qwen3-MoE's classes under names that no release has, its layers elsewhere
# in the file.
INVENTED = Architecture(
    model_type="invented_moe",
    causal_lm="InventedForCausalLM",
    modeling="transformers.models.qwen3_moe.modeling_qwen3_moe",
    config_class="Qwen3MoeConfig",
    layer_class="Qwen3MoeDecoderLayer",
    rotary_class="Qwen3MoeRotaryEmbedding",
    layer="backbone.blocks.{layer}.",
    attention_weights=grouped_query("head", "head"),
    smooth_norm="post_attention_layernorm.weight",
    router="moe.router.weight",
    router_bias=None,
    router_stored="BF16",
    router_served="BF16",
    expert="moe.experts.{expert}.",
    gate="wg",
    up="wu",
    down="wd",
    module_names=(("moe.router.", "mlp.gate."), ("moe.", "mlp.")),
    moe_module="mlp",
    embedding="backbone.embed.weight",
    final_norm="backbone.norm.weight",
    experts_key="num_experts",
    intermediate_key="moe_intermediate_size",
    config_fields=("head_dim",),
    example={"norm_topk_prob": True},
)


@pytest.fixture
def registered() -> Iterator[None]:
    register(INVENTED)
    yield
    del registry.ARCHITECTURES[INVENTED.model_type]


@pytest.mark.usefixtures("registered")
def test_a_registered_family_goes_all_the_way(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", Sizes(), family=INVENTED)
    write_samples(tmp_path / "samples.jsonl", SAMPLES)
    workspace = Workspace.of(load(write_recipe(tmp_path, source="fp8")))
    run_stages(workspace, ["awq", "restore"])
    report = verify_checkpoint(workspace)
    assert not report.problems
    assert report.checks["experts whose int4 codes are the nearest"] == 16
    assert {name.partition(".self_attn")[0] for name in report.attention} == {"backbone.blocks.0", "backbone.blocks.1"}


@pytest.mark.usefixtures("registered")
def test_one_of_the_same_name_takes_its_place() -> None:
    register(replace(INVENTED, head="lm.weight"))
    assert architecture_of(model_config(Sizes(), INVENTED)).head == "lm.weight"


def test_it_is_gone_without_registration() -> None:
    assert INVENTED.model_type not in families()
    with pytest.raises(CheckpointError, match="'invented_moe' is not supported; mmq knows "):
        architecture_of(model_config(Sizes(), INVENTED))


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        ("theirs:TABLE", 0, "folder: "),
        ("theirs:NUMBER", 2, "the family theirs:NUMBER is no mmq.families.table.Architecture"),
        ("theirs:ABSENT", 2, "the family theirs:ABSENT can't be loaded"),
    ],
)
def test_an_installed_package_brings_its_family(tmp_path: Path, value: str, code: int, words: str) -> None:
    """Its folder on the path, with an entry point in its metadata as pip leaves it."""
    metadata = tmp_path / "theirs-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[mmq.families]\nanything = {value}\n", encoding="utf-8")
    (tmp_path / "theirs.py").write_text(
        "from dataclasses import replace\nfrom mmq.families import families\n"
        "from mmq.families.qwen3_moe import QWEN3_MOE\nNUMBER = 1\n"
        "TABLE = replace(QWEN3_MOE, model_type='theirs_moe', causal_lm='TheirsForCausalLM')\n",
        encoding="utf-8",
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "mmq", "synth", str(tmp_path / "made"), "--family", "theirs_moe"]
    said = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    assert said.returncode == code and words in said.stdout + said.stderr, said.stderr
    assert (tmp_path / "made/config.json").exists() == (code == 0)
