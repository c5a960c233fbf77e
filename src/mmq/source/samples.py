"""Calibration samples: read from JSONL files or the hub."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mmq.errors import CalibrationError, one_line
from mmq.recipe import FileSamples, HubSamples, Recipe
from mmq.source.forms import Content

# How many


def most_tokens(recipe: Recipe) -> int:
    """Upper bound of the calibration tokens; lines are counted where the recipe names no number of samples."""
    settings = recipe.awq.calibration
    samples = 0
    for source in settings.files:
        if source.samples is not None:
            samples += source.samples
        elif isinstance(source, FileSamples) and recipe.path(source.path).is_file():
            samples += _count(recipe.path(source.path))
    return samples * settings.sequence_length


def most_fisher_tokens(recipe: Recipe) -> int:
    """At most so many tokens does a gradient go through: whole samples, of which the last may go beyond."""
    if not recipe.awq.weighs_outputs:
        return 0
    return min(most_tokens(recipe), recipe.awq.fisher_tokens + recipe.awq.calibration.sequence_length)


def _count(path: Path) -> int:
    """At most so many samples: lines, or the entries of an array."""
    with open(path, "rb") as file:
        if not (first := next((line for line in file if line.strip()), b"")).lstrip().startswith(b"["):
            return bool(first) + sum(1 for line in file if line.strip())
    try:
        return len(json.loads(path.read_bytes()))
    except (ValueError, RecursionError):
        return 0  # refused once it is read


# Reading


def read_files(recipe: Recipe) -> dict[Path, bytes]:
    """The calibration files, read once, so that what is hashed is what is tokenized."""
    paths = [recipe.path(source.path) for source in recipe.awq.calibration.files if isinstance(source, FileSamples)]
    files = {}
    for path in paths:
        try:
            files[path] = path.read_bytes()
        except FileNotFoundError:
            raise CalibrationError(f"there is no calibration file {path}") from None
        except OSError as error:
            raise CalibrationError(f"the calibration file {path} can't be read: {error}") from None
    return files


def read_samples(recipe: Recipe, files: dict[Path, bytes]) -> Iterator[tuple[int, str, Content]]:
    """All samples in the recipe's order: the index of their source, where they stand, what they hold."""
    for index, source in enumerate(recipe.awq.calibration.files):
        if isinstance(source, HubSamples):
            found = _hub_samples(recipe, source)
        else:
            path = recipe.path(source.path)
            found = _file_samples(path, files[path], source)
        for where, content in found:
            yield index, where, content


def _file_samples(path: Path, data: bytes, source: FileSamples) -> Iterator[tuple[str, Content]]:
    try:
        text = data.decode(_encoding(data))
    except UnicodeDecodeError as error:
        raise CalibrationError(f"the calibration file {path} can't be read: {error}") from None
    found = 0
    for where, sample in _parsed(path, text):
        if found == source.samples:
            break
        if not isinstance(sample, dict):
            raise CalibrationError(f"{where} is not a JSON object")
        found += 1
        yield where, sample
    if not found:
        raise CalibrationError(f"the calibration file {path} is empty")
    if source.samples and found < source.samples:
        raise CalibrationError(f"the calibration file {path} has {found} samples, the recipe asks for {source.samples}")


def _parsed(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """A line each, or where the file is one JSON array, its entries."""
    if text.lstrip().startswith("["):
        entries = _json(str(path), text)
        yield from ((f"{path} sample {number}", entry) for number, entry in enumerate(entries, start=1))
        return
    # Only a newline ends a line: JSON strings may hold Unicode's other line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _json(f"{path}:{number}", line)


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where} is not JSON: {error}") from None


def _encoding(data: bytes) -> str:
    """UTF-8, or what a byte-order mark says, as programs on Windows write it."""
    marks = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    return next((name for mark, name in marks.items() if data.startswith(mark)), "utf-8")


def _hub_samples(recipe: Recipe, source: HubSamples) -> Iterator[tuple[str, Content]]:
    """Streamed: the hub is read only as far as the samples and the shuffle's buffer reach."""
    import datasets

    # What it would log comes as an exception as well.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    folder = recipe.path(source.hub)
    name = str(folder) if folder.is_dir() else source.hub
    try:
        stream = datasets.load_dataset(name, source.name, split=source.split, revision=source.revision, streaming=True)
        seed = recipe.seed if source.seed is None else source.seed
        matching = (sample for sample in stream.shuffle(seed=seed) if _matches(source, sample))
        samples = list(islice(matching, source.samples))
    except CalibrationError:
        raise
    except Exception as error:  # its readers raise whatever their libraries chose
        raise CalibrationError(f"the dataset {source.hub} can't be read: {one_line(error)}") from None
    if len(samples) < source.samples:
        wanted = f" with {_condition(source)}" if source.filter else ""
        raise CalibrationError(
            f"the dataset {source.hub} has {len(samples)} samples{wanted}, the recipe asks for {source.samples}"
        )
    for number, sample in enumerate(samples, start=1):
        yield f"{source.hub} sample {number}", _hub_content(source, sample)


def _matches(source: HubSamples, sample: Content) -> bool:
    """Whether every column of `filter` has its value. True is not 1 here."""
    return all(
        _column(source, sample, column) == value and isinstance(sample[column], bool) == isinstance(value, bool)
        for column, value in (source.filter or {}).items()
    )


def _condition(source: HubSamples) -> str:
    return " and ".join(f"{column} = {value!r}" for column, value in (source.filter or {}).items())


def _hub_content(source: HubSamples, sample: Content) -> Content:
    """A row as a sample, or the chosen column alone under the name that its type asks for.

    A table gives every message all fields that any message has, null where it has none; templates ask for them.
    """
    if not source.column:
        return {key: _without_nulls(value) for key, value in sample.items() if value is not None}
    value = _without_nulls(_column(source, sample, source.column))
    return {"language": sample.get("language"), "text" if isinstance(value, str) else "messages": value}


def _column(source: HubSamples, sample: Content, column: str) -> Any:
    if column not in sample:
        raise CalibrationError(
            f"the dataset {source.hub} has no column {column}; its columns are {', '.join(map(str, sample))}"
        )
    return sample[column]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
