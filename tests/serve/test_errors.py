"""Errors as HTTP answers."""

import pytest

from matgptq_vllm.core.errors import FormatError, InputError, MatGPTQError, UnsupportedError
from serve.errors import RequestError, error_body, status_of


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InputError("m"), 400, "BadRequestError"),
        (RequestError("m", "precision"), 400, "BadRequestError"),
        (RequestError("m", "model", status=404), 404, "NotFoundError"),
        (RequestError("m", "too_large", status=413), 413, "RequestEntityTooLargeError"),
        (RequestError("m", "too_large", status=431), 431, "RequestHeaderFieldsTooLargeError"),
        (FormatError("m"), 500, "InternalServerError"),
        (MatGPTQError("m"), 500, "InternalServerError"),
        (UnsupportedError("m"), 501, "NotImplementedError"),
    ],
)
def test_an_error_becomes_a_status_and_openais_document(error, status, kind):
    assert status_of(error) == status
    assert error_body(error) == {"error": {"message": "m", "type": kind, "param": None, "code": status}}


def test_a_request_error_names_the_field_at_fault():
    assert error_body(RequestError("m", "body", param="precision"))["error"]["param"] == "precision"
