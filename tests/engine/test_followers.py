"""engine.followers: a request changes after its prompt, with its whole group, and only if its group does."""

from hypothesis import given
from hypothesis import strategies as st

from matgptq_vllm.engine.followers import Followers


def due(followers: Followers, **computed: int) -> dict[str, int]:
    return dict(followers.due(list(computed), list(computed.values())))


def test_a_change_waits_for_the_end_of_the_prompt_and_for_nothing_else() -> None:
    followers = Followers()
    followers.add("a", "g", 4, 20)
    followers.set_levels({"g": 1, "other": 0})
    assert due(followers, a=16) == {}
    assert due(followers, a=20) == {"a": 1}
    assert due(followers, a=21) == {}


def test_all_of_a_group_change_in_one_step() -> None:
    followers = Followers()
    for name in ("a", "b", "c"):
        followers.add(name, "g", 4, 20)
    followers.set_levels({"g": 1})
    assert due(followers, a=33, b=21, c=7) == {"a": 1, "b": 1}
    assert due(followers, a=34, b=22, c=20) == {"c": 1}


def test_a_change_that_is_taken_back_in_time_never_happens() -> None:
    followers = Followers()
    followers.add("a", "g", 4, 20)
    followers.set_levels({"g": 1})
    assert due(followers, a=3) == {}
    followers.set_levels({"g": 4})
    assert due(followers, a=20) == {}


def test_a_request_that_comes_later_goes_with_its_group_and_an_ended_group_changes_nothing() -> None:
    followers = Followers()
    followers.set_levels({"g": 1, "h": 2})
    followers.add("a", "g", 4, 1)
    followers.set_levels({"h": None})
    followers.add("b", "h", 4, 1)
    assert due(followers, a=1, b=1) == {"a": 1}
    followers.remove("a")
    followers.set_levels({"g": 0})
    assert due(followers, b=2) == {}


def test_a_preempted_request_is_computed_again_at_the_profile_of_its_admission_and_then_follows() -> None:
    followers = Followers()
    followers.add("a", "g", 4, 20)
    followers.set_levels({"g": 1})
    assert due(followers, a=32) == {"a": 1}
    assert followers.restart("a", 1) == 4
    assert followers.restart("somebody", 3) == 3
    assert due(followers, a=0) == {}
    assert due(followers, a=48) == {"a": 1}


@given(st.lists(st.one_of(st.integers(0, 4), st.none()), max_size=200), st.integers(1, 40))
def test_after_its_prompt_every_request_has_the_level_of_its_group(levels: list[int | None], prompt: int) -> None:
    followers = Followers()
    followers.add("a", "g", 4, prompt)
    followers.add("b", "nobody", 2, prompt)
    profile = level = 4
    for computed, asked in enumerate(levels):
        if asked is not None:
            followers.set_levels({"g": asked})
            level = asked
        changes = due(followers, a=computed, b=computed)
        assert "b" not in changes
        profile = changes.get("a", profile)
        assert profile == (level if computed >= prompt else 4)
