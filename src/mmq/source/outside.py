"""What lies outside the decoder layers, compared with what config.json, generation_config.json and the tokenizer say of
it: a server would fail on it hours later, or answer with noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmq.errors import CalibrationError, CheckpointError, shown
from mmq.families.table import Architecture
from mmq.storage.checkpoint import CONFIG_NAME, Checkpoint, read_json

GENERATION_CONFIG = "generation_config.json"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
POSITIONS = "max_position_embeddings"
EPSILON = "rms_norm_eps"


def check_outside(checkpoint: Checkpoint, arch: Architecture) -> None:
    """Embeddings, head and final norm are there, of config.json's vocabulary, and special tokens lie in it.

    Raises:
        CheckpointError: something is missing, or two say different things.
    """
    config, specs, where = arch.settings(checkpoint.config), checkpoint.specs, checkpoint.folder / CONFIG_NAME
    for name in (arch.embedding, arch.final_norm):
        if name not in specs:
            raise CheckpointError(f"{checkpoint.folder}: {name} is missing")
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise CheckpointError(f"{where}: tie_word_embeddings is {shown(tied)} instead of true or false")
    if tied == (arch.head in specs):
        there = "the shards hold" if tied else "the shards lack"
        raise CheckpointError(f"{where}: tie_word_embeddings is {str(tied).lower()}, but {there} {arch.head}")
    vocabulary = config.get("vocab_size")
    for name in (arch.embedding, arch.head):
        if name in specs and specs[name].shape[0] != vocabulary:
            raise CheckpointError(
                f"{where}: vocab_size is {shown(vocabulary)}, but {name} has {specs[name].shape[0]} rows"
            )
    positions = config.get(POSITIONS)
    if positions is not None and (type(positions) is not int or positions < 1):
        raise CheckpointError(f"{where}: {POSITIONS} is {shown(positions)} instead of a positive number")
    epsilon = config.get(EPSILON, 0)
    if type(epsilon) not in (int, float) or not 0 <= epsilon <= 1:
        raise CheckpointError(f"{where}: {EPSILON} is {shown(epsilon)} instead of a number from 0 to 1")
    rows = specs[arch.embedding].shape[0]
    _check_special(where, config, rows)
    generation = checkpoint.folder / GENERATION_CONFIG
    if generation.exists():
        _check_special(generation, read_json(generation), rows)


def _check_special(where: Path, config: dict[str, Any], rows: int) -> None:
    """Special tokens have embeddings. A negative one stands for none in some models."""
    for key in SPECIAL_TOKENS:
        given = config.get(key)
        for token in given if isinstance(given, list) else [] if given is None else [given]:
            if type(token) is not int:
                raise CheckpointError(f"{where}: {key} is {shown(given)} instead of a token's number")
            if token >= rows:
                raise CheckpointError(f"{where}: {key} is {shown(token)}, the embeddings have {rows} rows")


def check_tokenizer(tokenizer: Any, rows: int) -> int:
    """The largest token that a tokenizer knows, added ones included.

    Raises:
        CalibrationError: it has no row in embeddings of so many.
    """
    token, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if largest >= rows:
        raise CalibrationError(
            f"the tokenizer has a token {shown(token)} with the number {largest}, the embeddings have {rows} rows"
        )
    return int(largest)
