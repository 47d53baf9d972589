"""serve.flight: whose tokens were computed at which profile."""

from hypothesis import given
from hypothesis import strategies as st

from serve.flight import Flight


def test_a_request_that_kept_its_profile_computed_everything_there():
    assert Flight("4", 10).split(7) == {"4": 7}
    flight = Flight("4", 10)
    flight.produce(3)
    assert flight.split(7) == {"4": 7}


@given(st.lists(st.tuples(st.sampled_from("2348"), st.floats(0, 9)), min_size=1, max_size=9), st.integers(0, 1000))
def test_no_token_is_lost_between_profiles(pieces, tokens):
    flight = Flight("8", 10)
    for flight.profile, count in pieces:
        flight.produce(count)
    parts = flight.split(tokens)
    assert sum(parts.values()) == tokens
    assert all(part >= 0 for part in parts.values())
    if flight.tokens:
        for profile, part in parts.items():
            assert abs(part - tokens * flight.produced[profile] / flight.tokens) <= 1
