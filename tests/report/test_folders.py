"""`mmq clean`: what it shows, what it removes and when, and that nothing that comes after breaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.test_cli import cli, events, refused, succeed
from conftest import digests
from mmq.cli.app import app
from mmq.workdir.lock import lock


@pytest.fixture
def verified(finished_copy: Path) -> Path:
    """The recipe of a finished and verified project, to do anything with."""
    succeed("verify", finished_copy / "recipe.yaml", "--quiet")
    return finished_copy / "recipe.yaml"


def folders(recipe: Path) -> dict[str, dict[str, Any]]:
    (found,) = events(succeed("clean", recipe, "--json"))
    assert found["removed"] == []
    return {entry["name"]: entry for entry in found["folders"]}


def present(recipe: Path) -> set[str]:
    return {path.name for path in (recipe.parent / "run").iterdir() if path.is_dir()}


def test_it_shows_what_each_folder_holds(verified: Path) -> None:
    before = digests(verified.parent)
    found = folders(verified)
    assert {name for name, entry in found.items() if not entry["kept"]} == {"bf16", "awq"}
    for name, entry in found.items():
        files = [path for path in (verified.parent / "run" / name).rglob("*") if path.is_file()]
        assert (entry["files"], entry["nbytes"]) == (len(files), sum(path.stat().st_size for path in files))
    assert digests(verified.parent) == before


def test_it_asks_first(verified: Path) -> None:
    before = digests(verified.parent)
    result = CliRunner().invoke(app, ["clean", str(verified)], input="n\n")
    assert (result.exit_code, "nothing was removed" in result.stdout) == (0, True)
    # Nobody is there to answer.
    result = CliRunner().invoke(app, ["clean", str(verified)], input="")
    assert result.exit_code == 2
    assert "--yes" in result.stderr
    assert digests(verified.parent) == before
    result = CliRunner().invoke(app, ["clean", str(verified)], input="y\n")
    assert result.exit_code == 0
    assert not present(verified) & {"bf16", "awq"}


def test_nothing_breaks_afterwards(verified: Path) -> None:
    """The result stays what it was; only what needs a removed folder is refused, before anything is begun."""
    run, result = verified.parent / "run", digests(verified.parent / "run/hybrid")
    (removed,) = events(succeed("clean", verified, "--yes", "--json"))
    assert removed["removed"] == ["bf16", "awq"]
    assert not present(verified) & {"bf16", "awq"}
    (status,) = events(succeed("status", verified, "--json"))
    assert status["next"] is None
    assert [(stage["state"], stage["removed"]) for stage in status["stages"]] == [
        ("complete", ["bf16"]), ("complete", ["awq"]), ("complete", []),
    ]  # fmt: skip
    assert "removed by mmq clean: bf16/, awq/" in succeed("status", verified)
    assert "nothing was removed" in succeed("clean", verified)
    shown = succeed("run", verified)
    assert "bf16 was removed by `mmq clean`" in shown
    succeed("verify", verified, "--quiet")
    succeed("report", verified, "--quiet")
    succeed("eval", verified, "--quiet", "--data", verified.parent / "samples.jsonl", "--samples", 2)
    assert {name: digest for name, digest in digests(run / "hybrid").items() if name != "README.md"} == result
    assert not present(verified) & {"bf16", "awq"}
    journal = (run / "journal.json").read_bytes()
    message = refused("restore", verified, "--restart", "--quiet")
    assert message == f"{run / 'awq'} was removed by `mmq clean`; run `mmq awq --restart` to make it anew"
    message = refused("awq", verified, "--restart", "--quiet")
    assert message == f"{run / 'bf16'} was removed by `mmq clean`; run `mmq dequant --restart` to make it anew"
    assert (run / "journal.json").read_bytes() == journal, "a refused restart forgot what was complete"
    # The remedy that the messages name, from the first on; the same result at the end.
    for stage in ("dequant", "awq", "restore"):
        succeed(stage, verified, "--restart", "--quiet")
    assert digests(run / "hybrid") == result
    assert json.loads((run / "journal.json").read_text(encoding="utf-8"))["stages"]["dequant"].get("removed") is None


def test_one_folder_alone(verified: Path) -> None:
    succeed("clean", verified, "--yes", "--only", "bf16")
    assert present(verified) >= {"awq", "hybrid", "state"}
    assert "bf16" not in present(verified)
    assert folders(verified)["awq"]["kept"] == ""


def test_a_folder_on_another_disk(verified: Path, tmp_path: Path) -> None:
    """A link to it: what it points to is emptied as well."""
    folder, elsewhere = verified.parent / "run/bf16", tmp_path / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    assert folders(verified)["bf16"]["nbytes"] > 0
    succeed("clean", verified, "--yes")
    assert not elsewhere.exists()
    assert not folder.is_symlink()


@pytest.mark.parametrize("state", ["unfinished", "not verified", "changed", "wrong"])
def test_nothing_goes_before_the_result_is_verified(finished_copy: Path, state: str) -> None:
    recipe, run = finished_copy / "recipe.yaml", finished_copy / "run"
    if state == "unfinished":
        succeed("restore", recipe, "--restart", "--quiet")
        journal = json.loads((run / "journal.json").read_text(encoding="utf-8"))
        journal["stages"]["restore"]["complete"] = False
        (run / "journal.json").write_text(json.dumps(journal), encoding="utf-8")
    if state in ("changed", "wrong"):
        succeed("verify", recipe, "--quiet")
    if state == "changed":
        (run / "hybrid/config.json").write_text("{}", encoding="utf-8")
    if state == "wrong":
        report = json.loads((run / "verify.json").read_text(encoding="utf-8")) | {"ok": False}
        (run / "verify.json").write_text(json.dumps(report), encoding="utf-8")
    before = digests(run)
    assert "nothing was removed" in succeed("clean", recipe, "--yes")
    assert all(entry["kept"] for entry in folders(recipe).values())
    assert digests(run) == before


def test_a_run_at_work_is_left_alone(verified: Path) -> None:
    with lock(verified.parent / "run"):
        assert "is in use by process" in refused("clean", verified, "--yes")
    assert present(verified) >= {"bf16", "awq"}


def test_where_nothing_was_begun(project: Path) -> None:
    assert "nothing was begun" in refused("clean", project / "recipe.yaml", "--yes")
    assert not (project / "run").exists()
    assert cli("clean", project / "missing.yaml").exit_code == 2
