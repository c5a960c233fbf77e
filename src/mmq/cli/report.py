"""mmq report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmq.cli.errors import handled
from mmq.cli.options import Json, Quiet, RecipePath, Set, mode, quiet_libraries
from mmq.cli.output import Output, make_output
from mmq.recipe import load

if TYPE_CHECKING:
    from mmq.report.facts import RunFacts
    from mmq.report.page import Written
    from mmq.workdir.workspace import Workspace


def report(recipe: RecipePath, set_: Set = None, json: Json = False, quiet: Quiet = False) -> None:
    """Write what a finished or unfinished run measured as one HTML page with plots, and a finished one's model card."""
    with handled():
        output = make_output(mode(json, quiet))
        loaded = load(recipe, set_)
        quiet_libraries()
        from mmq.workdir.workspace import Workspace

        _, written = write_and_note(Workspace.of(loaded, output, offline=True), output)
        if json:
            plots = [str(path) for path in written.plots]
            output.result({"report": str(written.page), "plots": plots, "missing": written.missing})


def write_and_note(workspace: Workspace, output: Output) -> tuple[RunFacts, Written]:
    """Write all that describes a run, and say where it lies. Raises MmqError."""
    from mmq.report.card import write_card
    from mmq.report.facts import read_run
    from mmq.report.page import write_report

    facts = read_run(workspace)
    written = write_report(facts)
    output.note(f"report: {written.page}")
    if card := write_card(workspace, facts):
        output.note(f"model card: {card}")
    for sentence in written.missing:
        output.note(sentence)
    return facts, written
