"""The recipe's calibration samples become tokens, through the model's own chat template and tokenizer.

Samples are never packed or padded: each is a sequence of its own, of at most `sequence_length` tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import xxhash

from mmq.recipe import FileSamples, Recipe
from mmq.source.forms import normal
from mmq.source.samples import read_files, read_samples
from mmq.source.tokenizer import CODE, encode, load_tokenizer, render_chats, tokenizer_files
from mmq.source.tokens import Sample, Tokens, kept_path, read_kept

# Of the kept sets: one that another way of reading or encoding has made must not be taken.
FORMAT = 2


def load_tokens(recipe: Recipe, tokenizer_folder: Path, cache: Path | None = None) -> Tokens:
    """The recipe's calibration samples: kept ones where there are any, else read, rendered, tokenized and cut.

    Writes nothing; see `save_tokens`.

    Args:
        cache: the folder of the kept sets.

    Raises:
        CalibrationError: a file is missing or empty, has fewer samples than asked for, or a sample has no known form.
    """
    settings = recipe.awq.calibration
    files = read_files(recipe)
    inputs = inputs_fingerprint(recipe, files, tokenizer_folder)
    kept = read_kept(kept_path(cache, inputs), inputs) if cache else None
    if kept is not None:
        return kept
    tokenizer = load_tokenizer(tokenizer_folder, recipe.model.trust_remote_code)
    given = [(index, where, normal(where, content)) for index, where, content in read_samples(recipe, files)]
    rendered = iter(render_chats(tokenizer, [(where, sample) for _, where, sample in given if sample.messages]))
    ids: list[int] = []
    samples = []
    for index, where, sample in given:
        chat = sample.messages is not None
        whole = encode(tokenizer, where, next(rendered) if chat else str(sample.text), chat)
        part = whole[: settings.sequence_length]
        ids += part
        samples.append(Sample(index, len(part), len(whole) - len(part), chat, sample.language, sample.form))
    return Tokens(torch.tensor(ids, dtype=torch.int64), samples, inputs)


def inputs_fingerprint(recipe: Recipe, files: dict[Path, bytes], tokenizer_folder: Path) -> str:
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
        for path in tokenizer_files(tokenizer_folder)
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
