"""Request log: one JSON object per line and request, when its answer is over.

It has the names and numbers that ``_entry`` lists and nothing else: no prompt, no output, no key, no other header. All that
is not printable ASCII is escaped, so that no request can write a second line or move a terminal's cursor.
"""

import json
import logging
import math
import time
from datetime import datetime, timezone
from typing import TextIO

from starlette.types import Scope

from serve.errors import RequestError
from serve.exchange import CLIENT_WENT_AWAY, Exchange
from serve.request_details import RequestDetails
from serve.request_ids import HEADER, MAX_ID_CHARS

LOGGER_NAME = "matgptq.requests"
"""Name in ``logging``, level INFO."""

MAX_PATH_CHARS = 128

logger = logging.getLogger(LOGGER_NAME)
# Off until ``enable``, whatever the level of the root logger.
logger.setLevel(logging.WARNING)


def enable(stream: TextIO) -> logging.Handler:
    """Write the request log to ``stream`` from now on, and only there; once, however often it is called.

    Returns:
        What writes it; removing it from the logger ends that.
    """
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
            return handler
    writer = logging.StreamHandler(stream)
    writer.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(writer)
    return writer


def log_request(exchange: Exchange) -> None:
    """Log a request that was given a precision; its answer is over."""
    if exchange.admitted is None or not logger.isEnabledFor(logging.INFO):
        return
    first = exchange.first_byte_at
    _write(
        exchange.scope,
        exchange.request_id,
        exchange.outcome,
        precision=exchange.admitted.selection.profile,
        last_precision=None if exchange.admitted.details.flight is None else exchange.admitted.details.flight.profile,
        details=exchange.admitted.details,
        duration_s=time.monotonic() - exchange.started_at,
        time_to_first_byte_s=None if first is None else first - exchange.started_at,
        streamed=exchange.streamed,
    )


def log_rejection(scope: Scope, error: RequestError, tenant: str | None = None) -> None:
    """Log a request that was refused with ``error`` before it reached vLLM; not the message, which may quote the client."""
    if not logger.isEnabledFor(logging.INFO):
        return
    request_id = next((value.decode("latin-1") for name, value in scope["headers"] if name.lower() == HEADER), None)
    _write(scope, request_id, error.status, rejection=error.rejection, details=RequestDetails("", tenant))


def _write(
    scope: Scope,
    request_id: str | None,
    status: int,
    details: RequestDetails,
    precision: str | None = None,
    last_precision: str | None = None,
    rejection: str | None = None,
    duration_s: float | None = None,
    time_to_first_byte_s: float | None = None,
    streamed: bool = False,
) -> None:
    entry = {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "request_id": _bounded(request_id, MAX_ID_CHARS),
        "path": _bounded(scope["path"], MAX_PATH_CHARS),
        "status": status,
        "rejection": rejection,
        "precision": precision,
        "last_precision": last_precision,
        "reason": details.reason or None,
        "tenant": details.tenant,
        "budget_tpot_ms": _rounded(details.budget_tpot_ms),
        "budget_ttft_ms": _rounded(details.budget_ttft_ms),
        "predicted_tpot_ms": _rounded(details.predicted_tpot_ms),
        "predicted_ttft_ms": _rounded(details.predicted_ttft_ms),
        "duration_s": _rounded(duration_s),
        "time_to_first_byte_s": _rounded(time_to_first_byte_s),
        "streamed": streamed,
        "client_gone": status == CLIENT_WENT_AWAY,
    }
    # ASCII only; json leaves DEL as the one control character that is not escaped.
    logger.info("%s", json.dumps(entry, ensure_ascii=True).replace("\x7f", "\\u007f"))


def _bounded(text: str | None, max_chars: int) -> str | None:
    return text if text is None or len(text) <= max_chars else text[:max_chars] + "..."


def _rounded(number: float | None) -> float | None:
    # Not finite: JSON has no way to write it.
    return None if number is None or not math.isfinite(number) else round(number, 4)
