"""mmq push."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmq.cli.options import Json, LogFile, Quiet, RecipePath, Set, mode
from mmq.cli.output import Mode, Output
from mmq.cli.session import session
from mmq.text import bytes_text

if TYPE_CHECKING:
    from huggingface_hub import CardData

    from mmq.report.push import Parcel, Target


def push(
    recipe: RecipePath,
    repo_id: Annotated[str, typer.Option("--repo-id", metavar="OWNER/NAME", help="The model repository on the hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private; an existing public one is refused.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Upload to this branch; made where there is none.")
    ] = None,
    commit_message: Annotated[str | None, typer.Option(help="The commit's first line.")] = None,
    upload: Annotated[bool, typer.Option("--upload", help="Upload; without it nothing is sent.")] = False,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Upload even what `mmq verify` has not passed.")
    ] = False,
    set_: Set = None,
    json: Json = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
) -> None:
    """Upload the finished checkpoint to the hub, or show what would be uploaded, which is the default."""
    values = {"--repo-id": repo_id, "--revision": revision, "--commit-message": commit_message}
    options = [part for key, value in values.items() if value is not None for part in (key, value)]
    options += [flag for flag, given in (("--private", private), ("--unverified", unverified)) if given]
    shown = mode(json, quiet)
    if upload and shown is Mode.HUMAN:
        # The hub's client shows how far an upload is, which is switched off for the other commands.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    # A dry run touches nothing, a log file neither.
    with session("push", recipe, set_, shown, log_file if upload else None, [*options, "--upload"]) as run:
        from mmq.report.push import MESSAGE, Target, pack
        from mmq.report.push import upload as send
        from mmq.workdir.workspace import Workspace

        output = run.output
        workspace = Workspace.of(run.recipe, output, offline=True)
        target = Target(repo_id, private, revision, commit_message or MESSAGE)
        if upload:
            parcel, url = send(workspace, target, unverified)
            output.result(_value(target, parcel, url), f"Uploaded to {repo_id}", _rows(parcel))
            output.note(f"uploaded: {url}")
            return
        parcel = pack(workspace, target)
        output.result(_value(target, parcel), "Nothing was sent. This would be uploaded", _rows(parcel))
        if not json:
            _show(output, target, parcel)
        if parcel.doubt and not unverified:
            run.hint("verify")
        else:
            output.hint(shlex.join(["mmq", "push", *run.again, *options, "--upload"]))


def _value(target: Target, parcel: Parcel, url: str | None = None) -> dict[str, Any]:
    return {
        "repo_id": target.repo,
        "private": target.private,
        "revision": target.revision,
        "files": parcel.files,
        "bytes": sum(parcel.files.values()),
        "left_out": parcel.left_out,
        "verified": not parcel.doubt,
        "doubt": parcel.doubt,
        "front_matter": _front_matter(parcel).to_dict(),
        "url": url,
    }


def _front_matter(parcel: Parcel) -> CardData:
    from huggingface_hub import ModelCard

    data: CardData = ModelCard(parcel.card).data
    return data


def _rows(parcel: Parcel) -> list[dict[str, str]]:
    rows = [{"file": file, "size": bytes_text(size)} for file, size in parcel.files.items()]
    return [*rows, {"file": f"{len(parcel.files)} files", "size": bytes_text(sum(parcel.files.values()))}]


def _show(output: Output, target: Target, parcel: Parcel) -> None:
    """What a dry run has to say beside its table."""
    where = target.repo + (f", branch {target.revision}" if target.revision else "")
    output.note(f"to {where}{', private' if target.private else ''}; front matter of README.md:")
    output.note(_front_matter(parcel).to_yaml())
    if parcel.left_out:
        output.note(f"left out, not from mmq: {', '.join(parcel.left_out)}")
    output.note(f"not verified: {parcel.doubt}" if parcel.doubt else "verified: these files have passed `mmq verify`")
