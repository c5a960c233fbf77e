"""A model's rotary settings, read from config.json."""

from __future__ import annotations

from typing import Any

from mmq.errors import CheckpointError, shown


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """config.json's rotary settings in transformers' form: theta, type and the share of head dimensions that turn.

    Raises:
        CheckpointError: one is of a wrong kind, or more than all dimensions would turn.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key) or {}, dict):
            raise CheckpointError(f"config.json: {key} is {shown(config[key])} instead of an object")
    given = dict(config.get("rope_parameters") or {})
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if config.get("rotary_dim"):
        given["partial_rotary_factor"] = config["rotary_dim"] / head_dim
    given.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if "rope_theta" not in given:
        given["rope_theta"] = config.get("rope_theta", 10000.0)
    given.setdefault("rope_type", (config.get("rope_scaling") or {}).get("rope_type", "default"))
    share = given["partial_rotary_factor"]
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise CheckpointError(
            f"config.json: partial_rotary_factor is {shown(share)} instead of a share of head dimensions"
        )
    return given
