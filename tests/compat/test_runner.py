"""compat.runner: what a runner gains, with a runner that only notes what its layers would read."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType, SimpleNamespace

import numpy as np
import torch

from matgptq_vllm.compat.runner import add_precision, requested_precision
from matgptq_vllm.core.precision import GROUP_KEY, XARGS_KEY, Catalogue
from matgptq_vllm.engine.precision_state import PrecisionState
from matgptq_vllm.engine.step_buffers import StepBuffers

ROWS = np.array([2, 3], dtype=np.int32)


class Runner:
    """As much of runner V1 as the hook touches."""

    def __init__(self, buffers: StepBuffers) -> None:
        self.buffers = buffers
        self.input_batch = SimpleNamespace(req_ids=["b", "a"])

    def execute_model(self, scheduler_output: SimpleNamespace) -> list[int]:
        self._prepare_inputs(scheduler_output, ROWS)
        return self.buffers.token_profiles.tolist()

    def _prepare_inputs(self, scheduler_output: SimpleNamespace, num_scheduled_tokens: np.ndarray) -> None:
        pass

    def _dummy_run(self, num_tokens: int) -> tuple[list[int], list[int]]:
        return self.buffers.token_profiles[:num_tokens].tolist(), self.buffers.row_order[:num_tokens].tolist()


def new_request(req_id: str, precision: str, **extra_args: str) -> SimpleNamespace:
    parameters = SimpleNamespace(extra_args={XARGS_KEY: precision, **extra_args})
    return SimpleNamespace(
        req_id=req_id, sampling_params=parameters, pooling_params=None, prompt_token_ids=[1, 2, 3], prompt_embeds=None
    )


def step(new: Sequence[SimpleNamespace] = (), running: Mapping[str, int] = MappingProxyType({})) -> SimpleNamespace:
    """What a scheduler says of a step: ``running`` are requests that ran before, with the tokens computed of each."""
    cached = SimpleNamespace(req_ids=list(running), num_computed_tokens=list(running.values()), resumed_req_ids=set())
    return SimpleNamespace(finished_req_ids=(), scheduled_new_reqs=new, scheduled_cached_reqs=cached)


def test_a_run_without_requests_reads_nothing_of_the_step_before() -> None:
    catalogue = Catalogue(("2", "4", "8"), "8")
    buffers = StepBuffers(8, 3, catalogue.index(None), torch.device("cpu"))
    runner = Runner(buffers)
    add_precision(runner, PrecisionState(catalogue, buffers))
    requests = [new_request("a", "2"), new_request("b", "4")]
    profiles = runner.execute_model(step(requests))
    assert profiles[:5] == [1, 1, 0, 0, 0]
    # The step's order would send one row to places that this run does not have.
    assert buffers.row_order[0] == 2
    assert runner._dummy_run(1) == ([2], [0])


def test_a_running_request_follows_its_group_with_the_next_step() -> None:
    catalogue = Catalogue(("2", "4", "8"), "8")
    buffers = StepBuffers(8, 3, catalogue.index(None), torch.device("cpu"))
    runner, state = Runner(buffers), PrecisionState(catalogue, buffers)
    add_precision(runner, state)
    runner.execute_model(step([new_request("a", "8", **{GROUP_KEY: "g"}), new_request("b", "8")]))
    state.follow({"g": "2"})
    # Rows: two of b, three of a.
    assert runner.execute_model(step((), {"a": 7, "b": 9}))[:5] == [2, 2, 0, 0, 0]


def test_parameters_of_either_kind_ask_for_a_precision() -> None:
    for extra, wanted in (({XARGS_KEY: "3"}, "3"), ({}, None), (None, None)):
        sampled = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra), pooling_params=None)
        pooled = SimpleNamespace(sampling_params=None, pooling_params=SimpleNamespace(extra_kwargs=extra))
        assert requested_precision(sampled) == requested_precision(pooled) == wanted
