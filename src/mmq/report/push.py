"""The finished checkpoint to the hub: what would be uploaded, and the upload.

Only what restore put into the hybrid folder is sent, and the model card, written anew. huggingface_hub sends it: what
the hub has already is not sent again, so that an interrupted upload goes on when it is repeated.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from mmq.errors import JournalError, MmqError, PushError, one_line
from mmq.prove.verify import finished_files, read_report
from mmq.report.card import render
from mmq.storage.atomic import write_bytes
from mmq.storage.checkpoint import CARD_NAME
from mmq.workdir.lock import lock
from mmq.workdir.workspace import HYBRID, Workspace

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoUrl

name = "push"
MESSAGE = "Upload the hybrid AWQ int4 / fp8 checkpoint made by mmq"


@dataclass(frozen=True)
class Target:
    """Where to, and how.

    Attributes:
        repo: `owner/name` of a model repository; it is made where there is none.
        private: refuse a public repository; one that is made is private.
        revision: a branch, made where there is none; the main one by default.
    """

    repo: str
    private: bool = False
    revision: str | None = None
    message: str = MESSAGE


@dataclass(frozen=True)
class Parcel:
    """What would be uploaded.

    Attributes:
        files: bytes of each file by name, the card included.
        left_out: what else lies in the folder.
        card: the text of README.md.
        doubt: why these files don't count as verified, as a clause; empty where they do.
    """

    files: dict[str, int]
    left_out: list[str]
    card: str
    doubt: str


def pack(workspace: Workspace, target: Target) -> Parcel:
    """Look at what lies there. Writes nothing, asks nobody.

    Raises:
        PushError: the repository's name is none.
        JournalError: restore has not ended, or a shard is gone or has another size.
    """
    _check_name(target.repo)
    folder, restore = workspace.folder(HYBRID), workspace.journal.stage("restore")
    if not restore.complete:
        raise JournalError(f"{folder} is not complete; run `mmq restore` first")
    restore.check_files(HYBRID)
    card = render(workspace, target.repo)
    files = {file: size for file, (size, _) in finished_files(workspace).items()} | {CARD_NAME: len(card.encode())}
    left_out = sorted(path.name for path in folder.iterdir() if path.name not in files)
    return Parcel(dict(sorted(files.items())), left_out, card, _doubt(workspace))


def upload(workspace: Workspace, target: Target, unverified: bool = False) -> tuple[Parcel, str]:
    """Upload under the work_dir's lock, so that no stage changes a file meanwhile.

    Args:
        unverified: also what `mmq verify` has not passed.

    Returns:
        what was uploaded, and the address of its last commit.

    Raises:
        PushError: the files are not those that `mmq verify` has passed, there is no token, or the hub refuses or can't
            be reached.
        JournalError: restore has not ended, or a shard is not what it wrote.
    """
    with lock(workspace.work_dir, workspace.reporter):
        parcel = pack(workspace, target)
        if parcel.doubt and not unverified:
            raise PushError(
                f"{workspace.folder(HYBRID)} is not uploaded: {parcel.doubt}; run `mmq verify`, or upload it all the"
                " same with --unverified"
            )
        api = HfApi(library_name="mmq")
        with _refusals(target.repo):
            if get_token() is None:
                raise PushError("there is no token for the hub: run `hf auth login`, or set HF_TOKEN")
            repo = _repository(api, target)
        _check_content(workspace)
        write_bytes(workspace.folder(HYBRID) / CARD_NAME, parcel.card.encode())
        with _refusals(target.repo):
            commit = api.upload_folder(
                repo_id=repo.repo_id,
                repo_type="model",
                folder_path=workspace.folder(HYBRID),
                revision=target.revision,
                commit_message=target.message,
                allow_patterns=[glob.escape(file) for file in parcel.files],
            )
    return parcel, str(commit.commit_url)


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PushError(f"{repo} is no name of a repository: {one_line(error)}") from None
    if "/" not in repo:
        raise PushError(f"{repo} is no name of a repository: it lacks the owner, as in owner/name")


def _doubt(workspace: Workspace) -> str:
    record, reason = read_report(workspace)
    if record is None:
        return reason
    return "" if record.get("ok") is True else "`mmq verify` found faults in it"


def _repository(api: HfApi, target: Target) -> RepoUrl:
    """The repository and its branch, made where they are not there."""
    repo = api.create_repo(target.repo, repo_type="model", private=target.private or None, exist_ok=True)
    if target.private and not api.repo_info(repo.repo_id).private:
        raise PushError(f"{target.repo} is there already and is public; --private does not change that")
    # refs/pr/1 is no branch: a pull request must be there.
    if target.revision and not target.revision.startswith("refs/"):
        try:
            api.repo_info(repo.repo_id, revision=target.revision)
        except RevisionNotFoundError:
            api.create_branch(repo.repo_id, branch=target.revision, exist_ok=True)
    return repo


def _check_content(workspace: Workspace) -> None:
    """Read every shard. Raises JournalError where one is not what restore wrote."""
    restore, reporter = workspace.journal.stage("restore"), workspace.reporter
    shards = {path: record for unit in restore.units for path, record in restore.files(unit).items()}
    weights = {record.name: record.size for record in shards.values()}
    reporter.start(name, weights, (), sum(weights.values()))
    for path, record in sorted(shards.items()):
        reporter.step(record.name, "reading", 0, 1)
        restore.check_content(path)
        reporter.unit(record.name)


@contextmanager
def _refusals(repo: str) -> Iterator[None]:
    """Whatever keeps the hub from taking it, as a PushError."""
    try:
        yield
    except MmqError:
        raise
    except HfHubHTTPError as error:
        raise PushError(f"the hub refuses {repo}: {one_line(error)}") from None
    except Exception as error:  # the hub's client and the libraries below it raise whatever they chose
        raise PushError(f"{repo} could not be uploaded: {one_line(error) or type(error).__name__}") from None
