"""The stages in order, and how a run of several of them is driven."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mmq.recipe import Recipe
from mmq.stages import awq, dequant, restore
from mmq.stages.base import Plan, Stage, execute, free_disk, holding
from mmq.stages.preflight import Passed, check_outputs, preflight
from mmq.workdir.workspace import Workspace

STAGES: dict[str, Stage] = {stage.name: stage for stage in (dequant, awq, restore)}


def stages_of(recipe: Recipe) -> list[str]:
    """The stages that a recipe needs; reading the fp8 source directly makes dequant unnecessary."""
    return [name for name in STAGES if not (name == "dequant" and recipe.awq.source == "fp8")]


def run_stages(workspace: Workspace, names: Iterable[str], restart: bool = False) -> None:
    """Run or resume stages under the work_dir's lock, which the leading rank takes for all. Raises MmqError."""
    stages, team = [STAGES[name] for name in names], workspace.team
    if team.leads:
        check_outputs(workspace, stages)
    with holding(workspace):
        if team.leads:
            preflight(workspace, stages, restart=restart)
        # What is fetched from the hub is there for the others now.
        team.together()
        workspace.offline = workspace.offline or not team.leads
        for stage in stages:
            execute(stage, workspace, restart)


def checked(workspace: Workspace, names: list[str], restart: bool = False) -> list[Passed]:
    """The checks of a run of these stages that touches nothing; those before them are taken to have run."""
    earlier = [*STAGES][: [*STAGES].index(names[0])]
    return preflight(workspace, [STAGES[name] for name in names], earlier, restart)


def plans(workspace: Workspace, names: Iterable[str]) -> list[Plan]:
    """What the stages would do, from headers alone."""
    return [STAGES[name].plan(workspace) for name in names]


def describe(workspace: Workspace, plan: Plan) -> dict[str, Any]:
    """A plan as JSON, with the disk it needs and finds."""
    return {
        "stage": plan.stage,
        "source": str(plan.source),
        "folder": str(plan.folder),
        "files": len(plan.units),
        "bytes_read": plan.read,
        "bytes_written": plan.written,
        "host_memory": plan.host_memory,
        "device_memory": plan.device_memory,
        "free_disk": free_disk(plan.folder),
        "units": [unit.name for unit in plan.units],
    }
