"""What a finished run made, in a few figures and one command."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mmq.families.sizes import Dimensions
from mmq.report.facts import RunFacts, loss_shares
from mmq.serve.memory import (
    CACHE_BYTES,
    DEFAULT_RESERVE,
    DEFAULT_UTILIZATION,
    Gpus,
    attention_in_blocks,
    parallel_problems,
    serve_command,
    serving,
    wants_whole_experts,
)
from mmq.serve.outputs import output_tensors
from mmq.text import bytes_text, duration_text, gib_text
from mmq.workdir.workspace import HYBRID, Workspace


@dataclass(frozen=True)
class Summary:
    """What a run made.

    Attributes:
        folder: the finished checkpoint.
        verified: `verify` has passed on its files as they are.
        bytes_before, bytes_after: tensors of the source and of the result.
        loss: of a layer's experts with the chosen scales, relative to plain round-to-nearest: the median of the layers;
            None where no layer has one.
        seconds: of all runs of all stages.
        gpus, kv_tokens: the GPUs that were asked about, and how many tokens their KV cache holds; None where none were.
        serve: vLLM's command for it.
        warnings: why vLLM would refuse, or not hold what the model could; a sentence each.
    """

    folder: Path
    verified: bool
    bytes_before: int
    bytes_after: int
    loss: float | None
    seconds: float
    gpus: Gpus | None
    kv_tokens: int | None
    serve: str
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder), "warnings": list(self.warnings)}

    def rows(self) -> list[dict[str, str]]:
        """As a table for people."""
        share = f" ({self.bytes_after / self.bytes_before:.0%})" if self.bytes_before else ""
        found = {
            "checkpoint": f"{self.folder}, {'verified' if self.verified else 'not verified'}",
            "size": f"{bytes_text(self.bytes_before)} -> {bytes_text(self.bytes_after)}{share}",
            "loss of the experts": "-" if self.loss is None else f"{self.loss:.0%} of round-to-nearest's",
            "time": duration_text(self.seconds),
        }
        if self.gpus is not None:
            where = f"{self.gpus.count} x {gib_text(self.gpus.memory)}"
            found["KV cache"] = f"{self.kv_tokens:,} tokens on {where}"
        return [{"": name, "result": value} for name, value in found.items()]


def summarize(workspace: Workspace, facts: RunFacts, gpus: Gpus | None = None) -> Summary:
    """The figures of a finished run.

    Args:
        gpus: where it is to be served.
    """
    source, settings, folder = workspace.source, workspace.recipe.awq, workspace.folder(HYBRID)
    arch, count = workspace.architecture, gpus.count if gpus else 1
    dims = Dimensions.of(source.config, arch)
    whole = wants_whole_experts(dims, count)
    shares = loss_shares(facts.layers)
    tokens = positions = None
    warnings: list[str] = []
    if gpus is not None:
        scales = settings.kv_cache_scheme is not None and arch.has_kv_cache_scales
        tensors = output_tensors(workspace.recipe, source.config, arch, "hybrid")
        item = CACHE_BYTES["fp8" if scales else "bf16"]
        tokens = serving(tensors, dims, gpus, DEFAULT_UTILIZATION, DEFAULT_RESERVE, item).tokens
        refused = parallel_problems(dims, count, attention_in_blocks(tensors))
        warnings += [f"vLLM would refuse: {problem}" for problem in refused]
        longest = source.config.get("max_position_embeddings")
        if not tokens:
            warnings.append(f"it does not fit on {gpus.count} x {gib_text(gpus.memory)}")
        elif type(longest) is int and tokens < longest:
            positions = tokens
    return Summary(
        folder=folder,
        verified=bool(facts.verify and facts.verify.get("ok") is True),
        bytes_before=facts.bytes_before,
        bytes_after=facts.bytes_after,
        loss=median(shares.values()) if shares else None,
        seconds=round(facts.seconds, 3),
        gpus=gpus,
        kv_tokens=tokens,
        serve=serve_command(str(folder), count, whole, positions),
        warnings=tuple(warnings),
    )
