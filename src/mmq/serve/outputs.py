"""The tensors that a recipe makes of a source, from its config.json alone."""

from __future__ import annotations

from typing import Any

from mmq.families.sizes import Dimensions, Form, Tensors, tensors_of
from mmq.families.table import Architecture
from mmq.recipe import Recipe
from mmq.source.formats import format_of


def output_tensors(recipe: Recipe, config: dict[str, Any], arch: Architecture, form: Form) -> list[Tensors]:
    """`sizes.tensors_of` by the recipe's settings.

    Raises:
        CheckpointError: config.json describes no model or format that mmq reads.
    """
    settings, config = recipe.awq, arch.settings(config)
    found = format_of(config)
    return tensors_of(
        Dimensions.of(config, arch),
        arch,
        form,
        settings.group_size,
        settings.kv_cache_scheme is not None,
        found.storage,
        settings.shared_experts == "source",
        recipe.restore.attention == "fp8_block" and not found.quantized,
        found.plain(config, arch),
    )
