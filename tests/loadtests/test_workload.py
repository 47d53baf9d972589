"""loadtests.workload and recorded_trace: the requests of a run; tests/e2e sends some to a real server."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from loadtests.malformed import FORMS
from loadtests.recorded_trace import read_recorded
from loadtests.workload import CHUNK, Lengths, Workload
from matgptq_vllm.core.errors import FormatError, InputError

WORKLOAD = Workload(trace="poisson", seconds=200, input_len=Lengths(40, 40), output_len=Lengths(8, 8))

RECORDED = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:48.1805900,396,109
2023-11-16 18:15:50.6805900,900,60
"""


def test_a_plan_is_written_as_vllm_reads_it_and_shares_no_tokens() -> None:
    plan = [*WORKLOAD.plan(2, 4, ["4"], 0, None), *WORKLOAD.plan(2, 4, ["4"], 1, None)]
    lines = [json.loads(planned.trace_line()) for planned in plan]
    assert all((line["input_length"], line["output_length"]) == (40, 8) for line in lines)
    hashes = [number for line in lines for number in line["hash_ids"]]
    assert len(hashes) == len(set(hashes)) == math.ceil(40 / CHUNK) * len(plan)


def test_shares_and_precisions_leave_times_and_lengths_alone() -> None:
    plain = WORKLOAD.plan(2, 4, ["4"], 0, None)
    rough = replace(WORKLOAD, cancel=0.3, malformed=0.2).plan(2, 4, ["2", "8"], 0, None)
    assert [(one.due_s, one.input_tokens) for one in plain] == [(one.due_s, one.input_tokens) for one in rough]
    assert sum(one.cancel_at is not None for one in rough) / len(rough) == pytest.approx(0.3, abs=0.06)
    assert sum(one.malformed is not None for one in rough) / len(rough) == pytest.approx(0.2, abs=0.06)
    assert not any(one.cancel_at is not None and one.malformed is not None for one in rough)
    assert sum(one.precision == "2" for one in rough) / len(rough) == pytest.approx(0.5, abs=0.08)


def test_an_infinite_rate_is_all_at_once() -> None:
    assert [one.due_s for one in WORKLOAD.plan(math.inf, 5, ["4"], 0, None)] == [0.0] * 20
    assert len(replace(WORKLOAD, requests=7).plan(math.inf, 5, ["4"], 0, None)) == 7


def test_a_chat_repeats_what_was_said_after_a_beginning_that_all_share() -> None:
    plan = replace(WORKLOAD, trace="chat", prefix_len=64, turns=3).plan(3, 4, ["4"], 0, None)
    shared = plan[0].hashes[:4]
    assert all(one.hashes[:4] == shared for one in plan)
    # A second turn is not a beginning of its own: its first new token is the first turn's.
    chats: dict[int, list[tuple[int, ...]]] = {}
    for one in plan:
        chats.setdefault(one.hashes[4], []).append(one.hashes)
    assert len(chats) > 5
    for turns in chats.values():
        assert len(turns) == 3
        for earlier, later in pairwise(turns):
            assert later[: len(earlier)] == earlier


def test_a_recorded_trace_is_replayed_at_its_own_speed_or_faster(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(RECORDED)
    recorded = replace(WORKLOAD, trace=str(path))
    plan = recorded.plan(1, 4, ["4"], 0, None)
    assert [one.due_s for one in plan] == pytest.approx([0, 1.5, 4.0])
    assert [(one.input_tokens, one.output_tokens) for one in plan] == [(374, 44), (396, 109), (900, 60)]
    assert [one.due_s for one in recorded.plan(2, 4, ["4"], 0, None)] == pytest.approx([0, 0.75, 2.0])
    assert len(replace(recorded, seconds=2).plan(1, 4, ["4"], 0, None)) == 2
    # What is too long for the model is cut.
    assert [(one.input_tokens, len(one.hashes)) for one in recorded.plan(1, 4, ["4"], 0, 400)] == [
        (356, 23),
        (291, 19),
        (340, 22),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "has no column TIMESTAMP, ContextTokens, GeneratedTokens"),
        (RECORDED.partition("\n")[0], "has no requests"),
        (RECORDED.replace("396", "many"), "line 3"),
        (RECORDED.replace("396", "0"), "line 3: 0 tokens"),
        (RECORDED.replace("2023-11-16 18:15:48", "noon"), "line 3"),
    ],
)
def test_a_file_that_is_no_trace_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(FormatError, match=message):
        read_recorded(path)


def test_requests_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(InputError, match="does not fit the model's 47"):
        WORKLOAD.plan(2, 4, ["4"], 0, 47)
    assert WORKLOAD.plan(2, 4, ["4"], 0, 48)
    with pytest.raises(InputError, match=r"no request is due within 0\.001 s"):
        replace(WORKLOAD, seconds=0.001).plan(0.1, 4, ["4"], 0, None)


def test_every_malformed_form_differs_from_the_good_request() -> None:
    good = {"model": "m", "prompt": [1, 2], "max_tokens": 4, "stream": True}
    made = {form(good) for form in FORMS.values()}
    assert len(made) == len(FORMS)
    assert json.dumps(good).encode() not in made
