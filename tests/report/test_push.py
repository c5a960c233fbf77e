"""mmq push: the dry run asks nobody, the upload sends exactly what was verified, to a server that plays the hub."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from huggingface_hub import ModelCard, constants
from typer.testing import CliRunner

from conftest import digests, edit_json
from mmq.cli.app import app
from mmq.prove.verify import verify_checkpoint
from mmq.recipe import load
from mmq.workdir.lock import lock
from mmq.workdir.workspace import Workspace

REPO = "me/tiny-hybrid"
TOKEN = "hf_test"
FILES = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
Mmq = Callable[..., subprocess.CompletedProcess[str]]


@dataclass
class Hub:
    """What the server knows: it answers as the hub's API does, and takes every file as a regular one.

    Attributes:
        requests: method and path of each, in order.
        branches: the files of each branch; None where there is no repository yet.
        cards: README.md's that were to be judged before a commit.
        public: whether a repository that is there is public.
        refuse: the status that answers a request, by a part of its path.
    """

    url: str = ""
    requests: list[str] = field(default_factory=list)
    branches: dict[str, dict[str, bytes]] | None = None
    messages: list[str] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    cards: list[str] = field(default_factory=list)
    public: bool = False
    refuse: dict[str, int] = field(default_factory=dict)
    during: Callable[[], None] = lambda: None

    def answer(self, method: str, path: str, body: bytes, authorization: str | None) -> tuple[int, Any, str]:
        """Status, JSON and the hub's error code."""
        for part, status in self.refuse.items():
            if part in path:
                return status, {"error": f"refused with {status}"}, ""
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}, ""
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            return 200, {}, ""
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            if self.branches is not None:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{REPO}"}, ""
            self.branches = {"main": {}}
            return 200, {"url": f"{self.url}/{REPO}", "name": REPO}, ""
        repo, _, rest = path.removeprefix("/api/models/").partition(f"{REPO}")
        if repo or self.branches is None:
            return 404, {"error": "Repository not found"}, "RepoNotFound"
        verb, _, revision = rest.strip("/").partition("/")
        if method == "GET":
            if revision and revision not in self.branches:
                return 404, {"error": f"Invalid rev id: {revision}"}, "RevisionNotFound"
            return 200, {"id": REPO, "sha": "0" * 40, "private": not self.public, "siblings": []}, ""
        if verb == "branch":
            self.branches[revision] = {}
            return 200, {}, ""
        if verb == "preupload":
            self.during()
            paths = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]}, ""
        assert verb == "commit", path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.messages.append(line["value"]["summary"])
            else:
                assert line["key"] == "file" and line["value"]["encoding"] == "base64"
                self.branches[revision][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.url}/{REPO}/commit/{'1' * 40}"}, ""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub on 127.0.0.1, which the client of this process and of its children talks to."""
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            found.requests.append(f"{self.command} {path}")
            status, value, code = found.answer(self.command, path, body, self.headers.get("Authorization"))
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _serve

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    settings = {
        "HF_ENDPOINT": found.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
        "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    # What the client read when it was imported.
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf/token"))
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def verified(finished_copy: Path) -> Path:
    """The finished project after `mmq verify`; its recipe."""
    recipe = finished_copy / "recipe.yaml"
    assert verify_checkpoint(Workspace.of(load(recipe))).problems == []
    return recipe


def push(recipe: Path, *options: str) -> Result:
    """`mmq push` in this process; an exception that a user would see as a traceback is raised here."""
    result = CliRunner().invoke(app, ["push", str(recipe), "--repo-id", REPO, *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(recipe: Path, *options: str) -> str:
    """The one sentence on standard error."""
    result = push(recipe, *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def hybrid(recipe: Path) -> Path:
    return recipe.parent / "run/hybrid"


NETWORK: list[str] = []


def _watch(event: str, _: object) -> None:
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        NETWORK.append(event)


@pytest.fixture(scope="module")
def network() -> list[str]:
    """Every look-up of a name and every connection of this process; Python never lets go of an audit hook."""
    sys.addaudithook(_watch)
    return NETWORK


def test_a_dry_run_asks_nobody_and_writes_nothing(verified: Path, hub: Hub, network: list[str]) -> None:
    before = digests(verified.parent)
    network.clear()
    result = push(verified, "--json")
    assert result.exit_code == 0, result.output
    assert network == [] and hub.requests == []
    assert digests(verified.parent) == before
    (found,) = map(json.loads, result.output.splitlines())
    sizes = {path.name: path.stat().st_size for path in hybrid(verified).iterdir()}
    assert found["files"].keys() == FILES
    assert {name: size for name, size in found["files"].items() if name != "README.md"} == sizes
    assert found["bytes"] == sum(found["files"].values())
    assert found["repo_id"] == REPO and found["verified"] is True and found["url"] is None
    assert "awq" in found["front_matter"]["tags"]
    push(verified, "--upload")
    assert "socket.connect" in network, "the watch sees an upload"


def test_a_dry_run_tells_people_what_is_to_know(finished_copy: Path, hub: Hub) -> None:
    recipe = finished_copy / "recipe.yaml"
    (hybrid(recipe) / "notes.txt").write_text("mine")
    (hybrid(recipe) / "x.safetensors.mmq-tmp").write_text("half")
    text = push(recipe).output
    assert "not verified: it was not verified" in text and f"next: mmq verify {recipe}" in text
    assert "left out, not from mmq: notes.txt, x.safetensors.mmq-tmp" in text
    assert "- compressed-tensors" in text and "10 files" in text and "Nothing was sent" in text
    verify_checkpoint(Workspace.of(load(recipe)))
    text = push(recipe, "--private", "--revision", "v1").output
    assert "have passed" in text and f"to {REPO}, branch v1, private" in text
    assert f"next: mmq push {recipe} --repo-id {REPO} --revision v1 --private --upload" in text
    assert hub.requests == []


def test_an_upload_by_the_real_command_sends_these_files(verified: Path, hub: Hub, mmq: Mmq) -> None:
    (hybrid(verified) / "notes.txt").write_text("mine")
    (hybrid(verified) / "README.md").write_text("an older card")
    process = mmq("push", verified, "--repo-id", REPO, "--private", "--upload", "--json")
    assert process.returncode == 0, process.stderr
    (result,) = (event for line in process.stdout.splitlines() if (event := json.loads(line))["event"] == "result")
    assert result["url"] == f"{hub.url}/{REPO}/commit/{'1' * 40}"
    assert hub.created == [{"name": "tiny-hybrid", "organization": "me", "visibility": "private", "type": "model"}]
    assert hub.branches is not None and hub.branches["main"].keys() == FILES
    for name, content in hub.branches["main"].items():
        assert content == (hybrid(verified) / name).read_bytes(), name
    card = hub.branches["main"]["README.md"].decode()
    assert f"\nvllm serve {REPO} " in card and "found no fault" in card
    assert result["front_matter"] == ModelCard(card).data.to_dict()
    assert {name: len(content) for name, content in hub.branches["main"].items()} == result["files"]


def test_an_upload_to_a_new_branch_with_a_message(verified: Path, hub: Hub) -> None:
    hub.branches = {"main": {}}
    for _ in range(2):
        result = push(verified, "--upload", "--revision", "v1", "--commit-message", "first", "--quiet")
        assert result.exit_code == 0, result.output
        assert result.output == ""
    assert hub.branches["main"] == {} and hub.branches["v1"].keys() == FILES
    assert hub.messages == ["first", "first"]
    assert hub.requests.count(f"POST /api/models/{REPO}/branch/v1") == 1


def test_the_work_dir_is_held_during_an_upload(verified: Path, hub: Hub) -> None:
    seen: list[subprocess.CompletedProcess[str]] = []

    def other_process() -> None:
        command = [sys.executable, "-c", "import sys; from pathlib import Path; from mmq.workdir.lock import lock\n"
                   "with lock(Path(sys.argv[1])): pass", str(verified.parent / "run")]  # fmt: skip
        seen.append(subprocess.run(command, capture_output=True, text=True, timeout=120, check=False))

    hub.during = other_process
    assert push(verified, "--upload").exit_code == 0
    assert len(seen) == 1 and "LockedError" in seen[0].stderr
    with lock(verified.parent / "run"):
        assert "is in use by" in refused(verified, "--upload")


def damage_content(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "restore not complete": (
        lambda run: edit_json(run / "journal.json", lambda j: j["stages"]["restore"].update(complete=False)),
        "run `mmq restore` first",
    ),
    "not verified": (lambda run: (run / "verify.json").unlink(), "it was not verified"),
    "verify found faults": (
        lambda run: edit_json(run / "verify.json", lambda record: record.update(ok=False, problems=["x"])),
        "found faults",
    ),
    "of an older mmq": (
        lambda run: edit_json(run / "verify.json", lambda record: record.pop("files")),
        "it is not what was verified",
    ),
    "another config since": (
        lambda run: edit_json(run / "hybrid/config.json", lambda config: config.update(x=1)),
        "config.json differs",
    ),
    "a lost file": (lambda run: (run / "hybrid/tokenizer.json").unlink(), "tokenizer.json differs"),
    "a lost shard": (lambda run: (run / "hybrid/model-00001-of-00003.safetensors").unlink(), "is gone"),
    "another shard of the same size": (lambda run: damage_content(run / "hybrid"), "is not what restore wrote"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_was_not_verified_is_not_sent(verified: Path, hub: Hub, case: str) -> None:
    change, message = REFUSALS[case]
    change(verified.parent / "run")
    assert message in refused(verified, "--upload")
    assert not hub.branches or hub.branches == {"main": {}}
    assert not hub.messages


def test_unverified_sends_it_all_the_same(finished_copy: Path, hub: Hub) -> None:
    result = push(finished_copy / "recipe.yaml", "--upload", "--unverified")
    assert result.exit_code == 0, result.output
    assert hub.branches is not None and b"Not verified" in hub.branches["main"]["README.md"]


def test_what_the_hub_says_is_one_sentence(verified: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    card = hybrid(verified) / "README.md"
    hub.refuse = {"/api/repos/create": 403, f"/api/models/{REPO}": 404}
    assert "the hub refuses" in (message := refused(verified, "--upload")) and "403" in message
    hub.refuse = {"/preupload/": 403}
    assert "403" in refused(verified, "--upload")
    hub.refuse = {"/commit/": 400}
    assert "400" in refused(verified, "--upload")
    hub.refuse, hub.public = {}, True
    assert "is public" in refused(verified, "--upload", "--private")
    assert hub.messages == []
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "401" in (message := refused(verified, "--upload")) and "hf_wrong" not in message
    monkeypatch.delenv("HF_TOKEN")
    sent = len(hub.requests)
    assert "hf auth login" in refused(verified, "--upload")
    assert len(hub.requests) == sent
    assert card.exists()


def test_no_network_is_one_sentence(verified: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "could not be uploaded" in refused(verified, "--upload")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline" in refused(verified, "--upload")


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "me/tiny model", "me/..", "", "me/", "/tiny"])
def test_a_name_that_is_none_is_refused(verified: Path, name: str) -> None:
    result = CliRunner().invoke(app, ["push", str(verified), "--repo-id", name])
    assert result.exit_code == 2
    assert re.match(r"error: .*is no name of a repository", result.stderr)


def test_nothing_to_push(project: Path) -> None:
    assert "run `mmq restore` first" in refused(project / "recipe.yaml")
