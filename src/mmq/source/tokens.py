"""Tokenized samples, and the sets that are kept of them.

A set is kept under a fingerprint of all that it is made from, so that a resumed run needs neither the hub nor the
tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from mmq.storage.atomic import make_folder, remove_temporaries
from mmq.storage.shards import save_tensors

# The kept sets' folder, below the work_dir's state/.
CACHE_NAME = "calibration"


@dataclass(frozen=True)
class Sample:
    """What became of a sample.

    Attributes:
        source: the index of its source in `calibration.files`.
        tokens: how many are kept.
        cut: how many `sequence_length` cut off.
        chat: messages through the chat template; else plain text.
        language: what the sample says of itself.
        form: what it was given as, by a name of `forms`; empty in sets that were kept before it was noted.
    """

    source: int
    tokens: int
    cut: int
    chat: bool
    language: str | None
    form: str = ""


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
    kept = (read_kept(path, path.stem) for path in sorted(cache.glob("*.safetensors")))
    return next((tokens for tokens in kept if tokens is not None and tokens.fingerprint() == fingerprint), None)


def kept_path(cache: Path, inputs: str) -> Path:
    return cache / f"{inputs}.safetensors"


def read_kept(path: Path, inputs: str) -> Tokens | None:
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
