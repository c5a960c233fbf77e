"""mmq recipe init."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer
import yaml

from mmq.cli.errors import handled
from mmq.cli.output import Mode, make_output
from mmq.errors import RecipeError

recipe_app = typer.Typer(no_args_is_help=True, help="Write recipes.")


@recipe_app.callback()
def recipes() -> None:
    """Write recipes."""


@recipe_app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("recipe.yaml"),
    source: Annotated[str, typer.Option(help="The fp8 checkpoint: a folder or a hub id.")] = "MiniMaxAI/MiniMax-M2.5",
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write a commented recipe with every field and its default."""
    with handled():
        # `mmq doctor` must start beside vLLM, where mmq is installed without what this needs.
        from mmq.storage.atomic import write_bytes

        if path.exists() and not force:
            raise RecipeError(f"{path} exists; --force replaces it")
        template = files("mmq").joinpath("recipe_template.yaml").read_text(encoding="utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, template.replace("SOURCE", _yaml_string(source)).encode())
        output = make_output(Mode.HUMAN)
        output.note(f"wrote {path}")
        output.hint(f"mmq run {path} --dry-run")


def _yaml_string(text: str) -> str:
    """The text as it is where YAML reads it back so, else quoted."""
    try:
        plain = yaml.safe_load(f"key: {text}") == {"key": text}
    except yaml.YAMLError:
        plain = False
    return text if plain else json.dumps(text)
