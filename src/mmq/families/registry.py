"""All families that mmq knows, and which one a config.json is of."""

from __future__ import annotations

from typing import Any

from mmq.errors import CheckpointError, shown
from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.families.table import Architecture

ARCHITECTURES = {architecture.model_type: architecture for architecture in (MINIMAX_M2,)}


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The family of a config.json.

    Raises:
        CheckpointError: it is not a supported one.
    """
    model_type = config.get("model_type")
    listed = config.get("architectures")
    names = listed if isinstance(listed, list) else []
    for architecture in ARCHITECTURES.values():
        if architecture.causal_lm in names or architecture.model_type == model_type:
            return architecture
    raise CheckpointError(
        f"the model type {shown(model_type)} is not supported; mmq knows {', '.join(sorted(ARCHITECTURES))}"
    )
