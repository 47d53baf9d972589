"""What the controller chooses, and that it does not oscillate."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matgptq_vllm.core.errors import InputError
from serve.budget import Budget
from serve.controller import MARGIN, TPOT_GRID, TTFT_GRID, Controller
from serve.hysteresis import HOLD_S
from serve.latency_model import LatencyModel
from serve.load import Load, StepLoad

PROFILES = ("2", "3", "4", "6", "8")
IDLE = Load()


def step_ms(load: StepLoad) -> float:
    total = 2.0
    for name in PROFILES:
        tokens, prompts = load.tokens.get(name, 0), load.prefill.get(name, 0)
        if tokens or prompts:
            total += 1.25 * int(name) + 0.1 * tokens + 0.02 * prompts
    return total


def learned() -> dict:
    model = LatencyModel(PROFILES, [2, 3, 4, 6, 8])
    for _ in range(12):
        for name in PROFILES:
            for batch in (1, 8, 32):
                for work in (StepLoad({name: batch}), StepLoad({name: batch, "8": 4}), StepLoad({name: batch}, {name: 200})):
                    model.observe([work], step_ms(work))
    return model.to_json()


DOCUMENT = learned()


class Bench:
    """A controller, and a clock to turn."""

    def __init__(self, known: bool = True, **options) -> None:
        self.now = 100.0
        model = LatencyModel(PROFILES, [2, 3, 4, 6, 8])
        if known:
            model.restore(DOCUMENT)
        self.controller = Controller(model, PROFILES, clock=lambda: self.now, **options)

    def decide(self, budget, load=IDLE, **options):
        return self.controller.decide(budget, load, 10, **options)


@pytest.mark.parametrize(
    ("tpot", "profile", "reason"),
    [
        (30, "8", "budget"),
        (12, "6", "budget"),
        (9, "4", "budget"),
        (7.2, "3", "budget"),
        (5.5, "2", "budget"),
        (1, "2", "best-effort"),
    ],
)
@pytest.mark.parametrize("elastic", [False, True])
def test_an_idle_engine_gives_the_widest_that_meets_the_budget(tpot, profile, reason, elastic) -> None:
    decision = Bench(elastic=elastic).decide(Budget(tpot))
    assert (decision.profile, decision.reason, decision.meets) == (profile, reason, reason == "budget")
    assert decision.predicted_tpot_ms == pytest.approx(step_ms(StepLoad({profile: 1})), rel=0.1)


def test_only_allowed_profiles_are_given() -> None:
    assert Bench().decide(Budget(30), allowed=["2", "4"]).profile == "4"


def test_a_controller_that_knows_nothing_gives_the_widest_and_predicts_nothing() -> None:
    decision = Bench(known=False).decide(Budget(1, 1))
    assert (decision.profile, decision.predicted_tpot_ms, decision.predicted_ttft_ms) == ("8", None, None)


def test_prompts_that_wait_count_against_the_time_to_first_token() -> None:
    bench = Bench()
    assert bench.decide(Budget(None, 100)).meets
    decision = bench.decide(Budget(None, 100), Load({}, 30, 30 * 400))
    assert not decision.meets
    assert decision.predicted_ttft_ms == pytest.approx(6 * 4.5 + 12_010 * 0.02, rel=0.15)


def test_a_full_engine_counts_against_the_time_to_first_token() -> None:
    bench = Bench(max_running=4)
    free = bench.decide(Budget(None, 1e6), Load({"8": 3}))
    full = bench.decide(Budget(None, 1e6), Load({"8": 4}, 2, 20))
    assert full.predicted_ttft_ms > 50 * free.predicted_ttft_ms


def test_load_steps_down_at_once_and_up_only_after_the_hold() -> None:
    bench = Bench(elastic=True)
    budget = Budget(18)
    assert bench.decide(budget).profile == "8"
    bench.now += 0.5
    assert bench.decide(budget, Load({"8": 90})).profile != "8"
    down = bench.now
    while bench.decide(budget).profile != "8":
        bench.now += 0.5
    assert HOLD_S <= bench.now - down <= HOLD_S + 1


def test_a_burst_steps_down_before_its_requests_have_piled_up_where_requests_keep_their_width() -> None:
    bench = Bench()
    for _ in range(30):
        bench.now += 0.5
        assert bench.decide(Budget(18), Load({"8": 4}, context_tokens=400)).profile == "8"
    for count in range(25):
        bench.now += 0.02
        last = bench.decide(Budget(18), Load({"8": 4 + count}, context_tokens=400)).profile
    assert last != "8"


def test_narrower_is_no_way_out_where_a_mixed_batch_would_be_slower() -> None:
    decision = Bench().decide(Budget(18), Load({"8": 90}))
    assert (decision.profile, decision.reason, decision.meets) == ("8", "best-effort", False)


def test_a_floor_holds_under_any_load_and_the_answer_is_honest() -> None:
    decision = Bench().decide(Budget(5), Load({"8": 200}), floor="4")
    assert (decision.profile, decision.reason) == ("4", "best-effort")


def test_where_all_allowed_are_below_the_floor_the_widest_of_them_is_given() -> None:
    assert Bench().decide(Budget(50), floor="6", allowed=["2", "3"]).profile == "3"


@pytest.mark.parametrize(
    ("options", "said"), [({"allowed": []}, "held are"), ({"allowed": ["9"]}, "held are"), ({"floor": "9"}, "holds")]
)
def test_profiles_that_are_not_held_are_refused(options, said) -> None:
    with pytest.raises(InputError, match=said):
        Bench().decide(Budget(10), **options)


def test_misses_raise_the_margin_and_hits_lower_it_to_its_bound() -> None:
    bench = Bench()
    decision = bench.decide(Budget(20))
    bench.controller.finished(decision, 50, 25.0)
    assert bench.controller.margin > MARGIN
    for _ in range(2000):
        bench.controller.finished(decision, 50, 15.0)
    assert bench.controller.margin == pytest.approx(0.02)
    unmet = bench.decide(Budget(1))
    bench.controller.finished(unmet, 50, 25.0)
    assert bench.controller.margin == pytest.approx(0.02)


def test_the_level_of_a_class_is_what_running_requests_may_follow() -> None:
    bench = Bench(elastic=True)
    assert bench.controller.profile(Budget(9)) is None
    assert bench.decide(Budget(9), floor="8").profile == "8"
    assert bench.controller.profile(Budget(9)) == "4"
    assert bench.controller.profile(Budget(9), floor="6") == "6"
    assert bench.controller.profile(Budget(9), allowed=["2", "3"]) == "3"


def test_a_level_steps_down_and_up_while_nothing_arrives() -> None:
    bench = Bench(elastic=True)
    budget = Budget(18)
    assert bench.decide(budget).profile == "8"
    full = Load({"8": 90}, following={"8": 90})
    bench.controller.review(budget, full)
    assert bench.controller.profile(budget) != "8"
    for _ in range(int(2 * HOLD_S) + 2):
        bench.now += 0.5
        bench.controller.review(budget, IDLE)
    assert bench.controller.profile(budget) == "8"


def test_those_that_follow_are_no_load_at_their_present_profile_and_the_others_are() -> None:
    followed = Bench(elastic=True).decide(Budget(10), Load({"8": 30}, following={"8": 30}))
    alone = Bench(elastic=True).decide(Budget(10), Load({"8": 30}))
    assert (followed.meets, alone.meets) == (True, False)
    assert followed.profile != "8"


def test_classes_are_bounded_whatever_budgets_clients_send() -> None:
    assert TPOT_GRID[2] * TTFT_GRID[2] < 50_000
    bench = Bench()
    for index in range(300):
        bench.decide(Budget(20 + index * 1e-4, 1e7 / (index + 1)))
    assert len(bench.controller._levels) < 200


EVENTS = st.lists(
    st.tuples(
        st.floats(0, 7),
        st.sampled_from(((18.0, None), (18.0, 200.0), (9.0, None), (None, 50.0))),
        st.dictionaries(st.sampled_from(PROFILES), st.integers(0, 120), max_size=3),
        st.integers(0, 50),
        st.sampled_from((None, "3", "6")),
        st.sampled_from((None, ("2", "8"), ("4",), PROFILES)),
        st.floats(1, 100),
    ),
    min_size=2,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(EVENTS, st.booleans())
def test_no_class_reverses_within_the_hold_and_bounds_of_requests_hold(events, elastic) -> None:
    bench = Bench(elastic=elastic)
    seen: dict = {}
    for wait, (tpot, ttft), running, waiting, floor, allowed, measured in events:
        bench.now += wait
        decision = bench.decide(Budget(tpot, ttft), Load(running, waiting, 100 * waiting, 50), floor=floor, allowed=allowed)
        bench.controller.finished(decision, 20, measured)
        held = allowed or PROFILES
        assert decision.profile in held
        if any(int(name) >= int(floor or 0) for name in held):
            assert int(decision.profile) >= int(floor or 0)
        # What requests of one kind get, and the level of their class, both obey the rule.
        for key, width in (
            ((tpot, ttft), int(bench.controller.profile(Budget(tpot, ttft)))),
            ((tpot, ttft, floor, allowed), int(decision.profile)),
        ):
            last, switched, up = seen.get(key, (width, None, None))
            if width != last:
                if up is not None and up != (width > last):
                    assert bench.now - switched >= HOLD_S
                switched, up = bench.now, width > last
            seen[key] = (width, switched, up)
