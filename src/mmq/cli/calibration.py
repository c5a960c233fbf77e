"""mmq calibration: what the recipe's mix of samples becomes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmq.cli.errors import handled
from mmq.cli.options import Json, RecipePath, Set, mode, quiet_libraries
from mmq.cli.output import Output, Rows, make_output
from mmq.errors import LockedError
from mmq.recipe import load

if TYPE_CHECKING:
    from mmq.source.tokens import Tokens
    from mmq.workdir.workspace import Workspace

SHOWN_LANGUAGES = 4


def calibration(recipe: RecipePath, set_: Set = None, json: Json = False) -> None:
    """What the calibration samples become: tokens, what is cut, languages. Keeps the tokens for the awq stage."""
    with handled():
        loaded = load(recipe, set_)
        quiet_libraries()
        from mmq.report.calibration import describe
        from mmq.source.calibration import load_tokens
        from mmq.source.tokens import CACHE_NAME, kept_path
        from mmq.workdir.workspace import STATE, Workspace

        output = make_output(mode(json, False))
        workspace = Workspace.of(loaded, output)
        cache = workspace.folder(STATE) / CACHE_NAME
        made = load_tokens(loaded, workspace.tokenizer_folder, cache)
        tokens = _keep(workspace, made, cache)
        found = describe(loaded, tokens)
        found["kept_in"] = str(kept_path(cache, tokens.inputs)) if tokens.cached else None
        found["reused"] = made.cached
        output.result(found, f"Calibration, {found['sequence_length']} tokens at most of each sample", _rows(found))
        if not json:
            _notes(found, output)


def _keep(workspace: Workspace, tokens: Tokens, cache: Path) -> Tokens:
    """Keep new tokens, unless a run holds the work_dir: that one keeps its own."""
    from mmq.source.tokens import save_tokens
    from mmq.workdir.lock import lock

    if tokens.cached:
        return tokens
    try:
        with lock(workspace.work_dir):
            return save_tokens(tokens, cache)
    except LockedError:
        return tokens


def _rows(found: dict[str, Any]) -> Rows:
    """One row a source, and their total."""
    named = [(source.get("path") or source["hub"], source) for source in found["sources"]]
    return [
        {
            "source": name,
            "form": " + ".join(f"{count} {form}" for form, count in entry["forms"].items()),
            "samples": entry["samples"],
            "cut": entry["samples_cut"],
            "tokens": f"{entry['tokens']:,}",
            "cut off": f"{entry['tokens_cut']:,}",
            "filled": f"{entry['filled_mean']:.1%}",
            "least": f"{entry['filled_min']:.1%}",
            "languages": _languages(entry["languages"]),
        }
        for name, entry in [*named, ("total", found["total"])]
    ]


def _languages(counts: dict[str, int]) -> str:
    shown = [f"{language} {count}" for language, count in list(counts.items())[:SHOWN_LANGUAGES]]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "") or "-"


def _notes(found: dict[str, Any], output: Output) -> None:
    total, window = found["total"], found["sequence_length"]
    output.note(
        f"{total['samples_cut']} of {total['samples']} samples are longer than sequence_length = {window};"
        f" {total['tokens_cut']:,} tokens are cut off"
    )
    output.note("packing: off. Samples are never packed or padded: each is a sequence of its own.")
    for source in found["sources"]:
        if source["kind"] == "hub" and source["revision"] is None and not source["folder"]:
            output.note(f"{source['hub']} names no revision: what is fetched anew may be something else")
    if found["kept_in"] is None:
        output.note("the tokens were not kept: another process is at work in the work_dir")
    else:
        output.note(f"tokens {'from' if found['reused'] else 'kept in'} {found['kept_in']}")
