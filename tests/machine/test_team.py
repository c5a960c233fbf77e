"""How a rank learns that another is gone that it can't look at, or that it never comes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

import mmq.machine.team
from mmq.errors import RankError
from mmq.machine.team import Team


@pytest.fixture
def store() -> dist.Store:
    """With a second rank of another host, which has said where it is."""
    store = dist.HashStore()
    store.set("rank/1", json.dumps({"host": "elsewhere", "process": 1}))
    store.set("alive/1", "12.5 awq, layer-00007: searching")
    return store


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    monkeypatch.setattr(mmq.machine.team, "HEARTBEAT", 0.2)
    monkeypatch.setattr(mmq.machine.team, "SILENCE", 1.0)
    yield 0.5


WHERE = "the last that it said was: awq, layer-00007: searching"


def test_who_gives_no_sign_of_life_any_more_is_named(store: dist.Store, patience: float) -> None:
    found = Team(0, 2, store).failure(patience)
    assert str(found) == f"rank 1 (process 1 on elsewhere) gives no sign of life any more; {WHERE}"


def test_its_word_is_not_waited_for(store: dist.Store, patience: float) -> None:
    with pytest.raises(RankError) as refused:
        Team(0, 2, store).everyone("here")
    assert str(refused.value) == f"rank 1 (process 1 on elsewhere) gave no sign of life for 1 seconds; {WHERE}"


def test_who_lives_may_take_its_time(store: dist.Store, patience: float) -> None:
    """As long as signs come, a word may be late, and is taken; nobody has failed."""

    def live() -> None:
        for beat in range(20):
            store.set("alive/1", f"{beat} awq")
            time.sleep(0.1)
        store.set("main/0/1", json.dumps("there"))

    thread = threading.Thread(target=live)
    thread.start()
    team = Team(0, 2, store)
    try:
        assert team.failure(patience) is None
        assert team.everyone("here") == ["here", "there"]
    finally:
        thread.join()


def test_who_ended_in_order_did_not_fail(store: dist.Store, patience: float) -> None:
    store.set("ended/1", "")
    assert Team(0, 2, store).failure(patience) is None


RANK = """
import sys, time, torch
from mmq.errors import RankError
from mmq.machine.team import Team

team = Team.join("cpu")
team.at("reading" if team.rank else "searching")
team.together()
if team.rank:
    time.sleep(600)
try:
    team.gather(torch.ones(2, 3), [2, 2])
except RankError as error:
    sys.exit(f"error: {error}")
"""


def test_a_collective_that_does_not_end_ends_by_its_time() -> None:
    """Whoever does not come lives, and says where it is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    given |= {"MMQ_RANK_TIMEOUT": "3", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=os.environ | given | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        _, stderr = ranks[0].communicate(timeout=120)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    said = stderr.strip().splitlines()[-1]
    assert ranks[0].returncode == 1
    assert said.startswith("error: the ranks' gather failed or took more than 3 seconds (MMQ_RANK_TIMEOUT): ")
    assert re.search(rf"; rank 1 \(process {ranks[1].pid} on \S+\) was at: reading$", said)
