"""Calibration tokens: samples from JSONL files or the hub, through the model's own chat template and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from mmq.errors import CalibrationError, one_line
from mmq.recipe import Calibration, FileSamples, HubSamples, Recipe


@dataclass(frozen=True)
class Tokens:
    """Tokenized samples, concatenated.

    Attributes:
        ids: int64 [T].
        lengths: tokens of each sample; they sum to T.
    """

    ids: torch.Tensor
    lengths: list[int]

    def fingerprint(self) -> str:
        hasher = xxhash.xxh3_128(self.ids.numpy().tobytes())
        hasher.update(json.dumps(self.lengths).encode())
        return hasher.hexdigest()


def load_tokens(recipe: Recipe, tokenizer_folder: Path) -> Tokens:
    """Read, render and tokenize the recipe's calibration samples; each is cut to `sequence_length` tokens.

    Raises:
        CalibrationError: a file is missing or empty, has fewer samples than asked for, or a sample has no text.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever a damaged file leads to
        raise CalibrationError(
            f"{tokenizer_folder} holds no tokenizer that loads without remote code: {one_line(error)}"
        ) from None
    settings = recipe.awq.calibration
    samples = [list(_encode(tokenizer, where, sample, settings)) for where, sample in _samples(recipe, settings)]
    ids = torch.tensor([token for sample in samples for token in sample], dtype=torch.int64)
    return Tokens(ids, [len(sample) for sample in samples])


def _samples(recipe: Recipe, settings: Calibration) -> Iterator[tuple[str, dict[str, Any]]]:
    for source in settings.files:
        if isinstance(source, HubSamples):
            yield from _hub_samples(source)
        else:
            yield from _file_samples(recipe.path(source.path), source)


def _file_samples(path: Path, source: FileSamples) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise CalibrationError(f"there is no calibration file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"the calibration file {path} can't be read: {error}") from None
    found = 0
    for number, line in enumerate(lines, start=1):
        if found == source.samples:
            break
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(sample, dict):
            raise CalibrationError(f"{path}:{number} is not a JSON object")
        found += 1
        yield f"{path}:{number}", sample
    if not found:
        raise CalibrationError(f"the calibration file {path} is empty")
    if source.samples and found < source.samples:
        raise CalibrationError(f"the calibration file {path} has {found} samples, the recipe asks for {source.samples}")


def _hub_samples(source: HubSamples) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        stream = datasets.load_dataset(
            source.hub, source.name, split=source.split, revision=source.revision, streaming=True
        )
        found = 0
        for sample in stream.shuffle(seed=source.seed).take(source.samples):
            found += 1
            if source.column:
                value = sample.get(source.column)
                sample = {"messages" if isinstance(value, list) else "text": value}
            yield f"{source.hub} sample {found}", sample
    except (OSError, ValueError, ConnectionError) as error:
        raise CalibrationError(f"the dataset {source.hub} can't be read: {one_line(error)}") from None
    if found < source.samples:
        raise CalibrationError(f"the dataset {source.hub} has {found} samples, the recipe asks for {source.samples}")


def _encode(tokenizer: Any, where: str, sample: dict[str, Any], settings: Calibration) -> list[int]:
    messages, text = sample.get("messages"), sample.get("text")
    if isinstance(messages, list) and messages:
        if not all(isinstance(message, dict) and message.get("role") for message in messages):
            raise CalibrationError(f"{where}: every message must be an object with a role")
        if not tokenizer.chat_template:
            raise CalibrationError(f"{where} has messages, but the tokenizer has no chat template")
        tools = sample.get("tools") or None
        try:
            rendered = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        except Exception as error:  # templates raise whatever their author chose
            raise CalibrationError(f"{where}: the chat template refuses it: {one_line(error)}") from None
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    elif isinstance(text, str) and text.strip():
        ids = tokenizer(text)["input_ids"]
    else:
        raise CalibrationError(f'{where} has no text: a sample is {{"text": ...}} or {{"messages": [...]}}')
    if not ids:
        raise CalibrationError(f"{where} has no tokens")
    return list(ids[: settings.sequence_length])
