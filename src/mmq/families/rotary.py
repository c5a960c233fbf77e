"""A model's rotary settings: every form of them that transformers reads, as the one form that all servers read.

config.json has them as `rope_parameters` (transformers 5), as `rope_scaling` with `rope_type` or `type` (before), and
beside these as `rope_theta`, `partial_rotary_factor`, `rotary_dim` and `original_max_position_embeddings`. Readers
disagree on which of two wins, so two that say different things are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mmq.errors import CheckpointError, shown
from mmq.families.table import Architecture

SHARE, ORIGINAL, POSITIONS = "partial_rotary_factor", "original_max_position_embeddings", "max_position_embeddings"
# What each type can't do without, as in transformers' modeling_rope_utils.
NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", ORIGINAL),
    "longrope": ("short_factor", "long_factor", ORIGINAL),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "proportional": (),
}
# No setting comes near it, and a float holds it.
LARGEST = 1e300
# Older names of types.
RENAMED = {"su": "longrope"}
# Types whose frequencies follow from the positions of pretraining.
PRETRAINED = ("yarn", "longrope", "llama3")


def _number(value: object) -> bool:
    return type(value) in (int, float) and -LARGEST < value < LARGEST  # type: ignore[operator]


def _positive(value: object) -> bool:
    return _number(value) and value > 0  # type: ignore[operator]


def _at_least_one(value: object) -> bool:
    return _number(value) and value >= 1  # type: ignore[operator]


def _count(value: object) -> bool:
    return type(value) is int and value >= 1


def _share(value: object) -> bool:
    return _positive(value) and value <= 1  # type: ignore[operator]


def _factors(value: object) -> bool:
    return isinstance(value, list) and all(map(_positive, value))


KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "rope_theta": (_at_least_one, "a number of at least 1"),
    SHARE: (_share, "a share of head dimensions"),
    ORIGINAL: (_count, "a positive integer"),
    "factor": (_at_least_one, "a number of at least 1"),
    "attention_factor": (_positive, "a positive number"),
    "beta_fast": (_positive, "a positive number"),
    "beta_slow": (_positive, "a positive number"),
    "mscale": (_number, "a number"),
    "mscale_all_dim": (_number, "a number"),
    "low_freq_factor": (_positive, "a positive number"),
    "high_freq_factor": (_positive, "a positive number"),
    "short_factor": (_factors, "a list of positive numbers"),
    "long_factor": (_factors, "a list of positive numbers"),
    "attn_factor": (_positive, "a positive number"),
    "short_mscale": (_positive, "a positive number"),
    "long_mscale": (_positive, "a positive number"),
    "truncate": (lambda value: isinstance(value, bool), "true or false"),
}


def rope_parameters(config: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """config.json's rotary settings in transformers' form, all of them: type, theta, the share of head dimensions that
    turn, and whatever the type needs or the checkpoint says besides.

    Raises:
        CheckpointError: one is of a wrong kind or missing, or two say different things.
    """
    config = architecture.settings(config)
    given = _together(config)
    head_dim = _head_dim(config, architecture)
    rotary_dim = config.get("rotary_dim")
    if rotary_dim is not None and not (_count(rotary_dim) and rotary_dim <= head_dim):
        raise _wrong("rotary_dim", rotary_dim, f"a number of dimensions, with heads of {shown(head_dim)}")
    if SHARE not in given:
        given[SHARE] = architecture.default_rotary_share if rotary_dim is None else _share_of(rotary_dim, head_dim)
    given.setdefault("rope_theta", architecture.default_theta)
    given.setdefault("rope_type", "default")
    kind = given["rope_type"]
    if not isinstance(kind, str) or kind not in NEEDED:
        raise CheckpointError(f"config.json: rope_type is {shown(kind)}; known are {', '.join(NEEDED)}")
    if kind in PRETRAINED and config.get(POSITIONS) is not None:
        given.setdefault(ORIGINAL, config[POSITIONS])  # as transformers does
    for key in NEEDED[kind]:
        if key not in given:
            raise CheckpointError(f"config.json: rotary settings of type {kind} lack {key}")
    for key, (right, kinds) in KINDS.items():
        if key in given and not right(given[key]):
            raise _wrong(key, given[key], kinds)
    turning = int(head_dim * given[SHARE])
    if rotary_dim is not None and turning != rotary_dim:
        raise CheckpointError(
            f"config.json: rotary_dim is {rotary_dim}, but {SHARE} = {given[SHARE]} of {head_dim} makes {turning}"
        )
    if turning < 2 or turning % 2:
        raise CheckpointError(f"config.json: {turning} dimensions of a head would turn; they turn in pairs")
    _check_type(kind, given, turning, config.get(POSITIONS))
    if not architecture.latent:  # vLLM has a class of its own for that, which reads what transformers reads
        given |= _for_vllm(kind, given, config.get(POSITIONS))
    last = {key: given.pop(key) for key in (SHARE, "rope_theta", "rope_type")}
    return given | last


def largest_position(config: dict[str, Any], architecture: Architecture) -> int | None:
    """How many positions a sequence may have, as vLLM derives it from config.json; None where nothing says it."""
    given, positions = rope_parameters(config, architecture), architecture.settings(config).get(POSITIONS)
    stretched = {"linear": positions, "dynamic": positions, "yarn": given.get(ORIGINAL)}.get(given["rope_type"])
    known = [value for value in (positions, stretched and int(stretched * given["factor"])) if value]
    return max(known, default=None)


def check_length(length: int, name: str, config: dict[str, Any], architecture: Architecture) -> int | None:
    """Positions as of `largest_position`.

    Raises:
        CheckpointError: the recipe's `name` asks for sequences beyond them.
    """
    positions = largest_position(config, architecture)
    if positions is not None and length > positions:
        raise CheckpointError(f"{name} is {length}, the model has {positions} positions")
    return positions


def _together(config: dict[str, Any]) -> dict[str, Any]:
    """All settings under the names of `rope_parameters`; what is null is not given."""
    given: dict[str, Any] = {}
    said_by: dict[str, str] = {}

    def say(where: str, key: str, value: Any) -> None:
        if key in given and given[key] != value:
            raise CheckpointError(
                f"config.json contradicts itself: {said_by[key]} is {shown(given[key])}, {where} is {shown(value)}"
            )
        given[key] = value
        said_by[key] = where

    for section in ("rope_parameters", "rope_scaling"):
        entries = config.get(section) or {}
        if not isinstance(entries, dict):
            raise CheckpointError(f"config.json: {section} is {shown(entries)} instead of an object")
        for key, value in entries.items():
            if isinstance(value, dict):
                raise CheckpointError(f"config.json: {section} has settings of its own for {shown(key)}")
            if value is not None:
                where = f"{section}.{key}"
                if key in ("rope_type", "type"):
                    key, value = "rope_type", RENAMED.get(value, value) if isinstance(value, str) else value
                say(where, key, value)
    for key in ("rope_theta", SHARE, ORIGINAL):
        if config.get(key) is not None:
            say(key, key, config[key])
    return given


def _check_type(kind: str, given: dict[str, Any], turning: int, positions: Any) -> None:
    """What a type's numbers must be to each other."""
    if kind == "default" and given.get("factor", 1) != 1:
        raise CheckpointError(
            f"config.json: the rotary settings have factor = {shown(given['factor'])}, but no type that scales by it"
        )
    if kind == "dynamic" and turning < 4:
        raise CheckpointError("config.json: rotary settings of type dynamic need four dimensions of a head that turn")
    if kind == "longrope":
        for key in ("short_factor", "long_factor"):
            if len(given[key]) != turning // 2:
                raise CheckpointError(
                    f"config.json: {key} has {len(given[key])} factors for the {turning // 2} pairs of dimensions that"
                    " turn"
                )
    if kind == "llama3" and not given["low_freq_factor"] < given["high_freq_factor"]:
        raise CheckpointError(
            f"config.json: low_freq_factor = {given['low_freq_factor']} is not below high_freq_factor ="
            f" {given['high_freq_factor']}"
        )
    if kind == "yarn" and given.get("beta_fast", 32) < given.get("beta_slow", 1):
        raise CheckpointError(
            f"config.json: beta_fast = {given.get('beta_fast', 32)} is below beta_slow = {given.get('beta_slow', 1)}"
        )
    if kind in PRETRAINED and _count(positions) and given[ORIGINAL] > positions:
        raise CheckpointError(f"config.json: {ORIGINAL} = {given[ORIGINAL]} is above {POSITIONS} = {positions}")


def _for_vllm(kind: str, given: dict[str, Any], positions: int | None) -> dict[str, Any]:
    """How strongly cos and sin count: transformers reads attention_factor and mscale for it, vLLM other names. Empty
    where vLLM comes to the same by itself.

    Raises:
        CheckpointError: vLLM's names say something else.
    """
    # By vLLM's name: what vLLM would multiply by, and what it must be told so that it is transformers' number.
    told: dict[str, tuple[float, float]] = {}
    weight = given.get("attention_factor", 1.0)
    if kind == "yarn":
        factor, mscale, all_dim = given["factor"], given.get("mscale"), given.get("mscale_all_dim")
        plain = _yarn_magnitude(factor)
        if "attention_factor" not in given:
            weight = _yarn_magnitude(factor, mscale) / _yarn_magnitude(factor, all_dim) if mscale and all_dim else plain
        told["attn_factor"] = plain * given.get("attn_factor", 1.0), weight / plain
    elif kind == "longrope":
        implied = (positions or given[ORIGINAL]) / given[ORIGINAL]
        if "attention_factor" not in given:
            weight = _longrope_magnitude(given.get("factor", implied), given[ORIGINAL])
        for key in ("short_mscale", "long_mscale"):
            told[key] = given.get(key, _longrope_magnitude(implied, given[ORIGINAL])), weight
    result = {}
    for key, (theirs, needed) in told.items():
        if math.isclose(theirs, weight, rel_tol=1e-6):
            continue
        if key in given:
            raise CheckpointError(
                f"config.json: with {key} = {shown(given[key])} vLLM multiplies cos and sin by {theirs:.6g},"
                f" transformers by {weight:.6g}"
            )
        result[key] = needed
    return result


def _yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """sqrt(1/t) of YaRN (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope_magnitude(factor: float, original: int) -> float:
    """LongRoPE's scaling of attention (arXiv 2402.13753, appendix)."""
    return 1.0 if factor <= 1 or original <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _head_dim(config: dict[str, Any], architecture: Architecture) -> int:
    key = architecture.head_dim_key
    head_dim = config.get(key) or config["hidden_size"] // config["num_attention_heads"]
    if not _count(head_dim):
        raise _wrong(key, head_dim, "a positive integer")
    return int(head_dim)


def _share_of(rotary_dim: int, head_dim: int) -> float:
    """The share of which every reader's int(head_dim * share) is rotary_dim again; 30 / 44 gives 29."""
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else math.nextafter(share, 1.0)


def _wrong(key: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(f"config.json: {key} is {shown(value)} instead of {wanted}")
