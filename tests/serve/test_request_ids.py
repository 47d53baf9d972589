"""Joining HTTP requests with the engine's statistics by id."""

import pytest

from serve.request_ids import MAX_ID_CHARS, UNKNOWN, RequestPrecisions, identify

ID = b"X-Request-Id"


@pytest.mark.parametrize(
    ("path", "headers", "body_id", "expected"),
    [
        ("/v1/completions", [(ID, b"h")], None, "h"),
        ("/v1/completions", [(ID, b"h"), (ID, b"second")], "b", "h"),
        ("/v1/chat/completions", [], "b", "b"),
        ("/v1/responses", [(ID, b"h")], "b", "b"),
        ("/v1/messages", [(ID, b"h")], "b", "h"),
    ],
)
def test_a_clients_own_id_is_used_where_vllm_uses_it(path, headers, body_id, expected):
    identity = identify(path, headers, body_id)
    assert (identity.request_id, identity.headers, identity.new_field) == (expected, headers, None)


@pytest.mark.parametrize(("path", "body_id"), [("/v1/completions", None), ("/v1/messages", None), ("/v1/messages", "ignored")])
def test_a_header_is_added_where_the_client_sent_no_id(path, body_id):
    identity = identify(path, [(b"a", b"b")], body_id)
    assert identity.headers == [(b"a", b"b"), (b"x-request-id", identity.request_id.encode())]
    assert identity.new_field is None
    assert identify(path, [], body_id).request_id != identity.request_id


def test_a_response_gets_its_id_in_the_body_because_vllm_reads_no_header_there():
    identity = identify("/v1/responses", [(ID, b"h")], None)
    assert identity.headers == [(ID, b"h")]
    assert identity.request_id == identity.new_field
    assert identity.new_field.startswith("resp_")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
def test_an_id_that_vllm_will_refuse_is_left_to_it(path):
    identity = identify(path, [], 5)
    assert (identity.request_id, identity.headers, identity.new_field) == (None, [], None)


@pytest.mark.parametrize("base", ["abc", "a-b_c", "x-3", "x_3", "cmpl-x", "7_x", "12", "-", "chatcmpl-9"])
@pytest.mark.parametrize(
    "form", ["cmpl-{}-0", "cmpl-{}-17", "chatcmpl-{}", "chatcmpl-{}_4", "{}", "{}_2", "0_cmpl-{}-1", "3_chatcmpl-{}"]
)
def test_every_form_in_which_vllm_carries_an_id_is_recognized(base, form):
    joined = RequestPrecisions()
    joined.begin(base, "4")
    assert joined.precision_of(form.format(base)) == "4"


@pytest.mark.parametrize("engine_id", ["other", "cmpl-other-0", "", None, 5])
def test_an_id_that_never_came_through_the_middleware_is_unknown(engine_id):
    joined = RequestPrecisions()
    joined.begin("mine", "4")
    assert joined.precision_of(engine_id) == UNKNOWN


def test_an_id_is_known_after_the_answer_because_statistics_come_late():
    joined = RequestPrecisions()
    joined.begin("mine", "4")
    joined.end("mine")
    assert joined.precision_of("chatcmpl-mine") == "4"
    assert not joined.in_flight


def test_two_precisions_under_one_id_in_flight_are_not_guessed_between():
    joined = RequestPrecisions()
    joined.begin("same", "4")
    joined.begin("same", "8")
    assert joined.precision_of("same") == UNKNOWN
    joined.end("same")
    joined.end("same")
    joined.begin("same", "3")
    assert joined.precision_of("same") == "3"


def test_details_are_found_under_the_same_ids_as_the_precision():
    joined = RequestPrecisions(max_ended=1)
    joined.begin("mine", "4", "details")
    joined.begin("plain", "4")
    assert joined.details_of("cmpl-mine-3") == "details"
    assert [joined.details_of(name) for name in ("plain", "other", None)] == [None, None, None]
    joined.end("mine")
    assert joined.details_of("chatcmpl-mine") == "details"
    joined.end("plain")
    assert joined.details_of("mine") is None


def test_two_details_under_one_id_in_flight_are_not_guessed_between():
    joined = RequestPrecisions()
    joined.begin("same", "4", "one")
    joined.begin("same", "4", "two")
    assert (joined.precision_of("same"), joined.details_of("same")) == ("4", None)
    joined.begin("same", "4", "one")
    assert joined.details_of("same") is None
    for _ in range(3):
        joined.end("same")
    joined.begin("same", "4", "one")
    joined.begin("same", "4", "one")
    assert joined.details_of("same") == "one"


def test_two_requests_of_one_precision_may_share_an_id():
    joined = RequestPrecisions(max_ended=1)
    joined.begin("same", "4")
    joined.begin("same", "4")
    joined.end("same")
    joined.begin("other", "2")
    joined.end("other")
    assert joined.in_flight == {"same": 1}
    assert joined.precision_of("same") == "4"


def test_memory_is_bounded_and_the_oldest_ended_go_first():
    joined = RequestPrecisions(max_ended=5)
    joined.begin("running", "2")
    for index in range(100):
        joined.begin(f"r{index}", "4")
        joined.end(f"r{index}")
    assert len(joined) == 6
    assert [joined.precision_of(name) for name in ("running", "r99", "r95", "r94")] == ["2", "4", "4", UNKNOWN]


def test_ending_what_never_began_changes_nothing():
    joined = RequestPrecisions()
    joined.end("nothing")
    joined.begin("x" * (MAX_ID_CHARS + 1), "4")
    joined.end("x" * (MAX_ID_CHARS + 1))
    assert len(joined) == 0
