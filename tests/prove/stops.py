"""Evaluations that stop at a given call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest


@contextmanager
def raising(module: ModuleType, function: str, call: int) -> Iterator[None]:
    """A module's function raises at its n-th call, which the block must come to."""
    original: Callable[..., Any] = getattr(module, function)
    calls = []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(function)
        if len(calls) == call:
            raise RuntimeError("stopped here")
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stopped here"):
        patch.setattr(module, function, failing)
        yield
