"""The command line: what it prints, what it leaves alone, and the synthetic checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import Result
from typer.testing import CliRunner

import mmq as package
from conftest import ROOT, digests
from mmq.cli.app import app
from mmq.recipe import load
from mmq.workdir.versions import versions

COMMANDS = [
    "plan",
    "calibration",
    "doctor",
    "eval",
    "dequant",
    "awq",
    "restore",
    "run",
    "verify",
    "status",
    "clean",
    "push",
    "synth",
    "recipe",
]
STAGES = {"dequant": "bf16", "awq": "awq", "restore": "hybrid"}
EVENTS = {"start", "progress", "unit", "note", "finish", "result"}
Mmq = Callable[..., subprocess.CompletedProcess[str]]


def cli(*arguments: object) -> Result:
    """Run a command in this process; an exception that a user would see as a traceback is raised here."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(*arguments: object) -> str:
    """Standard output of a command that must succeed."""
    result = cli(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(*arguments: object, code: int = 2) -> str:
    """The one sentence on standard error of a command that must fail."""
    result = cli(*arguments)
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def events(stdout: str) -> list[dict[str, Any]]:
    """The lines of --json."""
    found = [json.loads(line, parse_constant=lambda constant: pytest.fail(constant)) for line in stdout.splitlines()]
    assert all(isinstance(event, dict) for event in found)
    return found


def test_help_comes_without_torch() -> None:
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mmq", "--help"], capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "typer" in imported
    assert not {name.partition(".")[0] for name in imported} & {"torch", "transformers", "llmcompressor", "datasets"}
    assert all(command in process.stdout for command in COMMANDS)


def test_version() -> None:
    assert succeed("--version") == f"mmq {package.__version__}\n"
    (found,) = events(succeed("--version", "--json"))
    assert found | {"event": "result"} == {"event": "result"} | versions()
    assert succeed("--json", "--version") == succeed("--version", "--json")
    assert "--version" in cli("--json").stderr


def test_a_package_that_is_not_there_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside vLLM mmq lives without its dependencies."""
    monkeypatch.setattr("mmq.workdir.versions.PACKAGES", ("torch", "no-such-package"))
    (found,) = events(succeed("--version", "--json"))
    assert found["no-such-package"] is None
    assert found["torch"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [("mmq re", {"restore", "report", "recipe"}), ("mmq recipe s", {"show"}), ("mmq run --gp", {"--gpus"})],
)
def test_shells_complete_commands_and_options(words: str, wanted: set[str]) -> None:
    complete = {"_MMQ_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    code = "import sys; sys.argv[0] = 'mmq'; from mmq.cli.app import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | complete, capture_output=True, text=True, check=False
    )
    assert set(found.stdout.split()) == wanted


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    assert "Usage" in succeed(command, "--help")


def test_no_command_shows_the_help() -> None:
    assert all(command in cli().output for command in COMMANDS)


@pytest.mark.parametrize("arguments", [["nonsense"], ["run"], ["run", "recipe.yaml", "--nonsense"], ["synth"]])
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    result = cli(*arguments)
    assert result.exit_code == 2
    assert result.stderr


def everything(folder: Path) -> tuple[dict[str, str], set[Path]]:
    """All bytes and all folders."""
    return digests(folder), {path for path in folder.rglob("*") if path.is_dir()}


@pytest.mark.parametrize("command", [*STAGES, "run"])
@pytest.mark.parametrize("flag", ["--json", "--quiet", None])
def test_a_dry_run_touches_nothing(project: Path, command: str, flag: str | None) -> None:
    before = everything(project)
    output = succeed(command, project / "recipe.yaml", "--dry-run", *filter(None, [flag]))
    assert everything(project) == before
    assert (output == "") == (flag == "--quiet")


def test_a_dry_run_tells_people_the_bytes(project: Path) -> None:
    plain = succeed("dequant", project / "recipe.yaml", "--dry-run")
    (plan,) = events(succeed("dequant", project / "recipe.yaml", "--dry-run", "--json"))[0]["plan"]
    assert f"{plan['bytes_written'] / 1e6:.1f} MB" in plain


def test_a_dry_run_foretells_the_files_sizes(project: Path, finished: Path) -> None:
    (event,) = events(succeed("run", project / "recipe.yaml", "--dry-run", "--json"))
    assert [plan["stage"] for plan in event["plan"]] == list(STAGES)
    for plan in event["plan"]:
        shards = list((finished / "run" / STAGES[plan["stage"]]).glob("*.safetensors"))
        assert plan["bytes_written"] == sum(path.stat().st_size for path in shards)
        assert plan["files"] == len(shards) == len(plan["units"])
        assert plan["folder"] == str(project / "run" / STAGES[plan["stage"]])
        assert plan["free_disk"] > 0
        assert plan["host_memory"] > 0


def test_a_dry_run_of_fp8_needs_no_dequant(project: Path) -> None:
    (event,) = events(succeed("run", project / "recipe.yaml", "--dry-run", "--json", "--set", "awq.source=fp8"))
    assert [plan["stage"] for plan in event["plan"]] == ["awq", "restore"]


def test_json_of_a_whole_run(project: Path, mmq: Mmq) -> None:
    """A real process: libraries must not write between the lines either."""
    process = mmq("run", project / "recipe.yaml", "--json")
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    found = events(process.stdout)
    assert {event["event"] for event in found} <= EVENTS
    for stage in [*STAGES, "verify"]:
        mine = [event for event in found if event.get("stage") == stage and event["event"] != "note"]
        assert mine[0]["event"] == "start"
        assert mine[-1]["event"] == "finish"
        units = [event for event in mine if event["event"] == "unit"]
        assert len(units) == mine[0]["units"] == len({event["unit"] for event in units})
        assert [event["done"] for event in units] == list(range(1, len(units) + 1))
        percent = [event["percent"] for event in mine]
        assert percent == sorted(percent)
        assert (percent[0], percent[-1]) == (0, 100)
        assert {event["unit"] for event in mine if event["event"] == "progress"} == {event["unit"] for event in units}
    result, made = (event for event in found if event["event"] == "result")
    assert result["ok"] is True
    assert result["problems"] == []
    assert (made["summary"]["verified"], made["summary"]["folder"]) == (True, str(project / "run" / "hybrid"))


def test_quiet_prints_nothing(project: Path, mmq: Mmq) -> None:
    process = mmq("run", project / "recipe.yaml", "--quiet")
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert (project / "run" / "verify.json").exists()


def test_people_see_stages_units_and_the_next_command(project: Path) -> None:
    output = succeed("dequant", project / "recipe.yaml")
    assert "dequant is complete" in output
    assert "model-00001-of-00004.safetensors" in output
    assert f"mmq awq {project / 'recipe.yaml'}" in output


def test_brackets_in_a_path_are_shown(tmp_path: Path) -> None:
    """rich takes [old] for markup."""
    path = tmp_path / "recipe[old].yaml"
    assert str(path) in succeed("recipe", "init", path)
    assert str(tmp_path / "no[old].yaml") in refused("status", tmp_path / "no[old].yaml")


def test_recipe_init_writes_a_recipe_that_loads(tmp_path: Path) -> None:
    path = tmp_path / "new" / "recipe.yaml"
    succeed("recipe", "init", path, "--source", "/models/x")
    recipe = load(path)
    assert recipe.model.source == "/models/x"
    assert recipe.awq.n_grid == 20
    assert digests(tmp_path).keys() == {"new/recipe.yaml"}


def test_recipe_init_names_the_real_model_by_default(tmp_path: Path) -> None:
    succeed("recipe", "init", tmp_path / "recipe.yaml")
    assert load(tmp_path / "recipe.yaml").model.source == "MiniMaxAI/MiniMax-M2.5"


@pytest.mark.parametrize("source", ["/models/a #1", "/models/x: y", "'quoted'", "*star", "SOURCE of {truth}"])
def test_recipe_init_takes_any_path(tmp_path: Path, source: str) -> None:
    """YAML has its own ideas of #, : and quotes."""
    succeed("recipe", "init", tmp_path / "recipe.yaml", "--source", source)
    assert load(tmp_path / "recipe.yaml").model.source == source


def test_recipe_init_changes_two_lines_of_the_shipped_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    shipped = (ROOT / "configs/minimax-m2.5.yaml").read_text(encoding="utf-8").splitlines()
    succeed("recipe", "init", path)
    assert path.read_text(encoding="utf-8").splitlines() == shipped
    succeed("recipe", "init", path, "--force", "--source", "/models/My Model", "--work-dir", "/scratch/x")
    written = path.read_text(encoding="utf-8").splitlines()
    changed = [(old.split("#")[0], new.split("#")[0]) for old, new in zip(shipped, written, strict=True) if old != new]
    assert [old.split(":")[0].strip() for old, _ in changed] == ["source", "work_dir"]
    assert load(path).work_dir == "/scratch/x"
    succeed("recipe", "init", path, "--force", "--source", "/models/My Model")
    assert load(path).work_dir == "runs/my-model"


def test_recipe_list_names_what_recipes_may_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (result,) = events(succeed("recipe", "list", "--json"))
    names = {entry["name"]: entry["kind"] for entry in result["builtin"]}
    assert names == dict.fromkeys((f"builtin:{path.stem}" for path in (ROOT / "configs").glob("*.yaml")), "recipe") | (
        dict.fromkeys((f"builtin:{path.stem}" for path in (ROOT / "calibration_data").glob("*.jsonl")), "samples")
    )
    shown = succeed("recipe", "list")
    assert all(name in shown for name in names)


def test_recipe_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "configs/tiny.yaml").read_text(encoding="utf-8")
    assert succeed("recipe", "show", "tiny") == succeed("recipe", "show", "builtin:tiny") == text
    # A file of that name is meant where there is one.
    (tmp_path / "tiny").write_text(succeed("recipe", "show", "tiny", "--set", "awq.n_grid=7"), encoding="utf-8")
    loaded = load(tmp_path / "tiny")
    assert (loaded.awq.n_grid, loaded.awq.group_size) == (7, 128)
    assert succeed("recipe", "show", "tiny") == (tmp_path / "tiny").read_text(encoding="utf-8")
    (shown,) = events(succeed("recipe", "show", "tiny", "--json"))
    assert shown["recipe"] == loaded.model_dump(mode="json")
    assert "huge" in refused("recipe", "show", "huge")


def test_recipe_init_overwrites_only_by_force(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("mine", encoding="utf-8")
    assert str(path) in refused("recipe", "init", path)
    assert path.read_text(encoding="utf-8") == "mine"
    succeed("recipe", "init", path, "--force")
    load(path)


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the safetensors library."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load(path.read_bytes()).items()
    }


def test_synth_writes_the_hubs_format(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    options = {
        "layers": 3, "hidden": 384, "intermediate": 256, "experts": 4, "top-k": 3, "heads": 6, "kv-heads": 3,
        "head-dim": 32, "vocabulary": 300, "shards": 2,
    }  # fmt: skip
    arguments = [part for key, value in options.items() for part in (f"--{key}", value)]
    succeed("synth", folder, *arguments)
    tensors = load_folder(folder)
    fp8, f32, bf16 = torch.float8_e4m3fn, torch.float32, torch.bfloat16
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "model.embed_tokens.weight": (bf16, (300, 384)),
        "model.norm.weight": (bf16, (384,)),
        "lm_head.weight": (bf16, (300, 384)),
    }
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        moe = f"{prefix}block_sparse_moe."
        matrices = {f"{prefix}self_attn.{name}_proj": size for name, size in
                    (("q", (192, 384)), ("k", (96, 384)), ("v", (96, 384)), ("o", (384, 192)))}  # fmt: skip
        for expert in range(4):
            matrices |= {f"{moe}experts.{expert}.{name}": size for name, size in
                         (("w1", (256, 384)), ("w2", (384, 256)), ("w3", (256, 384)))}  # fmt: skip
        for name, (rows, columns) in matrices.items():
            wanted[f"{name}.weight"] = (fp8, (rows, columns))
            wanted[f"{name}.weight_scale_inv"] = (f32, (-(-rows // 128), -(-columns // 128)))
        wanted[f"{moe}gate.weight"] = (f32, (4, 384))
        wanted[f"{moe}e_score_correction_bias"] = (f32, (4,))
        for name, size in (("input", 384), ("post_attention", 384)):
            wanted[f"{prefix}{name}_layernorm.weight"] = (bf16, (size,))
        wanted[f"{prefix}self_attn.q_norm.weight"] = (bf16, (192,))
        wanted[f"{prefix}self_attn.k_norm.weight"] = (bf16, (96,))
        assert (tensors[f"{moe}e_score_correction_bias"] - 8).abs().max() < 1
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == wanted

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sizes = {
        "model_type": "minimax_m2",
        "architectures": ["MiniMaxM2ForCausalLM"],
        "num_hidden_layers": 3,
        "hidden_size": 384,
        "intermediate_size": 256,
        "num_local_experts": 4,
        "num_experts_per_tok": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 32,
        "rotary_dim": 16,
        "vocab_size": 300,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
    }
    assert {key: config.get(key) for key in sizes} == sizes
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "fp8"
    assert quantization["fmt"] == "float8_e4m3fn"
    assert quantization["weight_block_size"] == [128, 128]

    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"].keys() == wanted.keys()
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_synth_follows_its_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        succeed("synth", tmp_path / name, "--seed", seed, "--layers", 1)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a") != digests(tmp_path / "c")


def test_synth_can_part_scales_from_weights(tmp_path: Path) -> None:
    for flag in ("--shuffle", "--no-shuffle"):
        succeed("synth", tmp_path / flag, flag)
    apart = {}
    for flag in ("--shuffle", "--no-shuffle"):
        index = json.loads((tmp_path / flag / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
        apart[flag] = sum(index[name] != index.get(f"{name}_scale_inv", index[name]) for name in index)
    assert apart["--shuffle"] > 20
    assert apart["--no-shuffle"] <= 2
    plain, shuffled = load_folder(tmp_path / "--no-shuffle"), load_folder(tmp_path / "--shuffle")
    assert plain.keys() == shuffled.keys()
    name = "model.layers.0.block_sparse_moe.gate.weight"
    assert torch.equal(plain[name], shuffled[name])


def test_synth_writes_only_into_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    succeed("synth", tmp_path / "empty", "--layers", 1)
    before = digests(tmp_path)
    assert str(tmp_path / "empty") in refused("synth", tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    refused("synth", tmp_path / "file")
    (tmp_path / "file").unlink()
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    "options",
    [
        ["--layers", 0],
        ["--experts", 0, "--top-k", 0],
        ["--experts", 2, "--top-k", 3],
        ["--heads", 3, "--kv-heads", 2],
        ["--kv-heads", 0],
        ["--kv-heads", -1],
        ["--hidden", -256],
        ["--vocabulary", 10],
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_synth_refuses_sizes_that_make_no_model(tmp_path: Path, options: list[object]) -> None:
    refused("synth", tmp_path / "model", *options)
    assert digests(tmp_path) == {}


def test_synth_refuses_no_shards(tmp_path: Path) -> None:
    assert cli("synth", tmp_path / "model", "--shards", 0).exit_code == 2
    assert not (tmp_path / "model").exists()


def test_a_closed_pipe_is_no_traceback(project: Path) -> None:
    """`mmq run --json | head -1`: the reader goes away."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mmq", "dequant", project / "recipe.yaml", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    assert process.wait() != 0
    assert "Traceback" not in errors
