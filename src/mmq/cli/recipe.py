"""mmq recipe init, list and show."""

from __future__ import annotations

import json as jsonlib
import re
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from mmq.cli.errors import handled
from mmq.cli.options import Json, Set, mode
from mmq.cli.output import Mode, make_output
from mmq.errors import RecipeError
from mmq.recipe import load, project_root
from mmq.shipped import PREFIX, builtin_recipes, builtin_samples

NEWLINE = "\n"
# What `init` begins with.
TEMPLATE = "builtin:minimax-m2.5"
recipe_app = typer.Typer(no_args_is_help=True, help="Write recipes, and show those that mmq ships.")


@recipe_app.callback()
def recipes() -> None:
    """Write recipes, and show those that mmq ships."""


@recipe_app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("recipe.yaml"),
    source: Annotated[str, typer.Option(help="The checkpoint: a folder or a hub id.")] = "MiniMaxAI/MiniMax-M2.5",
    work_dir: Annotated[
        str | None, typer.Option(help="Where the stages write. [default: runs/ and the source's name]")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write a commented recipe with every field and its default. Of a folder, family and format are told."""
    with handled():
        # `mmq doctor` must start beside vLLM, where mmq is installed without what this needs.
        from mmq.storage.atomic import write_bytes

        if path.exists() and not force:
            raise RecipeError(f"{path} exists; --force replaces it")
        found = _found(project_root(path), source)
        text = builtin_recipes()[TEMPLATE].read_text(encoding="utf-8")
        text = _with_value(text, "  source", source)
        text = _with_value(text, "work_dir", work_dir or f"runs/{_folder_name(source)}")
        if found:
            text = f"# {Path(source).name}, {found}: every field with its default.\n{text.partition(NEWLINE)[2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, text.encode())
        output = make_output(Mode.HUMAN)
        output.note(f"wrote {path}" + (f": {found}" if found else ""))
        output.hint(f"mmq run {path} --dry-run")


@recipe_app.command("list")
def list_(json: Json = False) -> None:
    """What mmq ships: recipes to show, run or begin with, and samples that a recipe may name."""
    with handled():
        found = [
            {"name": name, "kind": "recipe", "what": _first_comment(path)} for name, path in builtin_recipes().items()
        ]
        for name, path in builtin_samples().items():
            with open(path, "rb") as file:
                count = sum(1 for line in file if line.strip())
            found.append({"name": name, "kind": "samples", "what": f"{count} samples, {path.stat().st_size} bytes"})
        output = make_output(mode(json, False))
        output.result({"builtin": found}, "Shipped with mmq", found)
        output.hint("mmq recipe show NAME > mine.yaml")


@recipe_app.command()
def show(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A file, or the name of a recipe that mmq ships.")],
    set_: Set = None,
    json: Json = False,
) -> None:
    """Print a recipe as it is written; with --set or --json as it is understood, defaults included."""
    with handled():
        name = recipe if recipe.startswith(PREFIX) else PREFIX + recipe
        path = Path(name if name in builtin_recipes() and not Path(recipe).exists() else recipe)
        loaded = load(path, set_)
        if json or set_:
            content: dict[str, Any] = loaded.model_dump(mode="json")
            if json:
                make_output(Mode.JSON).result({"recipe": content})
            else:
                typer.echo(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), nl=False)
        else:
            typer.echo(builtin_recipes().get(str(path), path).read_text(encoding="utf-8"), nl=False)


def _found(root: Path, source: str) -> str:
    """Family and format of a source that is a folder, in words; nothing of one that is on the hub or not there yet.

    Raises:
        CheckpointError: mmq does not know its family or format.
    """
    folder = root / Path(source).expanduser()
    if not folder.is_dir():
        return ""
    from mmq.families.registry import architecture_of
    from mmq.source.formats import format_of
    from mmq.storage.checkpoint import CONFIG_NAME, read_json

    config = read_json(folder / CONFIG_NAME)
    arch = architecture_of(config)
    return f"{arch.model_type} in {format_of(arch.settings(config)).name}"


def _with_value(text: str, key: str, value: str) -> str:
    """The recipe with another value at the first line that begins with the key; comments stay in their column."""

    def line(match: re.Match[str]) -> str:
        start = f"{key}: {_yaml_string(value)}"
        return f"{start:<{len(match[1])}}{match[2]}" if len(start) < len(match[1]) else f"{start}  {match[2]}"

    return re.sub(rf"^({re.escape(key)}: \S+ *)(#.*)$", line, text, count=1, flags=re.MULTILINE)


def _folder_name(source: str) -> str:
    """'MiniMaxAI/MiniMax-M2.5' -> 'minimax-m2.5'."""
    return re.sub(r"[^a-z0-9._-]+", "-", Path(source).name.lower()).strip("-.") or "model"


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()


def _yaml_string(text: str) -> str:
    """The text as it is where YAML reads it back so, else quoted."""
    try:
        plain = yaml.safe_load(f"key: {text}") == {"key": text}
    except yaml.YAMLError:
        plain = False
    return text if plain else jsonlib.dumps(text)
