"""What the recipe's mix of samples becomes."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cli.test_cli import refused, succeed
from source.conftest import MIX, WINDOW, described, kept, texts, write_jsonl, write_sources


def test_the_description_is_what_the_tokenizer_says(project: Path) -> None:
    """Every figure again, by the tokenizer alone and the template written out."""
    write_jsonl(project / "mix.jsonl", MIX)
    recipe = write_sources(project, {"path": "samples.jsonl", "samples": 3}, {"path": "mix.jsonl"})
    tokenizer = AutoTokenizer.from_pretrained(project / "source")
    rendered = [
        "".join(f"]~b]{m['role']}\n{m['content']}[e~[" for m in row["messages"]) if "messages" in row else row["text"]
        for row in MIX
    ]
    whole = [len(tokenizer(text)["input_ids"]) for text in rendered]
    counted = [min(length, WINDOW) for length in whole]
    assert max(whole) > WINDOW > min(whole)
    found = described(recipe)
    first, second = found["sources"]
    assert second["samples"] == 5
    assert second["tokens"] == sum(counted)
    assert second["tokens_cut"] == sum(whole) - sum(counted)
    assert second["samples_cut"] == sum(length > WINDOW for length in whole)
    assert second["filled_mean"] == pytest.approx(sum(counted) / 5 / WINDOW)
    assert second["filled_min"] == min(counted) / WINDOW
    assert (second["chat"], second["text"]) == (2, 3)
    assert second["languages"] == {"python": 2, "English": 1, "Deutsch": 1}
    assert (first["kind"], first["path"], first["samples"]) == ("file", "samples.jsonl", 3)
    assert (first["chat"], first["text"], first["languages"]) == (1, 2, {})
    for key in ("samples", "chat", "text", "tokens", "tokens_cut", "samples_cut"):
        assert found["total"][key] == first[key] + second[key]
    assert found["total"]["filled_min"] == min(first["filled_min"], second["filled_min"])
    assert found["packing"] is found["padding"] is False


def test_each_sample_is_a_sequence_of_its_own_through_the_models_template(project: Path) -> None:
    write_jsonl(project / "mix.jsonl", [MIX[3], MIX[0]])
    recipe = write_sources(project, {"path": "mix.jsonl"})
    assert texts(recipe) == ["]~b]user\nagain[e~[]~b]assistant\nyes[e~[", "a few words"]


def test_people_get_a_table_and_are_told_that_nothing_is_packed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    write_jsonl(project / "mix.jsonl", MIX)
    recipe = write_sources(project, {"path": "mix.jsonl"})
    output = succeed("calibration", recipe)
    assert "3 text + 2 messages" in output
    assert "python 2, English 1, Deutsch 1" in output
    assert "2 of 5 samples are longer than sequence_length = 40" in output
    assert "never packed or padded" in output
    assert f"tokens kept in {kept(project)[0]}" in output
    assert f"tokens from {kept(project)[0]}" in succeed("calibration", recipe)
    assert "mix.jsonl" in succeed("calibration", recipe, "--set", "awq.calibration.sequence_length=9000")


@pytest.mark.parametrize("source", ["./nothing", "owner/nothing"])
def test_a_source_that_is_nowhere_is_refused(project: Path, source: str) -> None:
    message = refused("calibration", project / "recipe.yaml", "--set", f"model.source={source}")
    assert "model.source" in message
    assert not (project / "run").exists()
