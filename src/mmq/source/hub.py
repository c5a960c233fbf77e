"""What names a model on the hub, and what keeps it from being had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmq.errors import RecipeError, one_line


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
