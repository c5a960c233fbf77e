"""How many samples a recipe asks for."""

from __future__ import annotations

from mmq.recipe import FileSamples, Recipe


def most_tokens(recipe: Recipe) -> int:
    """Upper bound of the calibration tokens; lines are counted where the recipe names no number of samples."""
    settings = recipe.awq.calibration
    samples = 0
    for source in settings.files:
        if source.samples is not None:
            samples += source.samples
        elif isinstance(source, FileSamples) and recipe.path(source.path).is_file():
            with open(recipe.path(source.path), "rb") as file:
                samples += sum(1 for line in file if line.strip())
    return samples * settings.sequence_length
