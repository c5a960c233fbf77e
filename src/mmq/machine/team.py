"""The processes of one run, its ranks, and what they tell each other.

torchrun or `accelerate launch` starts them; without either there is one, and everything here is done at once. Tensors
go by torch.distributed's collectives, which the main thread alone calls. Small facts go as JSON through the key-value
store that brought the ranks together, from any thread, so that who waits there sees whether a rank has failed.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmq.errors import RankError, RecipeError, one_line
from mmq.machine.device import named_device
from mmq.machine.signals import signals_fatal, signals_held

# Seconds that a rank waits for another before it gives up; torch's own value for Gloo.
PATIENCE = float(os.environ.get("MMQ_RANK_TIMEOUT", "1800"))
# Seconds from a rank's end until the others have heard why, or take it that none will say; and from a signal.
LAST_WORDS, STOPPED = 5.0, 1.0
# Seconds between two signs of life; those without any after which a rank is given up while another waits for its word.
HEARTBEAT, TOLD_EVERY = 2.0, 0.5
SILENCE = min(60.0, PATIENCE)
FAILED = "failed"


class Team:
    """The ranks of a run as one of them sees them.

    Attributes:
        rank, size: this one's number, and how many there are.
        waited: seconds that this rank's computations stood still for the others.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, name: str = "main") -> None:
        self.rank, self.size, self.waited = rank, size, 0.0
        self._store, self._name, self._said, self._taken = store, name, 0, 0
        self._where, self._told = "", 0.0

    @classmethod
    def join(cls, device: str) -> Team:
        """The ranks that a launcher's environment speaks of; alone where it speaks of none.

        Args:
            device: the recipe's; a GPU's number is the rank's own among those of its host.

        Raises:
            RecipeError: it names one of several GPUs.
            RankError: the others don't come.
        """
        global _joined
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1 or "RANK" not in os.environ or _joined is not ALONE:
            return _joined
        if ":" in device:
            raise RecipeError(
                f"awq.device: {device} is one device, and {size} ranks were started; cuda gives each its own"
            )
        from accelerate import PartialState

        try:
            # Warnings are of numbers of threads, which are the user's to set.
            with signals_fatal(), warnings.catch_warnings(action="ignore"):
                cpu = named_device(device).type == "cpu"
                state = PartialState(cpu=cpu, timeout=timedelta(seconds=PATIENCE))
        except (RuntimeError, ValueError) as error:
            raise RankError(f"the {size} ranks don't come together: {one_line(error)}") from None
        store = _Store(dist.PrefixStore("mmq", dist.distributed_c10d._get_default_store()))
        # Known before it says who it is: a signal from here on finds whom to tell that this rank leaves.
        _joined = team = cls(state.process_index, state.num_processes, store)
        store.set(f"rank/{team.rank}", json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
        with signals_held():
            threading.Thread(target=team._live, name="mmq-alive", daemon=True).start()
        return team

    def apart(self, name: str) -> Team:
        """The same ranks for another thread's facts."""
        return Team(self.rank, self.size, self._store, name)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes the journal, and speaks."""
        return self.rank == 0

    def parts(self, count: int) -> list[range]:
        """`count` things in order, shared out among the ranks: as many to each, but for one."""
        edges = [count * rank // self.size for rank in range(self.size + 1)]
        return [range(first, last) for first, last in pairwise(edges)]

    def part(self, count: int) -> range:
        """Those of `count` things that are this rank's."""
        return self.parts(count)[self.rank]

    # Tensors: by all ranks alike, from the main thread.

    def gather(self, own: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Every rank's rows [counts[rank], ...], one rank's after the other's: [sum, ...]."""
        if self.size == 1:
            return own
        most = max(counts)
        width = own.shape[1:]
        flat = _bytes(own)
        sent = flat.new_zeros(most, flat.shape[1])
        sent[: len(flat)] = flat
        received = flat.new_empty(self.size, most, flat.shape[1])
        with self._waiting("gather"):
            dist.all_gather(list(received), sent)
        whole = torch.cat([rows[:count] for rows, count in zip(received, counts, strict=True)])
        return whole.view(-1).view(own.dtype).view(sum(counts), *width)

    def gather_parts(self, own: torch.Tensor, count: int) -> torch.Tensor:
        """`gather` of things shared out as `parts` has them: [count, ...]."""
        return self.gather(own, [len(part) for part in self.parts(count)])

    def exchange(self, rows: torch.Tensor, sent: Sequence[int], received: Sequence[int], out: torch.Tensor) -> Exchange:
        """Begin to send each rank its rows, and to take its for this one.

        Args:
            rows: [sum(sent), n], rank 0's first.
            received: how many come from each rank.
            out: [sum(received), n], filled in the ranks' order.
        """
        given, wanted = _bytes(rows), _bytes(out)
        with self._failing("exchange"):
            work = dist.all_to_all_single(wanted, given, list(received), list(sent), async_op=True)
        return Exchange(self, work, given)

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Element by element over the ranks."""
        return self._extreme(tensor, dist.ReduceOp.MAX)

    def least(self, tensor: torch.Tensor) -> torch.Tensor:
        """Element by element over the ranks."""
        return self._extreme(tensor, dist.ReduceOp.MIN)

    def _extreme(self, tensor: torch.Tensor, operation: Any) -> torch.Tensor:
        if self.size == 1:
            return tensor
        result = tensor.float().contiguous()  # exact for every narrower dtype
        with self._waiting("reduce"):
            dist.all_reduce(result, operation)
        return result.to(tensor.dtype)

    # Facts: from any thread, in the same order on every rank.

    def everyone(self, fact: Any) -> list[Any]:
        """What every rank says here, as JSON, by rank. None goes on before all have spoken."""
        if self.size == 1:
            return [fact]
        said, self._said = self._said, self._said + 1
        self._store.set(self._key(said, self.rank), json.dumps(fact))
        begin = time.perf_counter()
        facts = [json.loads(self._await(self._key(said, rank), rank)) for rank in range(self.size)]
        self.waited += time.perf_counter() - begin
        if said:
            # All have read it: they have spoken since.
            self._store.delete_key(self._key(said - 1, self.rank))
        return facts

    def leader_says(self, fact: Any = None) -> Any:
        """What rank 0 says."""
        return self.everyone(fact)[0]

    def together(self) -> None:
        """None goes on before all have come here."""
        self.everyone(None)

    def at(self, where: str) -> None:
        """Say where this rank is, for who asks when it is missed."""
        self._where = where
        if self.size > 1 and time.monotonic() - self._told > TOLD_EVERY:
            self._live_once()

    def whereabouts(self) -> list[str]:
        """Where each of several ranks said last that it is; empty where it said nothing."""
        return [self._whereabouts(rank) for rank in range(self.size)] if self.size > 1 else []

    def _whereabouts(self, rank: int) -> str:
        return (self._known(f"alive/{rank}") or "").partition(" ")[2]

    def _live(self) -> None:
        """Give signs of life until the process, or the store, ends."""
        with suppress(RankError):
            while True:
                self._live_once()
                time.sleep(HEARTBEAT)

    def _live_once(self) -> None:
        self._told = time.monotonic()
        self._store.set(f"alive/{self.rank}", f"{self._told} {self._where}")

    def post(self, letter: Any) -> None:
        """Send rank 0 something that it takes when it can."""
        self._store.set(f"letter/{self._store.add('letters', 1)}", json.dumps(letter))

    def letters(self) -> list[Any]:
        """What was sent to rank 0 since it asked last."""
        first, self._taken = self._taken + 1, int(self._store.add("letters", 0))
        return [json.loads(self._await(f"letter/{number}", 0)) for number in range(first, self._taken + 1)]

    # Ends.

    def fail(self, sentence: str, code: int) -> None:
        """Tell the others why this rank ends."""
        if self.size > 1:
            with suppress(RankError):  # the store may have gone first
                self._store.set(f"ended/{self.rank}", sentence)
                self._store.compare_set(FAILED, "", json.dumps({"rank": self.rank, "sentence": sentence, "code": code}))

    def leave(self) -> None:
        """Tell the others that this rank ends for no fault of its own."""
        if self.size > 1:
            with suppress(RankError):
                self._store.set(f"ended/{self.rank}", "")

    def close(self) -> None:
        """The run has ended well: nothing is to be told any more."""
        if self.size > 1:
            self.leave()
            dist.destroy_process_group()

    def failure(self, patience: float = 0.0) -> RankError | None:
        """Which rank failed, as is known within some seconds: one that said so, one that died, or one that gave no
        sign of life while two were due."""
        if self.size == 1:
            return None
        others = [rank for rank in range(self.size) if rank != self.rank]
        signs = {rank: self._known(f"alive/{rank}") for rank in others} if patience >= 2 * HEARTBEAT else {}
        until = time.monotonic() + patience
        while True:
            if told := self._known(FAILED):
                known = json.loads(told)
                error = RankError(f"rank {known['rank']}{self._place(known['rank'])}: {known['sentence']}")
                error.exit_code = known["code"]
                return error
            for rank in others:
                if self._is_dead(rank):
                    return RankError(f"rank {rank}{self._place(rank)} died without a word{self._last_words(rank)}")
            if time.monotonic() > until:
                break
            time.sleep(0.1)
        for rank, sign in signs.items():
            if self._known(f"ended/{rank}") is None and self._known(f"alive/{rank}") == sign:
                return RankError(
                    f"rank {rank}{self._place(rank)} gives no sign of life any more{self._last_words(rank)}"
                )
        return None

    def _is_dead(self, rank: int) -> bool:
        """Whether a rank of this host is gone and has not said why."""
        facts = self._facts(rank)
        if facts.get("host") != socket.gethostname() or self._known(f"ended/{rank}") is not None:
            return False
        try:
            stat = Path(f"/proc/{facts['process']}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            return True
        return stat.rpartition(")")[2].split()[0] in "ZX"

    def _place(self, rank: int) -> str:
        facts = self._facts(rank)
        return f" (process {facts['process']} on {facts['host']})" if facts else ""

    def _facts(self, rank: int) -> dict[str, Any]:
        return json.loads(self._known(f"rank/{rank}") or "{}")

    def _key(self, said: int, rank: int) -> str:
        return f"{self._name}/{said}/{rank}"

    def _known(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _await(self, key: str, rank: int) -> str:
        """What a rank will say. A living one may take its time.

        Raises:
            RankError: a rank failed, or this one gave no sign of life for too long.
        """
        pause, looked = 0.0005, time.monotonic()
        sign, heard = None, looked
        while (found := self._known(key)) is None:
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
            now = time.monotonic()
            if now - looked < 0.5:
                continue
            looked = now
            if (error := self.failure()) is not None:
                raise error
            last = self._known(f"alive/{rank}")
            sign, heard = (last, now) if last != sign else (sign, heard)
            if now - heard > SILENCE:
                raise RankError(
                    f"rank {rank}{self._place(rank)} gave no sign of life for {SILENCE:.0f} seconds"
                    f"{self._last_words(rank)}"
                )
        return found

    def _last_words(self, rank: int) -> str:
        where = self._whereabouts(rank)
        return f"; the last that it said was: {where}" if where else ""

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        begin = time.perf_counter()
        with self._failing(what):
            yield
        self.waited += time.perf_counter() - begin

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """What a collective raises when another rank is gone or late names the connection, not the rank."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            found = self.failure(LAST_WORDS)
            if found is None:
                others = (rank for rank in range(self.size) if rank != self.rank)
                said = "; ".join(f"rank {rank}{self._place(rank)} was at: {self._whereabouts(rank)}" for rank in others)
                found = RankError(
                    f"the ranks' {what} failed or took more than {PATIENCE:.0f} seconds (MMQ_RANK_TIMEOUT):"
                    f" {one_line(error)}; {said}"
                )
            raise found from None


class _Store:
    """The launcher's key-value store, whose loss is a rank's error like others."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def ask(*arguments: Any) -> Any:
            try:
                return method(*arguments)
            except RuntimeError as error:
                raise RankError(
                    f"the launcher, which keeps what the ranks tell each other, is gone: {one_line(error)}"
                ) from None

        return ask


class Exchange:
    """Rows on their way between the ranks."""

    def __init__(self, team: Team, work: Any, given: torch.Tensor) -> None:
        self._team, self._work, self._given = team, work, given

    def wait(self) -> None:
        """What is computed from now on finds them there."""
        with self._team._waiting("exchange"):
            self._work.wait()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor [n, ...] as uint8 [n, bytes]: not every backend knows every dtype."""
    width = math.prod(tensor.shape[1:]) * tensor.element_size()
    return tensor.contiguous().view(-1).view(torch.uint8).view(len(tensor), width)


ALONE = Team()
_joined = ALONE


def joined() -> Team:
    """The ranks of this process's run, once it has joined them."""
    return _joined
