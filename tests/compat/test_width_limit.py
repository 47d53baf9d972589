"""compat.scheduler: a width limit is answered when nothing wider is left, whoever asks for what in the meantime."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine import FinishReason

from matgptq_vllm.compat import scheduler
from matgptq_vllm.core.precision import Catalogue
from matgptq_vllm.core.width_limit import LIMIT_REACHED, WidthLimit

TOKEN = "token-of-the-engine"
WIDTHS = {"2": 2, "4": 4, "8": 8, "mix-3.0": 6}


class Base:
    """As much of vLLM's scheduler as is needed."""

    def __init__(self, vllm_config: Any):
        self.requests: dict[str, Any] = {}

    def add_request(self, request: Any) -> None:
        self.requests[request.request_id] = request

    def get_num_unfinished_requests(self) -> int:
        return len(self.requests)

    def finish_requests(self, request_ids: Any, status: Any = None) -> None:
        for request_id in [request_ids] if isinstance(request_ids, str) else list(request_ids or self.requests):
            self.requests.pop(request_id, None)

    def update_from_output(self) -> dict:
        return {}


class Scheduler(scheduler._PrecisionScheduling, Base):
    pass


class Request:
    def __init__(self, request_id: str, extra_args: dict | None, client_index: int = 0):
        self.request_id, self.client_index = request_id, client_index
        self.sampling_params = SimpleNamespace(extra_args=extra_args)
        self.pooling_params = None
        self.cache_salt: str | None = None
        self.block_hashes: list = []

    def update_block_hashes(self) -> None: ...


@pytest.fixture
def made(monkeypatch) -> Scheduler:
    replica = SimpleNamespace(catalogue=Catalogue(tuple(WIDTHS), "8"), max_widths=WIDTHS)
    monkeypatch.setattr(scheduler, "open_replica", lambda _: replica)
    return Scheduler(SimpleNamespace(quant_config=SimpleNamespace(control_token=TOKEN), speculative_config=None))


def ask(made: Scheduler, request_id: str, precision: str | None, client: int = 0) -> None:
    made.add_request(Request(request_id, None if precision is None else {"precision": precision}, client))


def limit(made: Scheduler, request_id: str, max_width: int, refuses: bool = False) -> None:
    made.add_request(Request(request_id, WidthLimit(max_width, refuses).to_extra_args(TOKEN), client_index=1))


def answers(made: Scheduler) -> dict[str, tuple[int, FinishReason, str]]:
    return {
        each.request_id: (client, each.finish_reason, each.stop_reason)
        for client, outputs in made.update_from_output().items()
        for each in outputs.outputs
    }


def test_a_limit_is_answered_when_the_last_wider_request_has_ended(made: Scheduler) -> None:
    for request_id, precision in (("wide", "8"), ("mixed", "mix-3.0"), ("unnamed", None), ("narrow", "4")):
        ask(made, request_id, precision)
    limit(made, "limit", 4)
    assert answers(made) == {}
    assert made.get_num_unfinished_requests() == 5
    made.finish_requests(["wide", "mixed"])
    assert answers(made) == {}
    made.finish_requests("unnamed")
    assert answers(made) == {"limit": (1, FinishReason.STOP, LIMIT_REACHED)}
    assert list(made.requests) == ["narrow"]
    assert made.get_num_unfinished_requests() == 1


def test_from_then_on_wider_requests_are_refused_and_the_default_is_narrower(made: Scheduler) -> None:
    limit(made, "limit", 4)
    ask(made, "late", "8", client=3)
    ask(made, "unnamed", None)
    found = answers(made)
    assert found.pop("limit")[2] == LIMIT_REACHED
    (client, reason, text) = found.pop("late")
    assert (client, reason) == (3, FinishReason.ERROR)
    assert "ask for one of 2, 4, auto" in text
    assert made.requests["unnamed"].sampling_params.extra_args == {"precision": "4"}
    assert made.requests["unnamed"].cache_salt == "|precision=4"
    limit(made, "lifted", 8)
    ask(made, "again", None)
    assert made.requests["again"].cache_salt == "|precision=8"


def test_a_limit_that_refuses_ends_what_is_wider(made: Scheduler) -> None:
    ask(made, "wide", "8", client=2)
    ask(made, "narrow", "2")
    limit(made, "limit", 2, refuses=True)
    assert answers(made) == {
        "wide": (2, FinishReason.ERROR, "max width 2 was set while it ran"),
        "limit": (1, FinishReason.STOP, LIMIT_REACHED),
    }
    assert list(made.requests) == ["narrow"]


def test_a_limit_whose_client_goes_away_still_holds(made: Scheduler) -> None:
    ask(made, "wide", "8")
    limit(made, "limit", 4)
    made.finish_requests("limit")
    made.finish_requests("wide")
    assert answers(made) == {}
    assert made.get_num_unfinished_requests() == 0
    ask(made, "late", "8")
    assert made.requests == {}
