"""compat.graphs: which graphs vLLM's own manager captures and chooses when they are keyed by profile. Captures nothing."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from matgptq_vllm.compat import graphs
from matgptq_vllm.core.precision import Catalogue
from matgptq_vllm.engine.precision_state import PrecisionState
from matgptq_vllm.engine.step_buffers import ANY_PROFILE, StepBuffers

CATALOGUE = Catalogue(("2", "4", "8"), "8")
SIZES = [1, 2, 8, 16, 24, 48, 56, 128, 288]


@pytest.fixture
def state() -> PrecisionState:
    return PrecisionState(CATALOGUE, StepBuffers(256, 8, CATALOGUE.index(None), torch.device("cpu")))


@pytest.fixture
def manager(state: PrecisionState, monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's manager of runner V2 with graphs for widths 2 and 8; it believes that it has captured."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu import cudagraph_utils

    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True))
    pool = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(cudagraph_utils, "current_platform", pool)
    config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=130),
        parallel_config=SimpleNamespace(data_parallel_size=1, tensor_parallel_size=1),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=SIZES, max_cudagraph_capture_size=288),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        speculative_config=None,
    )
    found = cudagraph_utils.ModelCudaGraphManager(config, torch.device("cpu"), CUDAGraphMode.FULL_AND_PIECEWISE, 1)
    graphs.key_by_profile(found, state, [CATALOGUE.index("2"), CATALOGUE.index("8")])
    found._graphs_captured = True
    return found


def chosen(manager: Any, profile: str | None, num_reqs: int, num_tokens: int | None = None) -> tuple[str, int, int]:
    """Mode, size and number of the graph for a step."""
    manager.step_profile = None if profile is None else CATALOGUE.index(profile)
    tokens = num_reqs if num_tokens is None else num_tokens
    uniform = 1 if tokens == num_reqs else None
    desc = manager.dispatch(num_reqs, tokens, uniform, num_active_loras=0)
    return desc.cg_mode.name, desc.num_tokens, desc.num_active_loras


def test_graphs_of_one_profile_are_bounded(manager: Any) -> None:
    captured = [
        (mode.name, desc.num_tokens, desc.num_active_loras) for mode, descs in manager._capture_descs.items() for desc in descs
    ]
    assert sorted(size for mode, size, number in captured if mode == "FULL" and number == 0) == SIZES[:-1]
    assert sorted(size for mode, size, number in captured if mode == "PIECEWISE") == SIZES
    assert sorted((size, number) for mode, size, number in captured if number) == [
        (s, n) for s in (1, 2, 8, 16, 24, 56, 128) for n in (1, 2)
    ]
    assert len(captured) == 31


def test_ranges_are_those_that_kernels_are_compiled_for() -> None:
    from matgptq_vllm.kernels import compile_ahead

    assert tuple(rows for rows in compile_ahead.ROWS if rows <= graphs.MAX_REQUESTS) == graphs.RANGES


def test_a_decode_step_of_one_profile_runs_its_own_graph(manager: Any) -> None:
    assert chosen(manager, "2", 5) == ("FULL", 8, 1)
    assert chosen(manager, "8", 56) == ("FULL", 56, 2)
    assert chosen(manager, "8", 40) == ("FULL", 56, 2)  # a range of rows has one graph, which takes the same time
    assert chosen(manager, "2", 57) == ("FULL", 128, 1)
    assert chosen(manager, "2", 1) == ("FULL", 1, 1)


def test_every_other_step_runs_the_graphs_of_any_mix(manager: Any) -> None:
    assert chosen(manager, None, 5) == ("FULL", 8, 0)
    assert chosen(manager, "4", 5) == ("FULL", 8, 0)  # has no graph of its own
    assert chosen(manager, "2", 129)[2] == 0  # too large for one
    assert chosen(manager, "2", 3, num_tokens=40) == ("PIECEWISE", 48, 0)  # not a decode step
    assert chosen(manager, "2", 3, num_tokens=500) == ("NONE", 500, 0)


def test_a_graph_is_captured_with_the_kernels_of_its_profile(manager: Any, state: PrecisionState, monkeypatch: Any) -> None:
    seen = []

    def capture(self: Any, create_forward_fn: Any, description: str) -> None:
        for descs in self._capture_descs.values():
            for desc in descs:
                create_forward_fn(desc, warmup=True)
                buffers = state._buffers
                seen.append((desc.num_active_loras, int(buffers.graph_profile), buffers.token_profiles.unique().tolist()))

    from vllm.v1.worker.gpu import cudagraph_utils

    monkeypatch.setattr(cudagraph_utils.CudaGraphManager, "capture", capture)
    monkeypatch.setattr(cudagraph_utils, "has_compiled_submodule", lambda model: True, raising=False)
    monkeypatch.setattr(cudagraph_utils, "prepare_inputs_to_capture", lambda *args, **kwargs: (None, None))
    inputs = SimpleNamespace(**dict.fromkeys(("input_ids", "positions", "is_padding"), torch.zeros(288)))
    model_state = SimpleNamespace(prepare_dummy_inputs=lambda *args: {})
    manager.capture(torch.nn.Identity(), model_state, inputs, None, None, [], None, lora_capture_hook=None)
    assert {(number, profile, *rows) for number, profile, rows in seen} == {(0, ANY_PROFILE, 2), (1, 0, 0), (2, 2, 2)}


@pytest.mark.parametrize(
    ("mode", "runner", "device", "expected"),
    [
        ("FULL_AND_PIECEWISE", "v2", "cuda", True),
        ("FULL_DECODE_ONLY", "v2", "cuda", True),
        ("PIECEWISE", "v2", "cuda", False),
        ("NONE", "v2", "cuda", False),
        ("FULL_AND_PIECEWISE", "v1", "cuda", False),
        ("FULL_AND_PIECEWISE", "v2", "cpu", False),
    ],
)
def test_graphs_are_keyed_unless_told_otherwise_where_decode_steps_are_captured(
    mode: str, runner: str, device: str, expected: bool
) -> None:
    from vllm.config.compilation import CUDAGraphMode

    config = SimpleNamespace(
        lora_config=None, speculative_config=None, parallel_config=SimpleNamespace(data_parallel_size=1),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode]),
    )  # fmt: skip
    assert graphs.by_default(config, runner, torch.device(device)) is expected


@pytest.mark.parametrize(
    ("changed", "runner", "why"),
    [
        ({}, "v2", None),
        ({}, "v1", "runner V2"),
        ({"lora_config": object()}, "v2", "LoRA"),
        ({"speculative_config": object()}, "v2", "speculative"),
        ({"parallel_config": SimpleNamespace(data_parallel_size=2)}, "v2", "data-parallel"),
    ],
)
def test_graphs_stay_as_they_are_where_the_key_is_taken(changed: dict[str, Any], runner: str, why: str | None) -> None:
    plain = {"lora_config": None, "speculative_config": None, "parallel_config": SimpleNamespace(data_parallel_size=1)}
    said = graphs.unsupported(SimpleNamespace(**{**plain, **changed}), runner)
    assert said is None if why is None else said is not None and why in said
