"""The versions of what a run computes with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import mmq

PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "safetensors", "numba")


def installed_versions() -> dict[str, str | None]:
    """The same where some may not be there, as beside vLLM: None for those."""
    found: dict[str, str | None] = {"mmq": mmq.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def versions() -> dict[str, str]:
    """By name: mmq, Python, and the packages that decide the bytes of a result."""
    return {"mmq": mmq.__version__, "python": platform.python_version()} | {name: version(name) for name in PACKAGES}
