"""A streamed pass's own files in the work_dir: hidden states and a record of each finished layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmq.workdir.output_shards import layer_unit
from mmq.workdir.workspace import STATE, Workspace


@dataclass(frozen=True)
class LayerFiles:
    """The folder `state/NAME` of a work_dir."""

    work_dir: Path
    folder: Path

    @classmethod
    def of(cls, workspace: Workspace, name: str) -> LayerFiles:
        return cls(workspace.work_dir, workspace.folder(STATE) / name)

    def hidden(self, layer: int) -> Path:
        """Hidden states after a layer."""
        return self.folder / f"hidden-{layer:05d}.safetensors"

    def record(self, layer: int) -> Path:
        """JSON of what was found in a layer."""
        return self.folder / f"{layer_unit(layer)}.json"

    def evidence(self, layer: int) -> Path:
        """Tokens that a layer's rounding was judged by, for verify."""
        return self.folder / f"evidence-{layer:05d}.safetensors"

    def forward(self, layer: int) -> Path:
        """The source's output of a layer, until a gradient has come back through the next."""
        return self.folder / f"forward-{layer:05d}.safetensors"

    def gradient(self, layer: int) -> Path:
        """The loss's gradient by a layer's output."""
        return self.folder / f"gradient-{layer:05d}.safetensors"

    def fisher(self, layer: int) -> Path:
        """What errors of a layer's output cost."""
        return self.folder / f"fisher-{layer:05d}.safetensors"

    def in_journal(self, path: Path) -> str:
        """A file under its name in the journal."""
        return path.relative_to(self.work_dir).as_posix()

    def remove_hidden(self, but: Path | None = None) -> None:
        """Remove hidden states that no later layer needs."""
        for path in self.folder.glob("hidden-*"):
            if path != but:
                path.unlink()
