"""mmq for Python: what the commands do, with values instead of lines. `import mmq` offers all of it.

A recipe is given as what `load_recipe` returns, or as its path. Nothing here prints, changes signal handlers or asks;
what goes wrong is raised as an `mmq.MmqError` with one sentence. Whatever was finished before stays finished: call the
same function again to go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmq.errors import MmqError
from mmq.recipe import Recipe, load
from mmq.workdir.progress import Listener, Progress

if TYPE_CHECKING:
    from mmq.prove.findings import Report
    from mmq.report.summary import Summary
    from mmq.serve.memory import Gpus
    from mmq.workdir.workspace import Workspace

__all__ = ["MmqError", "Progress", "Recipe", "evaluate", "load_recipe", "plan", "run", "status", "verify"]

OnProgress = Callable[[Progress], Any]


def load_recipe(path: str | Path, overrides: Mapping[str, str] | Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file, or builtin:NAME for one that mmq ships.
        overrides: values as YAML by their keys, `{"awq.n_grid": "10"}`, or `key=value` strings as for `--set`.

    Raises:
        RecipeError: it is missing or not valid.
    """
    given = [f"{key}={value}" for key, value in overrides.items()] if isinstance(overrides, Mapping) else [*overrides]
    return load(Path(path), given)


def plan(recipe: Recipe | str | Path, gpus: str | Gpus | None = None) -> dict[str, Any]:
    """Parameters and bytes before and after, disk, memory, and with `gpus` the KV cache; reads config.json alone.

    Args:
        gpus: "4x48GiB".

    Raises:
        MmqError: the source has no config.json that can be planned with.
    """
    from mmq.stages.plan import make_plan

    return make_plan(_recipe(recipe), _gpus(gpus))


def run(
    recipe: Recipe | str | Path,
    *,
    on_progress: OnProgress | None = None,
    gpus: str | Gpus | None = None,
    restart: bool = False,
) -> Summary:
    """All stages that the recipe needs, then verification, report and model card; or what is left of them.

    Args:
        on_progress: called with where the run stands, at least at every unit's parts, from worker threads too.
        gpus: where the result is to be served, "4x48GiB"; the summary then tells of the KV cache.
        restart: begin every stage anew.

    Returns:
        what was made.

    Raises:
        VerifyError: the result is not what it must be.
        MmqError: bad input, a full disk, another process at work.
    """
    from mmq.prove.verify import verify_checkpoint
    from mmq.report.card import write_card
    from mmq.report.facts import read_run
    from mmq.report.page import write_report
    from mmq.report.summary import summarize
    from mmq.stages.pipeline import run_stages, stages_of

    machines = _gpus(gpus)
    workspace = _workspace(recipe, on_progress)
    run_stages(workspace, stages_of(workspace.recipe), restart)
    verify_checkpoint(workspace).require_ok()
    facts = read_run(workspace)
    write_report(facts)
    write_card(workspace, facts)
    return summarize(workspace, facts, machines)


def verify(recipe: Recipe | str | Path, *, on_progress: OnProgress | None = None) -> Report:
    """Compare the finished checkpoint with its source, and write verify.json.

    Args:
        on_progress: as for `run`.

    Returns:
        what was looked at, and `problems`, empty where all is as it must be.

    Raises:
        MmqError: there is no finished checkpoint, or its source can't be read.
    """
    from mmq.prove.verify import verify_checkpoint

    return verify_checkpoint(_workspace(recipe, on_progress))


def evaluate(
    recipe: Recipe | str | Path,
    data: str | Path | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    *,
    by_layer: bool = False,
    on_progress: OnProgress | None = None,
    restart: bool = False,
) -> dict[str, Any]:
    """Perplexity, KL, top-1 agreement and hidden states of the finished checkpoint on held-out text; writes eval.json.

    Args:
        data: JSONL as for calibration; by default builtin:eval. Relative paths start at the current folder.
        samples: lines from the top; all by default.
        sequence_length: tokens kept of each; by default as many as calibration keeps.
        by_layer: evaluate each layer by itself as well, quantized alone, which takes many times as long.
        on_progress: as for `run`.

    Returns:
        the content of eval.json, with that of by_layer.json as `by_layer` where it was asked for.

    Raises:
        MmqError: there is no finished checkpoint, or the data can't be used.
    """
    from mmq.prove.evaluate import evaluate_checkpoint
    from mmq.prove.streamed import DEFAULT_DATA, EvalSettings
    from mmq.shipped import is_builtin

    path = DEFAULT_DATA if data is None else str(data)
    if not is_builtin(path):
        path = str(Path(path).expanduser().resolve())
    settings = EvalSettings(path, samples, sequence_length)
    return evaluate_checkpoint(_workspace(recipe, on_progress), settings, restart, by_layer)


def status(recipe: Recipe | str | Path) -> dict[str, Any]:
    """How far each stage is, which process is at work, and which command is next; takes no lock.

    Raises:
        MmqError: the journal or the source can't be read.
    """
    from mmq.report.status import status as read_status

    return read_status(_workspace(recipe, offline=True))


class _Calling(Listener):
    """Hands progress on to a function."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._call = on_progress

    def start(self, progress: Progress, nbytes: int) -> None:
        self._call(progress)

    def step(self, progress: Progress) -> None:
        self._call(progress)

    def unit(self, progress: Progress, facts: Mapping[str, Any]) -> None:
        self._call(progress)

    def finish(self, progress: Progress) -> None:
        self._call(progress)


def _workspace(recipe: Recipe | str | Path, on_progress: OnProgress | None = None, offline: bool = False) -> Workspace:
    from mmq.workdir.workspace import Workspace

    return Workspace.of(_recipe(recipe), _Calling(on_progress) if on_progress else None, offline)


def _recipe(recipe: Recipe | str | Path) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def _gpus(gpus: str | Gpus | None) -> Gpus | None:
    from mmq.serve.memory import Gpus

    return Gpus.parse(gpus) if isinstance(gpus, str) else gpus
