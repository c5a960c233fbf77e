"""Inputs and settings that failed for people who made such checkpoints with other tools; docs/inputs.md lists them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cli.test_cli import cli, refused, succeed
from conftest import ROOT, write_recipe
from mmq.errors import RecipeError
from mmq.prove.verify import verify_checkpoint
from mmq.recipe import load
from mmq.source.chat_template import Chat, render
from mmq.source.synth import Sizes, write_checkpoint, write_samples
from mmq.stages.pipeline import run_stages
from mmq.storage.checkpoint import Checkpoint
from mmq.workdir.workspace import Workspace
from reference import read_folder
from source.conftest import described, tokens_of, write_jsonl, write_sources

LINEARS = ("w1", "w2", "w3")


def test_groups_of_all_channels_are_refused_with_what_there_is(project: Path) -> None:
    """casper-hansen/AutoAWQ 578: group_size = -1 ends in an error of `view`."""
    with pytest.raises(RecipeError, match=r"awq\.group_size: Input should be 32, 64 or 128 \(it is -1\)"):
        load(write_recipe(project, group_size=-1))


def test_long_samples_are_cut_and_not_left_out(project: Path) -> None:
    """casper-hansen/AutoAWQ 297: samples of more than 512 tokens are skipped without a word."""
    write_jsonl(project / "long.jsonl", [{"text": "word " * 900}, {"text": "a few words"}])
    recipe = write_sources(project, {"path": "long.jsonl"}, window=64)
    total = described(recipe)["total"]
    assert (total["samples"], total["samples_cut"]) == (2, 1)
    assert tokens_of(recipe).lengths[0] == 64


def test_samples_are_not_run_together_and_cut_anew(project: Path) -> None:
    """casper-hansen/AutoAWQ 619: joined and cut, all but the first sample begin in the middle of something."""
    texts = [f"number {n} " * (n + 1) for n in range(4)]
    write_jsonl(project / "texts.jsonl", [{"text": text} for text in texts])
    tokens = tokens_of(write_sources(project, {"path": "texts.jsonl"}, window=8))
    tokenizer = AutoTokenizer.from_pretrained(project / "source")
    assert [part.tolist() for part in tokens.ids.split(tokens.lengths)] == [
        tokenizer(text)["input_ids"][:8] for text in texts
    ]


def test_an_empty_set_is_refused(project: Path) -> None:
    """ModelCloud/GPTQModel 1935."""
    (project / "samples.jsonl").write_text("\n \n")
    write_recipe(project, calibration={"files": [{"path": "samples.jsonl"}]})
    assert refused("run", project / "recipe.yaml").endswith("samples.jsonl is empty")
    assert not (project / "run" / "bf16").exists()


def test_a_set_in_csv_is_read_as_a_folders(project: Path) -> None:
    """vllm-project/llm-compressor 2024: calibration text in a CSV file."""
    (project / "set").mkdir()
    (project / "set" / "train.csv").write_text('output,n\n"one, two",1\nthree,2\n')
    write_recipe(project, calibration={"files": [{"path": "set/train.csv"}]})
    assert "set/train.csv:1 is not JSON" in refused("run", project / "recipe.yaml", "--dry-run")
    recipe = write_sources(project, {"hub": "set", "column": "output", "samples": 2})
    assert described(recipe)["total"]["text"] == 2


CALL: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "mul", "arguments": {"a": 3, "b": 18}}}
CALLS = (
    "{% for c in messages[0].tool_calls %}{% for k, v in c.function.arguments | items %}{{ k }}={{ v }} {% endfor %}"
)


def test_arguments_of_tools_may_be_json_in_a_string() -> None:
    """QwenLM/Qwen3-Coder 444, vllm-project/vllm 28820: OpenAI's form of arguments, where a template takes items. vLLM
    parses them before it renders."""
    template = CALLS + "{% endfor %}"

    def rendered(arguments: Any) -> str:
        call = CALL | {"function": CALL["function"] | {"arguments": arguments}}
        messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
        (text,) = render([Chat("sample 1", template, messages, None)], {})
        return text

    assert rendered('{"a": 3, "b": 18}') == rendered({"a": 3, "b": 18}) == "a=3 b=18 "
    # What is no object stays as it is, for templates that print it.
    (text,) = render(
        [
            Chat(
                "sample 1",
                "{{ messages[0].tool_calls[0].function.arguments }}",
                [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "[1, {"}}]}],
                None,
            )
        ],
        {},
    )
    assert text == "[1, {"


def test_a_shard_that_was_never_downloaded_is_named(finished_copy: Path) -> None:
    """vllm-project/vllm 34859: a quantized model with a missing shard loads, its weights whatever memory held."""
    recipe = finished_copy / "recipe.yaml"
    result = finished_copy / "run/hybrid/model-00002-of-00003.safetensors"
    result.unlink()
    outcome = cli("verify", recipe)
    assert outcome.exit_code == 1 and f"the shard {result} is missing" in outcome.stderr
    shard = sorted((finished_copy / "source").glob("*.safetensors"))[2]
    shard.unlink()
    for command in ("run", "awq"):
        assert refused(command, recipe).endswith(f"the shard {shard} is missing")


def test_every_expert_is_calibrated_and_quantized(finished: Path) -> None:
    """intel/auto-round 1390: all experts of MiniMax-M2.1 uncalibrated; ModelCloud/GPTQModel 1680: some left as they
    were, by chance."""
    recipe = load(finished / "recipe.yaml")
    layers = json.loads((finished / "run/state/awq/layers.json").read_text())
    for layer in layers:
        counts = zip(layer["tokens_per_expert"], layer["topped_up"], strict=True)
        assert all(routed + added >= recipe.awq.min_tokens for routed, added in counts)
    names = Counter(
        name.rpartition(".")[2] for name in Checkpoint.open(finished / "run/hybrid").specs if ".experts." in name
    )
    config, _ = read_folder(finished / "source")
    each = config["num_hidden_layers"] * config["num_local_experts"] * len(LINEARS)
    assert names == {"weight_packed": each, "weight_scale": each, "weight_shape": each}


def test_blocks_at_the_edges_may_be_cut(tmp_path: Path) -> None:
    """intel/auto-round 747: fp8 weights whose sides are no multiples of 128, as [587, 7168]."""
    write_checkpoint(tmp_path / "source", Sizes(1, 192, 160, 4, heads=2, kv_heads=1, head_dim=72))
    write_samples(tmp_path / "samples.jsonl", 12)
    workspace = Workspace.of(load(write_recipe(tmp_path, source="fp8", group_size=32, n_grid=3)))
    run_stages(workspace, ["awq", "restore"])
    assert not verify_checkpoint(workspace).problems


def test_scales_of_the_cache_have_the_names_that_vllm_maps(finished: Path) -> None:
    """vllm-project/vllm 37214: MiniMax-M2.5 with scales under qkv_proj's name ends in a KeyError."""
    names = {name for name in Checkpoint.open(finished / "run/hybrid").specs if name.endswith(("k_scale", "v_scale"))}
    assert names == {f"model.layers.{n}.self_attn.{scale}" for n in range(2) for scale in ("k_scale", "v_scale")}


def test_what_a_server_reads_beside_the_weights_is_the_sources(project: Path) -> None:
    """vllm-project/llm-compressor 1305 and 2153: files left behind, a tokenizer saved anew that splits otherwise;
    casper-hansen/AutoAWQ 373: no generation_config.json, and no end to what is generated."""
    extra = {
        "preprocessor_config.json": b"{}",
        "generation_config.json": b'{"eos_token_id": [2, 3]}',
        "vocab.txt": b"a\r\n",
    }
    for name, content in extra.items():
        (project / "source" / name).write_bytes(content)
    succeed("run", project / "recipe.yaml", "--quiet", "--set", "awq.source=fp8", "--set", "awq.n_grid=3")
    names = {path.name for path in (project / "source").iterdir()} - {"config.json", "model.safetensors.index.json"}
    carried = {name for name in names if not name.endswith(".safetensors")}
    assert carried >= {*extra, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for folder in ("awq", "hybrid"):
        for name in carried:
            assert (project / "run" / folder / name).read_bytes() == (project / "source" / name).read_bytes()


def test_the_page_names_each_of_them() -> None:
    page = (ROOT / "docs" / "inputs.md").read_text(encoding="utf-8")
    own = Path(__file__).read_text(encoding="utf-8")
    cited = {"AutoAWQ 578", "AutoAWQ 297", "AutoAWQ 619", "AutoAWQ 373", "GPTQModel 1935", "GPTQModel 1680",
             "llm-compressor 2024", "llm-compressor 1305", "Qwen3-Coder 444", "vllm 28820", "vllm 34859", "vllm 37214",
             "auto-round 1390", "auto-round 747"}  # fmt: skip
    for thread in cited:
        name, number = thread.split()
        assert thread in own
        assert f"{name} {number}" in page or f"{name}/issues/{number}" in page or f"{name}/pull/{number}" in page
