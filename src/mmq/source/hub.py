"""What names a model on the hub, its config.json, and what keeps it from being had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmq.errors import RecipeError, one_line
from mmq.recipe import Recipe


def is_hub_id(name: str) -> bool:
    """Whether a `model.source` that is no folder may be a hub id, `owner/name`."""
    return not name.startswith((".", "/", "~")) and name.count("/") == 1


@contextmanager
def source_refused(sentence: str) -> Iterator[None]:
    """Raises RecipeError with the sentence and the reason where the block can't fetch what model.source names."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise RecipeError(f"model.source: {sentence}: {one_line(error)}") from None


def source_config(recipe: Recipe, offline: bool = False) -> dict[str, Any]:
    """The source's config.json: of the folder, or of a hub id, from its cache before the hub itself.

    Args:
        offline: from the cache alone.

    Raises:
        MmqError: there is none.
    """
    from mmq.storage.checkpoint import CONFIG_NAME, read_json

    name = recipe.model.source
    folder = recipe.path(name)
    if folder.is_dir():
        return read_json(folder / CONFIG_NAME)
    if not is_hub_id(name):
        raise RecipeError(f"model.source: there is no folder {folder}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with source_refused(f"{name} is neither a folder (looked at {folder}), nor is its {CONFIG_NAME} found on the hub"):
        try:
            path = hf_hub_download(name, CONFIG_NAME, revision=recipe.model.revision, local_files_only=True)
        except LocalEntryNotFoundError:
            if offline:
                raise
            path = hf_hub_download(name, CONFIG_NAME, revision=recipe.model.revision)
    return read_json(Path(path))
