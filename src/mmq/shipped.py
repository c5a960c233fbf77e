"""What comes with mmq and is named in recipes and commands: `builtin:code` for samples, `builtin:tiny` for a recipe.

The files lie once, in `calibration_data/`, `configs/` and `trained/` of the repository; `builtin/` beside this module
holds links to these folders, and in a wheel the files themselves.
"""

from __future__ import annotations

from pathlib import Path

from mmq.errors import RecipeError

PREFIX = "builtin:"
FOLDER = Path(__file__).parent / "builtin"


# A small trained model, made by scripts/train_tiny.py.
TRAINED = FOLDER / "trained"


def is_builtin(name: str) -> bool:
    """Whether a name is one of these, known or not."""
    return name.startswith(PREFIX)


def builtin_samples() -> dict[str, Path]:
    """JSONL files by their names in a recipe."""
    return _named("samples", ".jsonl")


def builtin_recipes() -> dict[str, Path]:
    """Recipes by their names on the command line."""
    return _named("recipes", ".yaml")


def samples_path(name: str) -> Path:
    """Raises RecipeError where mmq ships no such samples."""
    return _find(name, builtin_samples(), "samples")


def recipe_path(name: str) -> Path:
    """Raises RecipeError where mmq ships no such recipe."""
    return _find(name, builtin_recipes(), "recipe")


def _named(folder: str, suffix: str) -> dict[str, Path]:
    return {PREFIX + path.stem: path for path in sorted((FOLDER / folder).glob(f"*{suffix}"))}


def _find(name: str, known: dict[str, Path], what: str) -> Path:
    if name not in known:
        raise RecipeError(f"mmq ships no {what} named {name}; there are {', '.join(known)}")
    return known[name]
