"""The documentation: links lead somewhere, and the messages in docs/my-model.md are those that users see."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.test_cli import cli, succeed
from conftest import ROOT, edit_json
from mmq.workdir.lock import lock

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MY_MODEL = (ROOT / "docs/my-model.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'(?:src|href)="([^"#]+)"', text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert all(f"]({page.name})" in index for page in (ROOT / "docs").glob("*.md") if page.name != "README.md")


def test_pictures_are_small() -> None:
    for path in (ROOT / "docs").iterdir():
        if path.suffix in (".png", ".svg"):
            assert path.stat().st_size < 300_000, path.name


def said(*arguments: object) -> str:
    result = cli(*arguments)
    assert result.exit_code in (1, 2), result.output
    return result.stderr.removeprefix("error: ").replace("\n", " ").strip()


def messages(project: Path, finished: Path) -> Iterator[str]:
    """What goes wrong on the way that the page describes, in its order."""
    recipe, done = project / "recipe.yaml", finished / "recipe.yaml"
    config = project / "source/config.json"
    whole = config.read_text(encoding="utf-8")
    edit_json(config, lambda content: content.update(model_type="other", architectures=["Other"]))
    yield said("plan", recipe)
    config.write_text(whole, encoding="utf-8")
    edit_json(config, lambda content: content["quantization_config"].update(quant_method="gptq"))
    yield said("plan", recipe)
    config.write_text(whole, encoding="utf-8")
    yield said("plan", recipe, "--set", "model.source=./nowhere")
    yield said("plan", recipe, "--gpus", "many")
    yield said("plan", recipe, "--set", "awq.n_gird=4")
    yield said("plan", recipe, "--set", "awq.group_size=100")
    yield said("plan", recipe, "--set", "awq.calibration.files=[{path: builtin:cod}]")
    yield said("calibration", recipe, "--set", "awq.calibration.files=[{path: mine.jsonl}]")
    yield said("calibration", recipe, "--set", "awq.calibration.files=[{path: samples.jsonl, samples: 99}]")
    with lock(finished / "run"):
        yield said("run", done)
    yield said("awq", done, "--set", "awq.n_grid=7")
    yield said("awq", recipe)
    yield said("verify", recipe)
    shard = next((finished / "run/hybrid").glob("*.safetensors"))
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-1])
    yield said("verify", done)
    shard.unlink()
    yield said("run", done)
    shard.write_bytes(kept)
    succeed("verify", done, "--quiet")
    succeed("clean", done, "--yes")
    yield said("restore", done, "--restart")


def test_the_messages_of_the_page_are_those_that_are_said(
    project: Path, finished_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each template of the page fits a message, and each message has a template."""
    templates = re.findall(r"^\| `(.*?)` \|", MY_MODEL, re.MULTILINE)
    patterns = {text: re.compile(".*".join(map(re.escape, text.split("...")))) for text in templates}
    found = list(messages(project, finished_copy))
    with monkeypatch.context() as small:
        small.setattr("mmq.stages.base.total_host", lambda: 2**29)
        found.append(said("awq", project / "recipe.yaml", "--set", "awq.source=fp8"))
    monkeypatch.setattr("mmq.stages.base.free_disk", lambda _: 10)
    monkeypatch.setattr("mmq.stages.preflight.free_disk", lambda _: 10)
    found += [said(command, project / "recipe.yaml") for command in ("dequant", "run")]
    longest = "awq.calibration.sequence_length=100000"
    found.append(said("awq", project / "recipe.yaml", "--set", "awq.source=fp8", "--set", longest))
    unsaid = [text for text, pattern in patterns.items() if not any(pattern.fullmatch(message) for message in found)]
    assert not unsaid, json.dumps(found, indent=1)
    undocumented = [message for message in found if not any(p.fullmatch(message) for p in patterns.values())]
    assert not undocumented
