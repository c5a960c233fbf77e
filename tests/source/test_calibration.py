"""Calibration: what samples become, the kept tokens, and sets on the hub, for which local folders stand in here."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from cli.test_cli import events, refused, succeed
from conftest import SAMPLES, digests, edit_json, write_recipe
from mmq.errors import CalibrationError, MmqError
from mmq.quantize.layer import LayerQuantizer
from mmq.recipe import load
from mmq.run.lock import lock
from mmq.source.tokens import Tokens, load_tokens

WINDOW = 40
KINDS = ("prose", "code", "verse")
Row = dict[str, Any]


def chat(question: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rows(count: int) -> list[Row]:
    """Rows of a dataset, each with its number in its text, a chat, and columns to filter by."""
    return [
        {
            "body": f"row {number} " * (number % 7 + 1),
            "turns": chat(f"ask {number}", f"answer {number}"),
            "kind": KINDS[number % 3],
            "good": number % 2 == 0,
            "stars": number % 5,
            "language": "en" if number % 4 else "de",
        }
        for number in range(count)
    ]


def write_jsonl(path: Path, lines: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def short_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` gives pyarrow's threads five seconds to end after a streamed parquet file."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


@pytest.fixture
def hub(project: Path) -> Path:
    """A project with a dataset of 60 rows in `set`, which a recipe names as it would one on the hub."""
    write_jsonl(project / "set" / "train.jsonl", rows(60))
    return project


def write_sources(project: Path, *sources: Row, window: int = WINDOW) -> Path:
    return write_recipe(project, source="fp8", calibration={"files": list(sources), "sequence_length": window})


def tokens_of(recipe: Path, cache: bool = False) -> Tokens:
    loaded = load(recipe)
    return load_tokens(loaded, recipe.parent / "source", loaded.work_path / "state" / "calibration" if cache else None)


def texts(recipe: Path) -> list[str]:
    """What the kept tokens of each sample say."""
    tokens = tokens_of(recipe)
    tokenizer = AutoTokenizer.from_pretrained(recipe.parent / "source")
    return [tokenizer.decode(part) for part in torch.split(tokens.ids, tokens.lengths)]


def kept(project: Path) -> list[Path]:
    return sorted((project / "run" / "state" / "calibration").glob("*"))


def described(recipe: Path, *options: str) -> dict[str, Any]:
    (event,) = events(succeed("calibration", recipe, "--json", *options))
    return event


def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a tokenizer nor a dataset can be had."""

    def gone(*_: object, **__: object) -> None:
        raise OSError("gone")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", gone)
    monkeypatch.setattr(datasets, "load_dataset", gone)


# What the mix becomes


MIX = [
    {"text": "a few words", "language": "English"},
    {"messages": chat("def route(tokens)", "return experts " * 60), "language": "python"},
    {"text": "viele Wörter " * 40, "language": "Deutsch"},
    {"messages": chat("again", "yes"), "language": "python"},
    {"text": "no language is named"},
]


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
    assert "2 chat + 3 text" in output
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


# The kept tokens


def test_the_command_and_awq_keep_the_same_and_use_each_others(
    project: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = described(project / "recipe.yaml")
    (path,) = kept(project)
    assert found["kept_in"] == str(path)
    assert path.name == f"{found['inputs_fingerprint']}.safetensors"
    assert digests(path.parent) == digests(kept(finished)[0].parent)
    no_library(monkeypatch)
    again = described(project / "recipe.yaml")
    assert again == found | {"reused": True}
    succeed("awq", project / "recipe.yaml", "--quiet", "--set", "awq.source=fp8")
    assert digests(project / "run" / "awq") == digests(finished / "run" / "awq")
    journal = json.loads((project / "run" / "journal.json").read_text(encoding="utf-8"))
    assert journal["stages"]["awq"]["fingerprint"]["awq.calibration"] == found["tokens_fingerprint"]


def test_a_resumed_stage_needs_neither_the_hub_nor_the_tokenizer(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_sources(hub, {"hub": "set", "column": "body", "samples": 9}, {"path": "samples.jsonl", "samples": 2})
    quantize = LayerQuantizer.quantize

    def stop(self: LayerQuantizer, layer: int, *rest: Any) -> Any:
        if layer == 1:
            raise MmqError("stopped here")
        return quantize(self, layer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(LayerQuantizer, "quantize", stop)
        assert refused("awq", recipe, "--quiet") == "stopped here"
    journal = json.loads((hub / "run" / "journal.json").read_text(encoding="utf-8"))
    assert list(journal["stages"]["awq"]["units"]) == ["layer-00000"]
    no_library(monkeypatch)
    succeed("awq", recipe, "--quiet")
    assert "awq is complete" in succeed("awq", recipe)


def test_other_inputs_are_noticed_in_spite_of_the_kept_tokens(finished_copy: Path) -> None:
    recipe = finished_copy / "recipe.yaml"
    assert "complete" in succeed("awq", recipe)
    template = finished_copy / "source" / "chat_template.jinja"
    before = template.read_text(encoding="utf-8")
    template.write_text("{{ 'Well:' }}" + before, encoding="utf-8")
    assert "awq.calibration" in refused("awq", recipe)
    template.write_text(before, encoding="utf-8")
    (finished_copy / "samples.jsonl").unlink()
    assert "there is no calibration file" in refused("awq", recipe)


def test_a_dry_run_keeps_nothing(project: Path) -> None:
    succeed("run", project / "recipe.yaml", "--dry-run")
    tokens_of(project / "recipe.yaml", cache=True)
    assert not (project / "run").exists()


def test_a_refused_recipe_keeps_nothing(project: Path) -> None:
    (project / "samples.jsonl").write_text("words\n", encoding="utf-8")
    assert "samples.jsonl:1 is not JSON" in refused("calibration", project / "recipe.yaml")
    assert not (project / "run").exists()


def change_file(name: str) -> Callable[[Path], Any]:
    """Add a space to a file's end: the tokens may stay, the input is another one."""

    def change(project: Path) -> None:
        path = project / name
        path.write_bytes(path.read_bytes() + b" ")

    return change


def change_recipe(change: Callable[[Row], Any]) -> Callable[[Path], Any]:
    """Change the calibration section."""

    def apply(project: Path) -> None:
        content = yaml.safe_load((project / "recipe.yaml").read_text(encoding="utf-8"))
        change(content["awq"]["calibration"])
        (project / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")

    return apply


def change_hub(**values: Any) -> Callable[[Path], Any]:
    return change_recipe(lambda section: section["files"][1].update(values))


OTHERS: dict[str, Callable[[Path], Any]] = {
    "sequence_length": change_recipe(lambda section: section.update(sequence_length=WINDOW + 1)),
    "samples": change_recipe(lambda section: section["files"][0].update(samples=4)),
    "order": change_recipe(lambda section: section["files"].reverse()),
    "file": change_file("samples.jsonl"),
    "tokenizer": change_file("source/tokenizer.json"),
    "tokenizer config": lambda project: edit_json(
        project / "source" / "tokenizer_config.json", lambda config: config.update(padding_side="left")
    ),
    "chat template": change_file("source/chat_template.jinja"),
    "named template": lambda project: (
        (project / "source/additional_chat_templates").mkdir(),
        (project / "source/additional_chat_templates/tool_use.jinja").write_text("x", encoding="utf-8"),
    ),
    "hub samples": change_hub(samples=6),
    "split": change_hub(split="train[:50%]"),
    "column": change_hub(column="turns"),
    "filter": change_hub(filter={"kind": "code"}),
    "seed": change_hub(seed=1),
    "revision": change_hub(revision="main"),
    "folder": change_file("set/train.jsonl"),
}
SAME: dict[str, Callable[[Path], Any]] = {
    "readme": lambda project: (project / "source" / "README.md").write_text("words", encoding="utf-8"),
    "search": lambda project: write_recipe_field(project, "n_grid", 5),
}


def write_recipe_field(project: Path, key: str, value: Any) -> None:
    content = yaml.safe_load((project / "recipe.yaml").read_text(encoding="utf-8"))
    content["awq"][key] = value
    (project / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.mark.parametrize("name", [*OTHERS, *SAME])
def test_what_the_kept_tokens_depend_on(hub: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_sources(
        hub, {"path": "samples.jsonl", "samples": 3}, {"hub": "set", "column": "body", "samples": 5, "seed": 0}
    )
    assert described(recipe)["reused"] is False
    no_library(monkeypatch)
    assert described(recipe)["reused"] is True
    (OTHERS | SAME)[name](hub)
    if name in SAME:
        assert described(recipe)["reused"] is True
    else:
        assert "gone" in refused("calibration", recipe)
    assert len(kept(hub)) == 1


def flip(at: float) -> Callable[[bytes], bytes]:
    """Change one byte, a share of the length from the front."""

    def change(data: bytes) -> bytes:
        position = int(at * (len(data) - 1))
        return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]

    return change


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "garbage": lambda data: b"garbage",
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "no content": lambda data: (2).to_bytes(8, "little") + b"{}",
} | {f"byte at {at:.0%}": flip(at) for at in (0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1)}


def test_damaged_kept_tokens_are_made_anew(project: Path) -> None:
    recipe = project / "recipe.yaml"
    found = described(recipe)
    (path,) = kept(project)
    whole = path.read_bytes()
    for name, damage in DAMAGES.items():
        path.write_bytes(damage(whole))
        assert described(recipe) == found, name
        assert path.read_bytes() == whole
    path.write_bytes(flip(0.5)(whole))
    succeed("awq", recipe, "--quiet", "--set", "awq.source=fp8")
    assert path.read_bytes() == whole


def test_a_folder_in_the_place_of_kept_tokens_is_no_traceback(project: Path) -> None:
    described(project / "recipe.yaml")
    (path,) = kept(project)
    path.unlink()
    path.mkdir()
    assert str(path.name) in refused("calibration", project / "recipe.yaml")


def test_kept_tokens_of_other_inputs_are_not_taken(project: Path) -> None:
    """A file under a name that isn't its own, as a copying hand leaves it."""
    recipe = project / "recipe.yaml"
    described(recipe)
    (first,) = kept(project)
    other = described(recipe, "--set", "awq.calibration.sequence_length=20")
    second = Path(other["kept_in"])
    second.write_bytes(first.read_bytes())
    assert described(recipe, "--set", "awq.calibration.sequence_length=20") == other


def test_tokens_are_kept_whole_or_not_at_all(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = project / "recipe.yaml"
    (project / "run/state/calibration").mkdir(parents=True)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "the disk is full" in refused("calibration", recipe)
    assert kept(project) == []
    (project / "run/state/calibration/killed.safetensors.mmq-tmp").write_bytes(b"half")
    described(recipe)
    assert [path.suffix for path in kept(project)] == [".safetensors"]


def test_beside_a_run_the_command_describes_and_keeps_nothing(project: Path) -> None:
    with lock(project / "run"):
        found = described(project / "recipe.yaml")
        assert "another process is at work" in succeed("calibration", project / "recipe.yaml")
    assert found["total"]["samples"] == SAMPLES
    assert found["kept_in"] is None
    assert kept(project) == []


# Sets on the hub


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
