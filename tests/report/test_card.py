"""The model card: its figures counted again, its front matter read back, and nothing in it that was not measured."""

from __future__ import annotations

import json
import re
import shutil
import socket
import struct
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from typer.testing import CliRunner

from conftest import ROOT, SAMPLES, digests, edit_json, write_recipe
from mmq.cli.app import app
from mmq.prove.evaluate import evaluate_checkpoint
from mmq.prove.streamed import EvalSettings
from mmq.prove.verify import verify_checkpoint
from mmq.recipe import load
from mmq.report.card import (
    ASSERTION_VERSIONS,
    EXPERTS_VERSIONS,
    LOADER_VERSIONS,
    SCALES_VERSIONS,
    Setting,
    inherited,
    model_card,
    render,
    write_card,
)
from mmq.report.facts import read_run
from mmq.serve.memory import serve_command
from mmq.stages.pipeline import run_stages
from mmq.workdir.workspace import Workspace

SOURCE_CARD = """---
license: other
license_name: modified-mit
license_link: https://github.com/MiniMax-AI/MiniMax-M2.5/blob/main/LICENSE
language: [en, zh]
pipeline_tag: text-generation
library_name: transformers
tags: [theirs]
base_model: someone/else
model-index: [{name: theirs, results: []}]
---
# Their card
"""


def opened(folder: Path, **fields: Any) -> Workspace:
    """The project in a folder as a command would open it."""
    return Workspace.of(load(folder / "recipe.yaml", [f"{key}={value}" for key, value in fields.items()]), offline=True)


def section(card: str, title: str) -> str:
    """The text under a heading."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card, re.DOTALL | re.MULTILINE)
    assert found, f"no section {title}"
    return found[1]


def table(text: str) -> dict[str, list[str]]:
    """A Markdown table's rows by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


def headers(folder: Path) -> dict[str, dict[str, Any]]:
    """All tensors of a folder: eight bytes of length, then JSON, as the safetensors format has it."""
    found: dict[str, dict[str, Any]] = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found |= header
    return found


def kind(name: str) -> str:
    """The card's component of a tensor."""
    for pattern, component in {
        r"experts\.\d+": "experts",
        r"[qkvo]_proj\.weight": "attention",
        "embed_tokens": "embeddings",
        "lm_head": "head",
        r"gate\.weight": "router",
        r"[kv]_scale$": "kv_scales",
    }.items():
        if re.search(pattern, name):
            return component
    return "norms and biases"


def numbers(row: list[str]) -> list[int]:
    return [int(cell.replace(",", "")) for cell in row if re.fullmatch(r"[\d,]+", cell)]


def test_the_components_are_those_of_the_files(finished: Path) -> None:
    parameters: dict[str, int] = defaultdict(int)
    sizes: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for which, folder in enumerate((finished / "source", finished / "run" / "hybrid")):
        for name, entry in headers(folder).items():
            begin, end = entry["data_offsets"]
            sizes[kind(name)][which] += end - begin
            if which == 0 and "scale_inv" not in name:
                elements = 1
                for size in entry["shape"]:
                    elements *= size
                parameters[kind(name)] += elements
    rows = table(section(render(opened(finished)), "Components"))
    assert rows.keys() == {*sizes, "total"}
    for component, (before, after) in sizes.items():
        assert numbers(rows[component]) == [parameters[component], before, after], component
    wholes = [sum(parameters.values()), *(sum(size[which] for size in sizes.values()) for which in (0, 1))]
    assert numbers(rows["total"]) == wholes
    assert "int4" in rows["experts"][3] and "fp8" in rows["attention"][3]
    assert rows["router"][3] == "fp32" and rows["head"][3] == "bf16"


def test_the_calibration_is_the_runs(finished: Path) -> None:
    text = section(render(opened(finished)), "Calibration")
    layers = json.loads((finished / "run/state/awq/layers.json").read_text(encoding="utf-8"))
    tokens = sum(layers[0]["tokens_per_expert"]) // 2  # each goes to two experts
    rows = table(text)
    assert rows["total"] == [str(SAMPLES), str(SAMPLES // 2), f"{tokens:,}", rows["`samples.jsonl`"][3]]
    counts = [count for layer in layers for count in layer["topped_up"]]
    topped = sum(count > 0 for count in counts)
    assert f"| experts topped up to `min_tokens` | {topped} of {len(counts)}, in {len(layers)} layers |" in text
    for name in ("k_scale", "v_scale"):
        values = [layer["kv_scales"][name] for layer in layers]
        assert f"| `{name}` | {min(values):.6g} to {max(values):.6g} |" in text
    for line in ("| group size | 128 |", "(`n_grid`) | 20 |", "| `duo_scaling` | true |", "| `min_tokens` | 64 |"):
        assert line in text


def test_samples_that_are_gone_are_still_told_of_and_lost_tokens_are_not(finished_copy: Path) -> None:
    (finished_copy / "samples.jsonl").unlink()
    assert str(SAMPLES) in table(section(render(opened(finished_copy)), "Calibration"))["total"]
    shutil.rmtree(finished_copy / "run/state/calibration")
    assert "not at hand any more" in section(render(opened(finished_copy)), "Calibration")


def test_nothing_is_claimed_that_was_not_measured(finished: Path) -> None:
    card = render(opened(finished))
    evaluation, verification = section(card, "Evaluation"), section(card, "Verification")
    assert evaluation.split() == ["Not", "evaluated."]
    assert verification.startswith("\nNot verified") and not re.search(r"\d", verification)
    assert not re.search(r"perplexity|no fault|agreement|CUDA|\bH\d00\b|A6000", card, re.IGNORECASE)
    assert "did not serve" in section(card, "Serving")


def test_what_verify_found_is_told_as_long_as_the_files_are_those(finished_copy: Path) -> None:
    verify_checkpoint(opened(finished_copy))
    record = json.loads((finished_copy / "run/verify.json").read_text(encoding="utf-8"))
    text = section(render(opened(finished_copy)), "Verification")
    assert "found no fault" in text
    assert {name: numbers(row) for name, row in table(text).items()} == {k: [v] for k, v in record["checks"].items()}
    errors = [layer["expert_error"]["w2"] for layer in record["layers"]]
    assert f"`w2` {min(errors):.2%} to {max(errors):.2%}" in text

    config = finished_copy / "run/hybrid/config.json"
    kept = config.read_bytes()
    edit_json(config, lambda content: content.update(rope_theta=1))
    assert "Not verified" in section(render(opened(finished_copy)), "Verification")
    verify_checkpoint(opened(finished_copy))
    failed = section(render(opened(finished_copy)), "Verification")
    assert "**Failed.**" in failed and "no fault" not in failed
    config.write_bytes(kept)
    assert "Not verified" in section(render(opened(finished_copy)), "Verification")


def test_the_evaluation_is_that_of_eval_json(finished_copy: Path) -> None:
    evaluate_checkpoint(opened(finished_copy), EvalSettings(str(finished_copy / "samples.jsonl"), 2, 32))
    report = json.loads((finished_copy / "run/eval.json").read_text(encoding="utf-8"))
    text = section(render(opened(finished_copy)), "Evaluation")
    assert f"{report['tokens']['predicted']} predicted tokens of\n2 samples, at most 32 tokens" in text
    assert str(finished_copy) not in text
    rows = table(text)
    assert len(rows) == len(report["variants"]) == 4
    for entry in report["variants"]:
        cells = rows[entry["variant"]]
        assert cells[0] == f"{entry['perplexity']:.4f}"
        assert float(cells[1]) == pytest.approx(entry["kl"], abs=1e-5)
        assert float(cells[2].rstrip("%")) == pytest.approx(100 * entry["top1_agreement"], abs=0.01)


def test_the_source_says_licence_and_language_and_nothing_else(finished_copy: Path) -> None:
    (finished_copy / "source/README.md").write_text(SOURCE_CARD, encoding="utf-8")
    data = ModelCard(render(opened(finished_copy))).data.to_dict()
    tags = data.pop("tags")
    assert {"awq", "int4", "fp8", "compressed-tensors", "moe", "vllm"} <= set(tags) and "theirs" not in tags
    assert data == {
        "base_model": "someone/else",
        "base_model_relation": "quantized",
        "license": "other",
        "license_name": "modified-mit",
        "license_link": "https://github.com/MiniMax-AI/MiniMax-M2.5/blob/main/LICENSE",
        "language": ["en", "zh"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
    }


def test_a_folder_without_a_card_has_no_base_model_but_the_one_of_its_config(finished_copy: Path) -> None:
    data = ModelCard(render(opened(finished_copy))).data.to_dict()
    assert data.keys() == {"tags"}
    for name, wanted in (("MiniMaxAI/MiniMax-M2.5", "MiniMaxAI/MiniMax-M2.5"), ("/home/me/model", None)):
        edit_json(finished_copy / "source/config.json", lambda config, name=name: config.update(_name_or_path=name))
        assert ModelCard(render(opened(finished_copy))).data.to_dict().get("base_model") == wanted


def test_a_source_on_the_hub_is_the_base_model(
    finished_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hub's cache as huggingface_hub lays it out."""
    cached = tmp_path / "hub/models--MiniMaxAI--MiniMax-M2.5"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (finished_copy / "source").rename(cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    card = render(opened(finished_copy, **{"model.source": "MiniMaxAI/MiniMax-M2.5"}))
    assert ModelCard(card).data.to_dict()["base_model"] == "MiniMaxAI/MiniMax-M2.5"
    assert "# `MiniMaxAI/MiniMax-M2.5`," in card
    assert str(tmp_path) not in card


def doc(front: str) -> bytes:
    return f"---\n{front}\n---\n# Model\n".encode()


LONG = "a" * 100_000
HOSTILE: dict[str, bytes] = {
    "malformed": doc("license: [mit"),
    "a list": doc("- license: mit"),
    "a tab": doc("license:\n\tname: x"),
    "twice the end": doc('license: "mit\\n---\\n# <script>alert(1)</script>"'),
    "markdown": doc('license: "[x](javascript:alert(1))"\nlicense_name: "`x` | <img src=x>"'),
    "script link": doc("license_link: javascript:alert(1)"),
    "link with markup": doc('license_link: "https://x.org/<script>"'),
    "python object": doc("license: !!python/object/apply:os.system [id]"),
    "numbers": doc("license: 3\nlanguage: 4\npipeline_tag: 5.5\nlibrary_name: 2020-01-01"),
    "mappings": doc("license: {a: b}\nlanguage: {en: zh}\npipeline_tag: [[x]]\nlibrary_name: null"),
    "long": doc(f"license: {LONG}\nlanguage: [{LONG}]\nlicense_link: https://{LONG}"),
    "bomb": doc(
        "a: &a [x, x, x, x, x, x, x, x]\n"
        + "\n".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 8)}]" for i in range(12))
        + "\nlanguage: *m"
    ),
    "deep": doc("license: " + "[" * 2000),
    "foreign base": doc("base_model: ['../../etc/passwd', '<b>/x', 7]"),
    "binary": b"\xff\xfe---\n\x00license: mit\n---\n",
    "no front matter": b"# Model\n",
    "empty": b"",
    "nothing in it": doc(""),
}


@pytest.mark.parametrize("content", HOSTILE)
def test_a_hostile_card_of_the_source_does_no_harm(finished_copy: Path, content: str) -> None:
    (finished_copy / "source/README.md").write_bytes(HOSTILE[content])
    card = render(opened(finished_copy))
    front = card.split("---\n")[1]
    assert yaml.safe_load(front).keys() == {"tags"}
    assert card.count("\n---\n") == 1
    assert "script" not in card and "<img" not in card


def test_each_inherited_field_is_judged_alone() -> None:
    card = {"license": "mit", "license_link": "javascript:x", "language": ["en", "<b>", 7, "zh-Hans"], "tags": ["x"]}
    assert inherited(card) == {"license": "mit", "language": ["en", "zh-Hans"]}
    assert inherited({"license": ["mit"], "language": "multilingual"}) == {"language": "multilingual"}


def test_hostile_names_stay_in_their_cells_and_blocks(finished: Path) -> None:
    facts = read_run(opened(finished))
    name = "x|y`\n## Evaluation\n```\n<script>"
    recipe = json.loads(json.dumps(facts.recipe))
    recipe["awq"]["calibration"]["files"][0]["path"] = name
    # Folded by YAML so that a line of the block begins with what looks like a fence.
    recipe["work_dir"] = "word " * 16 + "``` " * 20 + "end"
    card = model_card(replace(facts, recipe=recipe), Setting(source=name))
    assert card.count("\n## Evaluation\n") == 1
    assert "\n# `x\\|y' ## Evaluation ''' <script>`, experts in int4" in card
    block = re.search(r"^(`{3,})yaml\n(.*?)\n\1$", section(card, "Reproduction"), re.DOTALL | re.MULTILINE)
    assert block and re.search(r"^ {0,3}```", block[2], re.MULTILINE) and len(block[1]) > 3
    assert yaml.safe_load(block[2]) == recipe


def test_no_folder_and_no_name_of_the_machine_is_told(finished_copy: Path) -> None:
    recipe = load(finished_copy / "recipe.yaml")
    moved = finished_copy.parent / "private"
    shutil.copytree(finished_copy, moved)
    path = write_recipe(moved)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content |= {"model": {"source": str(moved / "source")}, "work_dir": str(moved / "run")}
    content["awq"]["calibration"]["files"][0]["path"] = str(moved / "samples.jsonl")
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    edit_json(
        moved / "run/journal.json",
        lambda journal: [
            run.update(host="my-workstation") for stage in journal["stages"].values() for run in stage["runs"]
        ],
    )
    verify_checkpoint(opened(moved))
    card = render(opened(moved))
    assert str(moved.parent) not in card and "private" not in card
    assert "my-workstation" not in card and socket.gethostname() not in card.split()
    block = re.search(r"```yaml\n(.*?)\n```", card, re.DOTALL)
    assert block
    told = yaml.safe_load(block[1])
    assert (told["model"]["source"], told["work_dir"]) == ("source", "run")
    assert told == recipe.model_dump(mode="json")


def test_the_time_and_memory_of_each_stage_are_the_journals(finished: Path) -> None:
    card = section(render(opened(finished)), "Reproduction")
    journal = json.loads((finished / "run/journal.json").read_text(encoding="utf-8"))
    rows = table(card[card.index("| stage |") : card.index("| package |")])
    assert list(rows) == ["dequant", "awq", "restore"]
    for name, cells in rows.items():
        stage = journal["stages"][name]
        assert cells[:2] == [str(len(stage["units"])), str(len(stage["runs"]))]
        assert cells[2].endswith(" s")
        assert float(cells[2].split()[0]) == pytest.approx(sum(run["seconds"] for run in stage["runs"]), abs=0.05)
        # In MB or, where the process did much before, in GB.
        number, unit = cells[3].split()
        peak = max(run["peak_host_bytes"] for run in stage["runs"])
        assert float(number) * {"MB": 1e6, "GB": 1e9}[unit] == pytest.approx(peak, rel=0.06)
        assert cells[4] == "-"
    assert (
        table(card[card.index("| package |") :]).items()
        >= {name: [version] for name, version in journal["stages"]["awq"]["runs"][0]["versions"].items()}.items()
    )


def test_times_that_were_not_noted_are_not_told(finished_copy: Path) -> None:
    edit_json(
        finished_copy / "run/journal.json",
        lambda journal: [stage.update(runs=[]) for stage in journal["stages"].values()],
    )
    card = section(render(opened(finished_copy)), "Reproduction")
    rows = table(card[card.index("| stage |") : card.index("| package |")])
    assert all(cells[1:4] == ["-", "not measured", "not measured"] for cells in rows.values())


def test_the_serving_command_and_vllms_versions_are_those_of_the_docs() -> None:
    docs = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    assert serve_command("runs/minimax-m2.5/hybrid", 4) in docs.splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in docs.splitlines() if re.match(r"\| 0\.", line)
    ]
    for columns, told in (
        ((1,), ASSERTION_VERSIONS),
        ((2,), SCALES_VERSIONS),
        ((2, 3), LOADER_VERSIONS["qwen3_moe"]),
        ((4,), EXPERTS_VERSIONS),
    ):
        faulty = [row[0] for row in rows if "present" in [row[column] for column in columns]]
        versions = [version for row in faulty for version in re.findall(r"[\d.]+", row)]
        assert told == f"{versions[0]} to {versions[-1]}"


def test_the_plugin_is_asked_for_where_it_is_needed(finished: Path) -> None:
    facts, setting = read_run(opened(finished)), Setting(model="me/model", source="s", gpus=[4, 2, 1])
    usual = section(model_card(facts, setting), "Serving")
    assert f"\n{serve_command('me/model', 4)}\n" in usual and "1, 2, 4 GPUs" in usual
    assert "no plugin is needed to load it" in usual and SCALES_VERSIONS in usual and ASSERTION_VERSIONS not in usual
    other = section(model_card(facts, replace(setting, family="qwen3_moe")), "Serving")
    assert f"vLLM {LOADER_VERSIONS['qwen3_moe']} never use calibrated KV scales" in other
    recipe = facts.recipe | {"restore": {"attention_activations": "none"}}
    recipe["awq"] = recipe["awq"] | {"kv_cache_scheme": None}
    special = section(model_card(replace(facts, recipe=recipe), setting), "Serving")
    assert f"{ASSERTION_VERSIONS} refuse to load it" in special
    assert SCALES_VERSIONS not in special and "kv_cache_scheme" not in special


def test_of_an_older_result_the_card_says_how_its_experts_are_named(finished_copy: Path) -> None:
    """It has the hub's names alone, as by default once; vLLM and sglang ask for others. The recipe says both now."""

    def told() -> tuple[str, str]:
        card = render(opened(finished_copy))
        block = re.search(r"```yaml\n(.*?)\n```", card, re.DOTALL)
        assert block
        return section(card, "Serving"), yaml.safe_load(block[1])["restore"]["expert_targets"]

    serving, names = told()
    assert names == "both" and "no plugin is needed to load it" in serving and EXPERTS_VERSIONS not in serving
    run_stages(opened(finished_copy, **{"restore.expert_targets": "hub"}), ["restore"], restart=True)
    serving, names = told()
    assert names == "hub" and "no plugin is needed" not in serving
    assert f"vLLM {EXPERTS_VERSIONS} does not find them without the plugin in mmq, sglang not at all" in serving
    # docs/serving.md says how one is mended by hand.
    target = r"re:.*experts\.\d+\.(down_proj|gate_proj|up_proj)$"
    path = finished_copy / "run/hybrid/config.json"
    edit_json(path, lambda config: config["quantization_config"]["config_groups"]["group_0"]["targets"].append(target))
    assert target.removeprefix("re:") in (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    assert told()[1] == "both" and not verify_checkpoint(opened(finished_copy)).problems


def test_no_card_before_the_end(project: Path) -> None:
    assert write_card(opened(project)) is None
    run_stages(opened(project), ["dequant"])
    assert write_card(opened(project)) is None
    assert not (project / "run/hybrid").exists()


def test_mmq_report_writes_the_card(finished_copy: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(finished_copy / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    path = finished_copy / "run/hybrid/README.md"
    assert f"model card: {path}\n" in result.output
    assert path.read_text(encoding="utf-8") == render(opened(finished_copy))
    path.unlink()
    shutil.rmtree(finished_copy / "source")
    assert write_card(opened(finished_copy)) is None and not path.exists()


def test_the_card_is_no_part_of_the_checkpoint(finished_copy: Path, finished: Path) -> None:
    """verify takes it, a finished stage leaves it, a stage begun anew removes it."""
    hybrid = finished_copy / "run/hybrid"
    (finished_copy / "source/README.md").write_text(SOURCE_CARD, encoding="utf-8")
    assert verify_checkpoint(opened(finished_copy)).problems == []
    path = write_card(opened(finished_copy))
    assert path == hybrid / "README.md"
    text = path.read_text(encoding="utf-8")
    assert "Their card" not in text and text == render(opened(finished_copy))
    assert verify_checkpoint(opened(finished_copy)).problems == []
    assert write_card(opened(finished_copy)) == path
    assert path.read_text(encoding="utf-8") == text, "a card written again is the same"
    run_stages(opened(finished_copy), ["restore"])
    assert path.read_text(encoding="utf-8") == text
    run_stages(opened(finished_copy), ["restore"], restart=True)
    assert digests(hybrid) == digests(finished / "run/hybrid")
