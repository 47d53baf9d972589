"""compat.runner: what a runner gains, with a runner that only notes what its layers would read."""

from types import SimpleNamespace

import numpy as np
import torch

from matgptq_vllm.compat.runner import add_precision, requested_precision
from matgptq_vllm.core.precision import XARGS_KEY, Catalogue
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


def new_request(req_id: str, precision: str) -> SimpleNamespace:
    params = SimpleNamespace(extra_args={XARGS_KEY: precision})
    return SimpleNamespace(req_id=req_id, sampling_params=params, pooling_params=None)


def test_a_run_without_requests_reads_nothing_of_the_step_before() -> None:
    catalogue = Catalogue(("2", "4", "8"), "8")
    buffers = StepBuffers(8, 3, catalogue.index(None), torch.device("cpu"))
    runner = Runner(buffers)
    add_precision(runner, PrecisionState(catalogue, buffers))
    requests = [new_request("a", "2"), new_request("b", "4")]
    profiles = runner.execute_model(SimpleNamespace(finished_req_ids=(), scheduled_new_reqs=requests))
    assert profiles[:5] == [1, 1, 0, 0, 0]
    # The step's order would send one row to places that this run does not have.
    assert buffers.row_order[0] == 2
    assert runner._dummy_run(1) == ([2], [0])


def test_parameters_of_either_kind_ask_for_a_precision() -> None:
    for extra, wanted in (({XARGS_KEY: "3"}, "3"), ({}, None), (None, None)):
        sampled = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra), pooling_params=None)
        pooled = SimpleNamespace(sampling_params=None, pooling_params=SimpleNamespace(extra_kwargs=extra))
        assert requested_precision(sampled) == requested_precision(pooled) == wanted
