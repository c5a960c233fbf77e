"""Threads that compute, and threads that read and write: none of them takes a signal."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

from mmq.machine.signals import signals_held

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(function: Callable[[Item], Result], items: Iterable[Item], workers: int, cores: int = 1) -> list[Result]:
    """The function of every item, in the items' order, on the calling thread and as many more as make up the workers.
    None of them runs on when this returns or raises, and the first error is raised.

    Args:
        function: must not call `each`.
        cores: torch's threads for each worker; a single one has those that the calling thread has.
    """
    if workers == 1:
        return [function(item) for item in items]
    left = deque(enumerate(items))
    results: dict[int, Result] = {}

    def work() -> None:
        while True:
            try:
                number, item = left.popleft()
            except IndexError:
                return
            try:
                results[number] = function(item)
            except BaseException:
                left.clear()
                raise

    pool, kept = _kept_pool(workers - 1, cores), torch.get_num_threads()
    futures: list[Future[None]] = []
    try:
        with signals_held():
            futures += [pool.submit(work) for _ in range(workers - 1)]
        torch.set_num_threads(cores)
        work()
    finally:
        left.clear()
        wait(futures)
        # Set in a thread, the number holds for threads to come as well.
        torch.set_num_threads(kept)
    for future in futures:
        future.result()
    return [results[number] for number in range(len(results))]


@cache
def _kept_pool(workers: int, cores: int) -> ThreadPoolExecutor:
    """A pool that lives as long as the process: the search shares out a few milliseconds at a time, and new threads
    would take as long to begin."""
    pool = ThreadPoolExecutor(workers, "mmq-compute", _take_cores, (cores,))
    running = Barrier(workers + 1)
    with signals_held():
        for _ in range(workers):
            pool.submit(running.wait)
        running.wait()
    return pool


os.register_at_fork(after_in_child=_kept_pool.cache_clear)


@contextmanager
def computing(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads have one of torch's own threads each; to be filled under `signals_held`."""
    kept = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=_take_cores, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(kept)


def _take_cores(number: int) -> None:
    """Have the calling thread compute on a number of torch's threads, without gradients."""
    # Whether they are recorded is each thread's own affair.
    torch.set_grad_enabled(False)
    # A thread takes the process's number when it first computes or asks, over any set before.
    torch.get_num_threads()
    torch.set_num_threads(number)


def one_thread(name: str) -> ThreadPoolExecutor:
    """A pool of one thread that is running already, with as many of torch's threads as the caller; see
    `signals_held`."""
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)
    with signals_held():
        pool.submit(torch.get_num_threads)
    return pool
