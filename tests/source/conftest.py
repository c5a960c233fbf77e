"""Calibration's samples for tests, and sets on the hub, for which local folders stand in here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from cli.test_cli import events, succeed
from conftest import write_recipe
from mmq.recipe import load
from mmq.source.calibration import load_tokens
from mmq.source.tokens import Tokens

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


MIX = [
    {"text": "a few words", "language": "English"},
    {"messages": chat("def route(tokens)", "return experts " * 60), "language": "python"},
    {"text": "viele Wörter " * 40, "language": "Deutsch"},
    {"messages": chat("again", "yes"), "language": "python"},
    {"text": "no language is named"},
]


@pytest.fixture(autouse=True)
def short_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` gives pyarrow's threads five seconds to end after a streamed parquet file."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


@pytest.fixture
def hub(project: Path) -> Path:
    """A project with a dataset of 60 rows in `set`, which a recipe names as it would one on the hub."""
    write_jsonl(project / "set" / "train.jsonl", rows(60))
    return project


def write_jsonl(path: Path, lines: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


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
