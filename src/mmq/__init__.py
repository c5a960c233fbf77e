"""mmq: dequant, awq, restore - hybrid int4/fp8 checkpoints of very large mixture-of-experts models.

The names below are the public API; they are imported when they are first asked for, so that `import mmq` is light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmq.api import MmqError, Progress, Recipe, evaluate, load_recipe, plan, run, status, verify

__version__ = "0.1.0"
__all__ = ["MmqError", "Progress", "Recipe", "evaluate", "load_recipe", "plan", "run", "status", "verify"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mmq import api

    value = globals()[name] = getattr(api, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
