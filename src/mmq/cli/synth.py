"""mmq synth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmq.cli.errors import handled
from mmq.cli.options import Json, Quiet, mode, quiet_libraries
from mmq.cli.output import make_output
from mmq.errors import RecipeError


def synth(
    folder: Annotated[Path, typer.Argument(help="Where to write the checkpoint; must not exist or be empty.")],
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 2,
    hidden: Annotated[int, typer.Option(help="Hidden size.")] = 256,
    intermediate: Annotated[int, typer.Option(help="Intermediate size of an expert.")] = 128,
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 2,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    kv_heads: Annotated[int, typer.Option(help="Key-value heads.")] = 2,
    head_dim: Annotated[int, typer.Option(help="Dimensions of a head.")] = 64,
    vocabulary: Annotated[int, typer.Option(help="Tokens in the vocabulary.")] = 512,
    family: Annotated[str, typer.Option(help="The model family, by its model_type.")] = "minimax_m2",
    format: Annotated[str, typer.Option(help="How the weights are stored: fp8, fp8-bf16-scales, bf16, ...")] = "fp8",
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    shards: Annotated[int, typer.Option(min=1, help="Number of shards.")] = 3,
    shuffle: Annotated[
        bool, typer.Option(help="Scatter the tensors over the shards, scales apart from weights.")
    ] = False,
    trained: Annotated[
        bool, typer.Option("--trained", help="The small trained model that comes with mmq, with text for it, as it is.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a tiny synthetic mixture-of-experts checkpoint in a family's hub layout, by default MiniMax-M2's fp8."""
    with handled():
        output = make_output(mode(json, quiet))
        quiet_libraries()
        from mmq.families import families
        from mmq.source.synth import STORED, Sizes, copy_trained, write_checkpoint

        if trained:
            copy_trained(folder)
            output.result({"folder": str(folder)})
            return
        for value, known in ((family, families()), (format, STORED)):
            if value not in known:
                raise RecipeError(f"there is no {value!r}; there are {', '.join(sorted(known))}")
        sizes = Sizes(layers, hidden, intermediate, experts, top_k, heads, kv_heads, head_dim, vocabulary)
        write_checkpoint(folder, sizes, seed, shards, shuffle, families()[family], STORED[format])
        output.result({"folder": str(folder)})
