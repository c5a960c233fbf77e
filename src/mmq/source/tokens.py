"""Calibration tokens: samples from JSONL files or the hub, through the model's own chat template and tokenizer.

Samples are never packed or padded: each is a sequence of its own, of at most `sequence_length` tokens. A tokenized set
is kept under a fingerprint of all that it is made from, so that a resumed run needs neither the hub nor the tokenizer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from mmq.errors import CalibrationError, one_line, shown
from mmq.recipe import FileSamples, HubSamples, Recipe
from mmq.source.chat_template import Chat, render
from mmq.storage.atomic import make_folder, remove_temporaries
from mmq.storage.checkpoint import CONFIG_NAME, read_json
from mmq.storage.shards import save_tensors

# What transformers makes a tokenizer from, chat template included; config.json names its class where nothing else does.
TOKENIZER_FILES = (
    "config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "*.tiktoken", "chat_template*", "*.jinja",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
# What a tokenizer may be made of besides, where the recipe trusts it.
CODE = "*.py"
# Of layers, heads, experts, labels in a config.json.
LARGEST_COUNT = 10**6
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
    tokenizer = _tokenizer(tokenizer_folder, recipe.model.trust_remote_code)
    contents = []
    for index, where, content in _contents(recipe, files):
        _check_form(where, content)
        contents.append((index, where, content))
    rendered = iter(_render(tokenizer, [(where, content) for _, where, content in contents if _is_chat(content)]))
    ids: list[int] = []
    samples = []
    for index, where, content in contents:
        whole = _encode(tokenizer, where, content, next(rendered) if _is_chat(content) else None)
        part = whole[: settings.sequence_length]
        ids += part
        samples.append(Sample(index, len(part), len(whole) - len(part), _is_chat(content), _language(content)))
    return Tokens(torch.tensor(ids, dtype=torch.int64), samples, inputs)


def save_tokens(tokens: Tokens, cache: Path) -> Tokens:
    """Keep them for the next run, unless they come from there. Only for the holder of the work_dir's lock."""
    if tokens.cached:
        return tokens
    make_folder(cache)
    remove_temporaries(cache)
    samples = json.dumps([astuple(sample) for sample in tokens.samples], ensure_ascii=False).encode()
    digest = _digest(tokens.inputs, tokens.ids, samples)
    save_tensors(
        kept_path(cache, tokens.inputs),
        {"ids": tokens.ids, "samples": _bytes_tensor(samples), "digest": _bytes_tensor(digest)},
    )
    return replace(tokens, cached=True)


def kept_tokens(cache: Path, fingerprint: str) -> Tokens | None:
    """A kept set by its tokens' fingerprint, whatever has become of samples and tokenizer; None where there is none."""
    kept = (_read_kept(path, path.stem) for path in sorted(cache.glob("*.safetensors")))
    return next((tokens for tokens in kept if tokens is not None and tokens.fingerprint() == fingerprint), None)


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
    decisive = [FORMAT, settings.model_dump(exclude={"nonfinite"}), recipe.seed, sources, tokenizer]
    if recipe.model.trust_remote_code:
        code = [
            (path.name, xxhash.xxh3_128_hexdigest(path.read_bytes())) for path in sorted(tokenizer_folder.glob(CODE))
        ]
        decisive.append(code)
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
            json.dumps(sample, ensure_ascii=False).encode()  # raises for half a character, which no text holds
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


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    path = folder / CONFIG_NAME
    for key, value in (read_json(path) if path.exists() else {}).items():
        # transformers reads it as well, of whatever model, and makes lists as long as it says.
        if key.startswith("num_") and type(value) in (int, float) and value > LARGEST_COUNT:
            raise CalibrationError(f"{path}: {key} is {shown(value)}, more than {LARGEST_COUNT}")
    with _refused(f"{folder} holds no tokenizer that loads {'with' if trust_remote_code else 'without'} remote code"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)


@contextmanager
def _refused(sentence: str) -> Iterator[None]:
    """Whatever a damaged tokenizer leads to becomes a CalibrationError, a panic of its Rust part included."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CalibrationError(f"{sentence}: {one_line(error)}") from None


def _is_chat(content: Content) -> bool:
    messages = content.get("messages")
    return isinstance(messages, list) and bool(messages)


def _language(content: Content) -> str | None:
    language = content.get("language")
    return language if isinstance(language, str) and language else None


def _check_form(where: str, content: Content) -> None:
    """A sample is a chat or a text."""
    text = content.get("text")
    if _is_chat(content):
        if not all(isinstance(message, dict) and message.get("role") for message in content["messages"]):
            raise CalibrationError(f"{where}: every message must be an object with a role")
    elif not (isinstance(text, str) and text.strip()):
        raise CalibrationError(f'{where} has no text: a sample is {{"text": ...}} or {{"messages": [...]}}')


def _encode(tokenizer: Any, where: str, content: Content, chat: str | None) -> list[int]:
    """All tokens of a sample, at least one. A chat comes rendered."""
    with _refused(f"{where}: the tokenizer refuses it"):
        if chat is None:
            ids = tokenizer(content["text"])["input_ids"]
        else:
            ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    if not ids:
        raise CalibrationError(f"{where} has no tokens")
    return list(ids)


def _render(tokenizer: Any, chats: list[tuple[str, Content]]) -> list[str]:
    """Chats as the model sees them, by its own template."""
    found = []
    for where, content in chats:
        messages, tools = content["messages"], content.get("tools") or None
        if not tokenizer.chat_template:
            raise CalibrationError(f"{where} has messages, but the tokenizer has no chat template")
        with _refused(f"{where}: the tokenizer has no chat template for it"):
            found.append(Chat(where, str(tokenizer.get_chat_template(tools=tools)), messages, tools))
    return render(found, tokenizer.special_tokens_map)
