"""The versions of what a run computes with."""

from __future__ import annotations

import platform
from importlib.metadata import version

import mmq

PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "safetensors", "numba")


def versions() -> dict[str, str]:
    """By name: mmq, Python, and the packages that decide the bytes of a result."""
    return {"mmq": mmq.__version__, "python": platform.python_version()} | {name: version(name) for name in PACKAGES}
