"""What all stages of a run share: the recipe, the source checkpoint, the work_dir and its journal."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mmq.errors import RecipeError
from mmq.families.registry import architecture_of
from mmq.families.table import Architecture
from mmq.machine.team import ALONE, Team
from mmq.recipe import KvCacheScheme, Recipe
from mmq.source.hub import is_hub_id, source_refused
from mmq.source.model import SourceModel
from mmq.source.tokenizer import CODE, TOKENIZER_FILES
from mmq.source.tokens import Tokens
from mmq.storage.checkpoint import Checkpoint
from mmq.workdir.journal import Journal
from mmq.workdir.progress import Listener, Reporter

# Weights that are not read.
OTHER_FORMATS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"]
BF16, AWQ, HYBRID, STATE = "bf16", "awq", "hybrid", "state"


@dataclass
class Workspace:
    """One run. Headers of the source are read when first asked for.

    Attributes:
        offline: never fetch the source from the hub.
        calibration: the tokens, once they are made.
        team: the ranks that work on it.
    """

    recipe: Recipe
    reporter: Reporter
    offline: bool = False
    calibration: Tokens | None = None
    team: Team = ALONE

    @classmethod
    def of(
        cls, recipe: Recipe, listener: Listener | None = None, offline: bool = False, team: Team = ALONE
    ) -> Workspace:
        return cls(recipe, Reporter(listener), offline, team=team)

    @property
    def work_dir(self) -> Path:
        return self.recipe.work_path

    def folder(self, name: str) -> Path:
        return self.work_dir / name

    @cached_property
    def journal(self) -> Journal:
        return Journal(self.work_dir, writes=self.team.leads)

    @cached_property
    def source(self) -> SourceModel:
        """The fp8 checkpoint. Raises CheckpointError or RecipeError when it can't be taken."""
        checkpoint = Checkpoint.open(self.source_folder)
        return SourceModel(checkpoint, architecture_of(checkpoint.config))

    @cached_property
    def kept_scales(self) -> dict[str, str]:
        """fp8 weights of the source whose bytes the hybrid checkpoint has, and the names of their scales."""
        return self.source.kept_scales(self.recipe.awq.shared_experts == "source")

    @cached_property
    def rounded(self) -> frozenset[str]:
        """Attention's matrices that are bf16 in the source and block fp8 in the hybrid checkpoint.

        Raises:
            RecipeError: the recipe asks for it, and the source is no bf16 checkpoint.
        """
        if self.recipe.restore.attention == "source":
            return frozenset()
        if self.source.format.quantized:
            raise RecipeError(
                f"restore.attention is fp8_block, which is for bf16 sources; this one is {self.source.format.name}"
            )
        return self.source.attention_matrices()

    @property
    def kv_cache_scheme(self) -> KvCacheScheme | None:
        """The recipe's, where the family has a KV cache that servers take scales for."""
        return self.recipe.awq.kv_cache_scheme if self.architecture.has_kv_cache_scales else None

    @property
    def smooths_norm(self) -> bool:
        """Whether all that reads the norm before the experts can be scaled; what keeps fp8 bytes can't."""
        arch = self.architecture
        kept = {arch.split(name)[1] for name in self.kept_scales if not arch.is_extra(name)}
        return kept.isdisjoint(arch.norm_readers(experts=0))

    @property
    def architecture(self) -> Architecture:
        return self.source.architecture

    @cached_property
    def source_folder(self) -> Path:
        """The recipe's folder, or where the hub id was fetched to.

        Raises:
            RecipeError: it is not there, or a stage would write into it.
        """
        name = self.recipe.model.source
        folder = self.recipe.path(name)
        for output in (BF16, AWQ, HYBRID, STATE):
            written = self.folder(output).resolve()
            if folder.is_relative_to(written) or written.is_relative_to(folder):
                raise RecipeError(f"model.source: {folder} and {written}, which mmq writes, lie in one another")
        if folder.is_dir():
            return folder
        if not is_hub_id(name):
            raise RecipeError(f"model.source: there is no folder {folder}")
        where = "in the hub's cache" if self.offline else "on the hub"
        with source_refused(f"{name} is neither a folder (looked at {folder}) nor found {where}"):
            return self._snapshot(ignore=OTHER_FORMATS)

    @property
    def has_source(self) -> bool:
        """Whether the source is a folder, not something on the hub."""
        return self.recipe.path(self.recipe.model.source).is_dir()

    @cached_property
    def tokenizer_folder(self) -> Path:
        """The source's folder; of a hub id only what a tokenizer needs is fetched.

        Raises:
            RecipeError: it is not there, or a stage would write into it.
        """
        name = self.recipe.model.source
        if self.has_source or not is_hub_id(name):
            return self.source_folder
        wanted = [*TOKENIZER_FILES, *([CODE] if self.recipe.model.trust_remote_code else [])]
        where = "in the hub's cache" if self.offline else "on the hub"
        with source_refused(
            f"{name} is neither a folder (looked at {self.recipe.path(name)}), nor is its tokenizer found {where}"
        ):
            return self._snapshot(allow=wanted)

    def _snapshot(self, allow: list[str] | None = None, ignore: list[str] | None = None) -> Path:
        from huggingface_hub import snapshot_download

        model = self.recipe.model
        return Path(
            snapshot_download(
                model.source,
                revision=model.revision,
                local_files_only=self.offline,
                allow_patterns=allow,
                ignore_patterns=ignore,
            )
        )
