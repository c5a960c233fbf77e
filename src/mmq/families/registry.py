"""All families that mmq knows, and which one a config.json is of.

A package adds a family of its own by an entry point of the group `mmq.families` that is its table, or a program by
`register`.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from mmq.errors import CheckpointError, one_line, shown
from mmq.families.deepseek_v3 import DEEPSEEK_V3
from mmq.families.glm4_moe import GLM4_MOE
from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.families.minimax_m3_vl import MINIMAX_M3_VL
from mmq.families.qwen3_5_moe import QWEN3_5_MOE, QWEN3_5_MOE_TEXT
from mmq.families.qwen3_moe import QWEN3_MOE
from mmq.families.qwen3_next import QWEN3_NEXT
from mmq.families.table import Architecture

GROUP = "mmq.families"
ARCHITECTURES: dict[str, Architecture] = {
    table.model_type: table
    for table in (
        MINIMAX_M2,
        QWEN3_MOE,
        GLM4_MOE,
        DEEPSEEK_V3,
        QWEN3_NEXT,
        QWEN3_5_MOE,
        QWEN3_5_MOE_TEXT,
        MINIMAX_M3_VL,
    )
}


def register(architecture: Architecture) -> None:
    """Add a family; one of the same `model_type` is replaced."""
    ARCHITECTURES[architecture.model_type] = architecture


def families() -> dict[str, Architecture]:
    """All families by `model_type`, those of installed packages among them.

    Raises:
        CheckpointError: a package's entry point can't be loaded or is no table.
    """
    _load_entry_points()
    return ARCHITECTURES


@cache
def _load_entry_points() -> None:
    for point in entry_points(group=GROUP):
        try:
            table = point.load()
        except Exception as error:  # whatever a package raises
            raise CheckpointError(f"the family {point.value} can't be loaded: {one_line(error)}") from None
        if not isinstance(table, Architecture):
            raise CheckpointError(f"the family {point.value} is no {Architecture.__module__}.{Architecture.__name__}")
        register(table)


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The family of a config.json, resolved for it.

    Raises:
        CheckpointError: it is not a supported one, or a key that decides over its layers holds something else.
    """
    model_type = config.get("model_type")
    listed = config.get("architectures")
    names = listed if isinstance(listed, list) else []
    known = families()
    for architecture in known.values():
        if architecture.causal_lm in names or architecture.model_type == model_type:
            try:
                architecture.check_section(config)
                return architecture.resolved(config)
            except ValueError as error:
                raise CheckpointError(f"config.json: {error}") from None
    raise CheckpointError(f"the model type {shown(model_type)} is not supported; mmq knows {', '.join(sorted(known))}")
