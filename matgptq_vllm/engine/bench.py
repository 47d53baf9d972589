"""Time of the bookkeeping before a step: ``python -m matgptq_vllm.engine.bench --requests 256``.

A decode step of 256 requests takes some milliseconds; the bookkeeping is to be below 1% of it. On a GPU, ``--device cuda``
adds what it takes to start the copies; the copies themselves overlap with the step before.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
import torch

from matgptq_vllm.core.precision import WIDTHS, Catalogue, uniform_name
from matgptq_vllm.engine.precision_state import PrecisionState
from matgptq_vllm.engine.replica import MAX_PROFILES
from matgptq_vllm.engine.step_buffers import StepBuffers

MAX_TOKENS = 16384
"""Rows of the largest step, as vLLM's default on a large GPU."""


def step_times_us(num_requests: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Median microseconds of ``PrecisionState``'s part of a decode step, by what changed since the step before.

    Returns:
        ``same``: the same requests; ``changed``: one request ended and another began, profiles mixed; ``one profile``: as
        ``changed``, but all requests have one profile; ``graph``: to find the graph of a step.
    """
    catalogue = Catalogue(tuple(map(uniform_name, WIDTHS)), uniform_name(WIDTHS[-1]))
    state = PrecisionState(catalogue, StepBuffers(MAX_TOKENS, MAX_PROFILES, catalogue.index(None), device))
    rows = np.ones(num_requests, dtype=np.int32)

    def start(mixed: bool) -> list[str]:
        req_ids = [f"request-{index}" for index in range(num_requests)]
        for index, req_id in enumerate(req_ids):
            state.add_request(req_id, catalogue.profiles[index % len(catalogue.profiles) if mixed else 0])
        return req_ids

    def replace(req_ids: list[str], number: int, mixed: bool) -> None:
        ended, begun = req_ids[number % num_requests], f"later-{number}"
        state.remove_requests([ended])
        state.add_request(begun, catalogue.profiles[number % len(catalogue.profiles) if mixed else 0])
        req_ids[number % num_requests] = begun

    def timed(mixed: bool, changing: bool) -> float:
        req_ids = start(mixed)

        def step(number: int) -> None:
            if changing:
                replace(req_ids, number, mixed)
            # The runner makes a new list for every step.
            state.write_step(list(req_ids), rows)

        return _median_us(step, repeats)

    found = {"same": timed(True, False), "changed": timed(True, True), "one profile": timed(False, True)}
    req_ids = start(False)
    found["graph"] = _median_us(lambda _: state.common_profile(req_ids), repeats)
    return found


def _median_us(step: Callable[[int], object], repeats: int) -> float:
    times = []
    for number in range(repeats):
        begin = time.perf_counter_ns()
        step(number)
        times.append(time.perf_counter_ns() - begin)
    return median(times) / 1e3


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per kind of step."""
    parser = argparse.ArgumentParser(prog="python -m matgptq_vllm.engine.bench", description="Time the bookkeeping of a step.")
    parser.add_argument("--requests", type=int, default=256, help="requests of a step (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the step's buffers are: cpu or cuda (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2000, help="steps of each kind (default: %(default)s)")
    given = parser.parse_args(arguments)
    for name, microseconds in step_times_us(given.requests, torch.device(given.device), given.repeats).items():
        print(f"{name:12} {microseconds:7.1f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
