"""Calibration tokens: samples from JSONL files or the hub, through the model's own chat template and tokenizer.

Samples are never packed or padded: each is a sequence of its own, of at most `sequence_length` tokens. A tokenized set
is kept under a fingerprint of all that it is made from, so that a resumed run needs neither the hub nor the tokenizer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from mmq.errors import CalibrationError, one_line
from mmq.recipe import FileSamples, HubSamples, Recipe
from mmq.storage.atomic import remove_temporaries
from mmq.storage.shards import save_tensors

# What transformers makes a tokenizer from, chat template included; config.json names its class where nothing else does.
TOKENIZER_FILES = (
    "config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "*.tiktoken", "chat_template*", "*.jinja",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
# The kept sets' folder, below the work_dir's state/.
CACHE_NAME = "calibration"
# Of the kept sets: one that another way of reading or encoding has made must not be taken.
FORMAT = 1

Content = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """What became of a sample.

    Attributes:
        source: the index of its source in `calibration.files`.
        tokens: how many are kept.
        cut: how many `sequence_length` cut off.
        chat: messages through the chat template; else plain text.
        language: what the sample says of itself.
    """

    source: int
    tokens: int
    cut: int
    chat: bool
    language: str | None


@dataclass(frozen=True)
class Tokens:
    """Tokenized samples, concatenated.

    Attributes:
        ids: int64 [T].
        samples: one entry a sample; their tokens sum to T.
        inputs: a hash of all that they are made from: recipe, samples, tokenizer, chat template.
        cached: they were kept from an earlier run.
    """

    ids: torch.Tensor
    samples: list[Sample]
    inputs: str
    cached: bool = False

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [sample.tokens for sample in self.samples]

    def fingerprint(self) -> str:
        hasher = xxhash.xxh3_128(self.ids.numpy().tobytes())
        hasher.update(json.dumps(self.lengths).encode())
        return hasher.hexdigest()


def load_tokens(recipe: Recipe, tokenizer_folder: Path, cache: Path | None = None) -> Tokens:
    """The recipe's calibration samples: kept ones where there are any, else read, rendered, tokenized and cut.

    Writes nothing; see `save_tokens`.

    Args:
        cache: the folder of the kept sets.

    Raises:
        CalibrationError: a file is missing or empty, has fewer samples than asked for, or a sample has no text.
    """
    settings = recipe.awq.calibration
    files = _read_files(recipe)
    inputs = _inputs_fingerprint(recipe, files, tokenizer_folder)
    kept = _read_kept(kept_path(cache, inputs), inputs) if cache else None
    if kept is not None:
        return kept
    tokenizer = _tokenizer(tokenizer_folder)
    ids: list[int] = []
    samples = []
    for index, where, content in _contents(recipe, files):
        whole = _encode(tokenizer, where, content)
        part = whole[: settings.sequence_length]
        ids += part
        samples.append(Sample(index, len(part), len(whole) - len(part), _is_chat(content), _language(content)))
    return Tokens(torch.tensor(ids, dtype=torch.int64), samples, inputs)


def save_tokens(tokens: Tokens, cache: Path) -> Tokens:
    """Keep them for the next run, unless they come from there. Only for the holder of the work_dir's lock."""
    if tokens.cached:
        return tokens
    cache.mkdir(parents=True, exist_ok=True)
    remove_temporaries(cache)
    samples = json.dumps([astuple(sample) for sample in tokens.samples], ensure_ascii=False).encode()
    digest = _digest(tokens.inputs, tokens.ids, samples)
    save_tensors(
        kept_path(cache, tokens.inputs),
        {"ids": tokens.ids, "samples": _bytes_tensor(samples), "digest": _bytes_tensor(digest)},
    )
    return replace(tokens, cached=True)


def kept_path(cache: Path, inputs: str) -> Path:
    return cache / f"{inputs}.safetensors"


def describe(recipe: Recipe, tokens: Tokens) -> dict[str, Any]:
    """What each source of the mix becomes, and the whole, as JSON."""
    settings = recipe.awq.calibration
    sources = []
    for index, source in enumerate(settings.files):
        own = [sample for sample in tokens.samples if sample.source == index]
        sources.append(_origin(recipe, source) | _measures(own, settings.sequence_length))
    return {
        "sequence_length": settings.sequence_length,
        "packing": False,
        "padding": False,
        "sources": sources,
        "total": _measures(tokens.samples, settings.sequence_length),
        "tokens_fingerprint": tokens.fingerprint(),
        "inputs_fingerprint": tokens.inputs,
    }


def _origin(recipe: Recipe, source: FileSamples | HubSamples) -> dict[str, Any]:
    if isinstance(source, HubSamples):
        is_folder = recipe.path(source.hub).is_dir()
        return {"kind": "hub", "folder": is_folder} | source.model_dump(exclude={"samples"})
    return {"kind": "file", "path": source.path}


def _measures(samples: list[Sample], window: int) -> dict[str, Any]:
    """Counts, and shares of the window of `sequence_length` tokens that samples fill."""
    filled = [sample.tokens / window for sample in samples]
    languages = Counter(sample.language for sample in samples if sample.language is not None)
    return {
        "samples": len(samples),
        "chat": sum(sample.chat for sample in samples),
        "text": sum(not sample.chat for sample in samples),
        "tokens": sum(sample.tokens for sample in samples),
        "tokens_cut": sum(sample.cut for sample in samples),
        "samples_cut": sum(sample.cut > 0 for sample in samples),
        "filled_mean": sum(filled) / len(filled),
        "filled_min": min(filled),
        "languages": dict(languages.most_common()),
    }


# Inputs and the kept sets


def _read_files(recipe: Recipe) -> dict[Path, bytes]:
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


def _inputs_fingerprint(recipe: Recipe, files: dict[Path, bytes], tokenizer_folder: Path) -> str:
    """A hash of all that decides the tokens: the recipe's section, the samples, the tokenizer with its template."""
    settings = recipe.awq.calibration
    sources: list[Any] = []
    for source in settings.files:
        if isinstance(source, FileSamples):
            sources.append(xxhash.xxh3_128_hexdigest(files[recipe.path(source.path)]))
        else:
            # A set on the hub is what its id and revision say; a folder's files are told by size and time.
            sources.append(_listing(recipe.path(source.hub)))
    tokenizer = [
        (path.relative_to(tokenizer_folder).as_posix(), xxhash.xxh3_128_hexdigest(path.read_bytes()))
        for path in _tokenizer_files(tokenizer_folder)
    ]
    decisive = [FORMAT, settings.model_dump(), sources, tokenizer]
    return xxhash.xxh3_128_hexdigest(json.dumps(decisive, sort_keys=True).encode())


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of all files below a folder; nothing where it is none."""
    found = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return [(path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns) for path, stat in found]


def _tokenizer_files(folder: Path) -> list[Path]:
    candidates = [*folder.glob("*"), *(folder / TEMPLATES).glob("*")]
    return sorted(
        path for path in candidates if path.is_file() and any(fnmatch(path.name, name) for name in TOKENIZER_FILES)
    )


def _read_kept(path: Path, inputs: str) -> Tokens | None:
    """A set as `save_tokens` wrote it; None where there is none, or any byte of it is another one now."""
    try:
        tensors = load_tensors(path.read_bytes())
        ids, samples = tensors["ids"], tensors["samples"].numpy().tobytes()
        if tensors["digest"].numpy().tobytes() != _digest(inputs, ids, samples):
            return None
        return Tokens(ids, [Sample(*entry) for entry in json.loads(samples)], inputs, cached=True)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _digest(inputs: str, ids: torch.Tensor, samples: bytes) -> bytes:
    hasher = xxhash.xxh3_128(inputs.encode())
    hasher.update(ids.numpy().tobytes())
    hasher.update(samples)
    return bytes(hasher.digest())


def _bytes_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


# Reading samples


def _contents(recipe: Recipe, files: dict[Path, bytes]) -> Iterator[tuple[int, str, Content]]:
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
        # Only a newline ends a line: JSON strings may hold Unicode's other line ends.
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
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


def _hub_samples(recipe: Recipe, source: HubSamples) -> Iterator[tuple[str, Content]]:
    """Streamed: the hub is read only as far as the samples and the shuffle's buffer reach."""
    import datasets

    # What it would log comes as an exception as well.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    folder = recipe.path(source.hub)
    name = str(folder) if folder.is_dir() else source.hub
    try:
        stream = datasets.load_dataset(name, source.name, split=source.split, revision=source.revision, streaming=True)
        matching = (sample for sample in stream.shuffle(seed=source.seed) if _matches(source, sample))
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
    """A row as a sample: the chosen column under the name that its type asks for.

    A table gives every message all fields that any message has, null where it has none; templates ask for them.
    """
    content = {key: _without_nulls(sample.get(key)) for key in ("messages", "tools", "text", "language")}
    if source.column:
        value = _without_nulls(_column(source, sample, source.column))
        content |= {"messages": None, "tools": None, "text": None}
        content["messages" if isinstance(value, list) else "text"] = value
    return content


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


# Encoding


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever a damaged file leads to
        raise CalibrationError(
            f"{folder} holds no tokenizer that loads without remote code: {one_line(error)}"
        ) from None


def _is_chat(content: Content) -> bool:
    messages = content.get("messages")
    return isinstance(messages, list) and bool(messages)


def _language(content: Content) -> str | None:
    language = content.get("language")
    return language if isinstance(language, str) and language else None


def _encode(tokenizer: Any, where: str, content: Content) -> list[int]:
    """All tokens of a sample, at least one."""
    text = content.get("text")
    if _is_chat(content):
        ids = tokenizer(_render(tokenizer, where, content), add_special_tokens=False)["input_ids"]
    elif isinstance(text, str) and text.strip():
        ids = tokenizer(text)["input_ids"]
    else:
        raise CalibrationError(f'{where} has no text: a sample is {{"text": ...}} or {{"messages": [...]}}')
    if not ids:
        raise CalibrationError(f"{where} has no tokens")
    return list(ids)


def _render(tokenizer: Any, where: str, content: Content) -> str:
    """A chat as the model sees it, by its own template."""
    messages = content["messages"]
    if not all(isinstance(message, dict) and message.get("role") for message in messages):
        raise CalibrationError(f"{where}: every message must be an object with a role")
    if not tokenizer.chat_template:
        raise CalibrationError(f"{where} has messages, but the tokenizer has no chat template")
    try:
        return str(tokenizer.apply_chat_template(messages, tools=content.get("tools") or None, tokenize=False))
    except Exception as error:  # templates raise whatever their author chose
        raise CalibrationError(f"{where}: the chat template refuses it: {one_line(error)}") from None
