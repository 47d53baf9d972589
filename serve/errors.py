"""Errors as HTTP answers: the status and the OpenAI-shaped body, with the field values that vLLM's own errors have."""

import math
from typing import Any

from matgptq_vllm.core.errors import InputError, MatGPTQError, UnsupportedError

REJECTIONS = (
    "precision", "model", "header", "body", "too_large", "unsupported", "budget", "budget_unmet", "key", "tenant", "quota",
    "draining",
)  # fmt: skip
"""Why a request was refused before it reached vLLM: the values of a metric label, so the list is closed."""

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    409: "ConflictError",
    413: "RequestEntityTooLargeError",
    429: "RateLimitError",
    431: "RequestHeaderFieldsTooLargeError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}


class RequestError(InputError):
    """A request that is refused before it reaches vLLM.

    Args:
        message: what was wrong, and what can be asked for. It is sent to the client: no prompt, no key, no other header.
        rejection: which of REJECTIONS this counts as.
        status: HTTP status of the answer.
        param: the request field or header at fault, if it is one.
        retry_after_s: after how many seconds the same request may succeed, if it may.
    """

    def __init__(
        self,
        message: str,
        rejection: str,
        status: int = 400,
        param: str | None = None,
        retry_after_s: float | None = None,
    ):
        super().__init__(message)
        assert rejection in REJECTIONS
        self.rejection = rejection
        self.status = status
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer: Retry-After in whole seconds, at least 1."""
        return {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


def status_of(error: MatGPTQError) -> int:
    """HTTP status of ``error``: 4xx if another request would succeed, 5xx if none would."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, InputError):
        return 400
    return 501 if isinstance(error, UnsupportedError) else 500


def error_body(error: MatGPTQError) -> dict[str, Any]:
    """The JSON document that answers ``error``: ``{"error": {"message", "type", "param", "code"}}``; code is the status."""
    status = status_of(error)
    return {"error": {"message": str(error), "type": _TYPES[status], "param": getattr(error, "param", None), "code": status}}
