"""How the stages say what they are doing. They call a Reporter; the command line decides what is shown."""

from __future__ import annotations

from typing import Any, Protocol


class Reporter(Protocol):
    """The sink of one run. All methods may be called from worker threads."""

    def start(self, stage: str, total_units: int, total_bytes: int) -> None:
        """A stage begins: `total_units` shards or layers, `total_bytes` to be read and written."""

    def advance(self, nbytes: int) -> None:
        """`nbytes` more were read or written."""

    def item(self, label: str) -> None:
        """The tensor, shard or layer now at work."""

    def unit(self, name: str, **facts: Any) -> None:
        """A unit is whole on disk and in the journal."""

    def note(self, message: str, **facts: Any) -> None:
        """Something worth a line."""

    def finish(self, stage: str) -> None:
        """The stage is complete."""


class Silent:
    """A Reporter that shows nothing."""

    def start(self, stage: str, total_units: int, total_bytes: int) -> None: ...
    def advance(self, nbytes: int) -> None: ...
    def item(self, label: str) -> None: ...
    def unit(self, name: str, **facts: Any) -> None: ...
    def note(self, message: str, **facts: Any) -> None: ...
    def finish(self, stage: str) -> None: ...
