"""Sets on the hub, for which local folders stand in here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from cli.test_cli import refused, succeed
from mmq.errors import CalibrationError
from source.conftest import MIX, WINDOW, Row, chat, described, kept, rows, texts, tokens_of, write_jsonl, write_sources


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_set_is_streamed_with_what_the_recipe_pins(project: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = project / "set"
    write_jsonl(folder / "test.jsonl", rows(60))
    if form == "parquet":
        datasets.Dataset.from_list(rows(60)).to_parquet(str(folder / "test.parquet"))
        (folder / "test.jsonl").unlink()
    calls = []
    original = datasets.load_dataset

    def spy(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        return original(*arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", spy)
    source = {"hub": "set", "split": "test", "revision": "v1", "column": "body", "samples": 7, "seed": 3}
    recipe = write_sources(project, source)
    found = texts(recipe)
    assert calls == [((str(folder), None), {"split": "test", "revision": "v1", "streaming": True})]
    assert len(set(found)) == 7
    # The stream's own shuffle, called here without mmq.
    wanted = original(str(folder), split="test", streaming=True).shuffle(seed=3).take(7)
    tokenizer = AutoTokenizer.from_pretrained(project / "source")
    assert found == [tokenizer.decode(tokenizer(row["body"])["input_ids"][:WINDOW]) for row in wanted]
    (entry,) = described(recipe)["sources"]
    assert {key: entry[key] for key in source} == source
    assert sum(entry["languages"].values()) == 7


def test_the_seed_decides_which_samples_come(hub: Path) -> None:
    def taken(seed: int) -> list[str]:
        return texts(write_sources(hub, {"hub": "set", "column": "body", "samples": 6, "seed": seed}))

    assert taken(0) == taken(0)
    assert taken(0) != taken(1)


FILTERS: list[tuple[Row, Callable[[Row], bool]]] = [
    ({"kind": "code"}, lambda row: row["kind"] == "code"),
    ({"good": True}, lambda row: row["good"]),
    ({"stars": 1}, lambda row: row["stars"] == 1),
    (
        {"kind": "verse", "good": False, "language": "en"},
        lambda row: row["kind"] == "verse" and not row["good"] and row["language"] == "en",
    ),
]


@pytest.mark.parametrize(("wanted", "formula"), FILTERS)
def test_a_filter_leaves_only_its_rows(hub: Path, wanted: Row, formula: Callable[[Row], bool]) -> None:
    matching = [row for row in rows(60) if formula(row)]
    source = {"hub": "set", "column": "body", "filter": wanted}
    found = texts(write_sources(hub, source | {"samples": len(matching)}, window=200))
    assert Counter(found) == Counter(row["body"] for row in matching)
    message = refused("calibration", write_sources(hub, source | {"samples": len(matching) + 1}))
    assert f"has {len(matching)} samples with " in message
    assert f"the recipe asks for {len(matching) + 1}" in message


@pytest.mark.parametrize("wanted", [{"good": 1}, {"stars": True}, {"kind": "Code"}, {"stars": "1"}, {"kind": None}])
def test_a_filter_wants_the_value_itself(hub: Path, wanted: Row) -> None:
    """Python's True is 1; a recipe's isn't."""
    recipe = write_sources(hub, {"hub": "set", "column": "body", "samples": 1, "filter": wanted})
    assert "has 0 samples with " in refused("calibration", recipe)


@pytest.mark.parametrize("wanted", [{"kind": ["code", "prose"]}, {"kind": {"is": "code"}}, "kind == 'code'", ["kind"]])
def test_a_filter_is_data(hub: Path, wanted: Any) -> None:
    recipe = write_sources(hub, {"hub": "set", "samples": 1, "filter": wanted})
    assert "filter" in refused("calibration", recipe)


def test_files_and_sets_are_mixed_by_count_in_the_recipes_order(hub: Path) -> None:
    write_jsonl(hub / "mix.jsonl", MIX)
    recipe = write_sources(
        hub,
        {"hub": "set", "column": "turns", "samples": 4},
        {"path": "mix.jsonl", "samples": 2},
        {"hub": "set", "column": "body", "samples": 3, "seed": 5},
    )
    found = described(recipe)
    assert [(entry["samples"], entry["chat"]) for entry in found["sources"]] == [(4, 4), (2, 1), (3, 0)]
    assert found["total"]["samples"] == 9
    said = texts(recipe)
    assert all(text.startswith("]~b]user\nask ") for text in said[:4])
    assert said[4] == MIX[0]["text"]
    assert all(text.startswith("row ") for text in said[6:])


CHATS = [
    {"messages": chat("one", "two"), "language": "en"},
    {
        "messages": [
            {"role": "user", "content": "call it"},
            {"role": "assistant", "content": "now", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        ],
        "language": "en",
    },
    {"messages": chat("three", "four"), "language": "de"},
]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("column", [None, "messages"])
def test_chats_of_a_set_are_as_those_of_a_file(project: Path, form: str, column: str | None) -> None:
    """A table's rows hold every field of every row, null where a row has none; the template must not see them."""
    write_jsonl(project / "chats.jsonl", CHATS)
    (project / "set").mkdir()
    if form == "parquet":
        datasets.Dataset.from_list(CHATS).to_parquet(str(project / "set" / "train.parquet"))
    else:
        write_jsonl(project / "set" / "train.jsonl", CHATS)
    template = "{%- for message in messages -%}{{ message | tojson }}{%- endfor -%}"
    (project / "source" / "chat_template.jinja").write_text(template, encoding="utf-8")
    of_file = texts(write_sources(project, {"path": "chats.jsonl"}, window=500))
    recipe = write_sources(project, {"hub": "set", "column": column, "samples": 3}, window=500)
    assert Counter(texts(recipe)) == Counter(of_file)
    assert "null" not in "".join(of_file)
    assert described(recipe)["total"]["languages"] == {"en": 2, "de": 1}


REFUSED: dict[str, tuple[Row, str]] = {
    "too many": ({"hub": "set", "column": "body", "samples": 61}, "has 60 samples, the recipe asks for 61"),
    "no such column": ({"hub": "set", "column": "words", "samples": 2}, "has no column words; its columns are body"),
    "no such filter column": (
        {"hub": "set", "column": "body", "samples": 2, "filter": {"colour": "red"}},
        "has no column colour",
    ),
    "neither text nor messages": ({"hub": "set", "samples": 2}, "set sample 1 has no text"),
    "a column of numbers": ({"hub": "set", "column": "stars", "samples": 2}, "set sample 1 has no text"),
    "no such split": ({"hub": "set", "column": "body", "split": "nope", "samples": 2}, "the dataset set can't be read"),
    "garbage": ({"hub": "garbage", "samples": 2}, "the dataset garbage can't be read"),
    "empty": ({"hub": "nothing", "samples": 2}, "the dataset nothing can't be read"),
    "nowhere": ({"hub": "owner/nowhere", "samples": 2}, "the dataset owner/nowhere can't be read"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_set_that_does_not_do_is_refused(hub: Path, fault: str) -> None:
    (hub / "garbage").mkdir()
    (hub / "garbage" / "train.jsonl").write_text("garbage\n", encoding="utf-8")
    (hub / "nothing").mkdir()
    source, message = REFUSED[fault]
    recipe = write_sources(hub, source)
    assert message in refused("calibration", recipe)
    with pytest.raises(CalibrationError):
        tokens_of(recipe)
    assert kept(hub) == []


def test_a_set_without_a_revision_is_pointed_out(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is pinned by its files; an id on the hub by its revision alone."""
    original = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *rest, **options: original(str(hub / "set"), **options))
    source = {"hub": "owner/set", "column": "body", "samples": 2}
    assert "owner/set names no revision" in succeed("calibration", write_sources(hub, source))
    assert "names no revision" not in succeed("calibration", write_sources(hub, source | {"revision": "abc"}))
    assert "names no revision" not in succeed("calibration", write_sources(hub, source | {"hub": "set"}))
