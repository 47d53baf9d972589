"""Work on several items at a time while results are taken in order, few of them waiting."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_THREADS = 16
"""Enough to reach the memory's speed with digests; more only take turns."""


def num_threads() -> int:
    """Threads for reading on this machine: what it has, no more than MAX_THREADS, but two for waiting on a disk."""
    return min(max(len(os.sched_getaffinity(0)), 2), MAX_THREADS)


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``map(work, items)`` by threads. At most twice as many results exist as there are threads.

    The first exception of ``work`` is raised where its result would have come; nothing is begun after it.
    """
    threads = num_threads()
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="read-ahead") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
