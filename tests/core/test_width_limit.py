"""core.width_limit: only the engine's own token makes a limit of a request."""

import pytest

from matgptq_vllm.core.width_limit import LIMIT_KEY, WidthLimit

TOKEN = "0123456789abcdef"


def test_a_limit_survives_the_way_through_extra_args() -> None:
    limit = WidthLimit(4, refuses=True)
    assert WidthLimit.from_extra_args(limit.to_extra_args(TOKEN), TOKEN) == limit


@pytest.mark.parametrize(
    "extra_args",
    [
        None,
        {},
        {"precision": "4"},
        {LIMIT_KEY: 2},
        {LIMIT_KEY: {"max_width": 2, "refuses": True}},
        {LIMIT_KEY: {"token": None, "max_width": 2, "refuses": True}},
        {LIMIT_KEY: {"token": "ü", "max_width": 2, "refuses": True}},
        WidthLimit(2, True).to_extra_args("0123456789abcdeF"),
    ],
)
def test_without_the_token_a_request_is_like_any_other(extra_args) -> None:
    assert WidthLimit.from_extra_args(extra_args, TOKEN) is None
    assert WidthLimit.from_extra_args(extra_args, None) is None
