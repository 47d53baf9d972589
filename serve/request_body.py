"""The body of a generation request: read with a bound, searched for selectors, written back with the chosen profile."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive

from matgptq_vllm.core.precision import GROUP_KEY, XARGS_KEY, salt_of_precision
from serve.admission import Size
from serve.errors import RequestError
from serve.json_object import JsonObject
from serve.selection import BODY_FIELD, Selection, Selectors

MAX_TOKENS_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
BYTES_PER_TOKEN = 4
"""Of a request body, about; token ids and text take about as much."""
MAX_SAMPLES = 128
"""More samples than anybody asks for count as one: vLLM refuses such a request."""

XARGS_FIELD = "vllm_xargs"
REQUEST_ID_FIELD = "request_id"
MODEL_FIELD = "model"
SALT_FIELD = "cache_salt"
BEAM_SEARCH_FIELD = "use_beam_search"

SINGLE_FIELDS = (BODY_FIELD, XARGS_FIELD, MODEL_FIELD, REQUEST_ID_FIELD, SALT_FIELD, BEAM_SEARCH_FIELD)
"""Fields that decide something here and must not be there twice: parsers disagree about which one counts."""


@dataclass(frozen=True)
class RequestBody:
    """A parsed body; only the fields that matter here are looked at."""

    document: JsonObject

    @classmethod
    def parse(cls, body: bytes) -> "RequestBody":
        """The request in ``body``.

        Raises:
            RequestError: 400, not a JSON object in UTF-8, or a field that decides something here occurs twice or has
                the wrong type. Nothing of the body is quoted.
        """
        try:
            document = JsonObject.parse(body.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RequestError(f"the request body is not UTF-8 (byte {error.start}); send a JSON object", "body") from None
        except ValueError as error:
            raise RequestError(f"the request body is not a JSON object: {error}", "body") from None
        repeated = document.repeated(SINGLE_FIELDS)
        if document.get(XARGS_FIELD) is not None:
            xargs = document.nested(XARGS_FIELD)
            if xargs is None:
                raise RequestError(f"{XARGS_FIELD} must be an object", "body", param=XARGS_FIELD)
            if xargs.get(GROUP_KEY) is not None or xargs.repeated([GROUP_KEY]):
                raise RequestError(
                    f"{XARGS_FIELD}.{GROUP_KEY} is the server's own; leave it out", "body", param=f"{XARGS_FIELD}.{GROUP_KEY}"
                )
            repeated += [f"{XARGS_FIELD}.{key}" for key in xargs.repeated([XARGS_KEY])]
        if repeated:
            raise RequestError(f"the request body has {repeated[0]!r} more than once; send it once", "body", param=repeated[0])
        return cls(document)

    @property
    def request_id(self) -> object:
        """The client's ``request_id`` field, or None."""
        return self.document.get(REQUEST_ID_FIELD)

    def selectors(self, header: str | None) -> Selectors:
        """The selectors of the request whose X-Precision is ``header``."""
        xargs = self.document.get(XARGS_FIELD) or {}
        return Selectors(header, self.document.get(BODY_FIELD), xargs.get(XARGS_KEY), self.document.get(MODEL_FIELD))

    def size(self, num_bytes: int) -> Size:
        """How large the request is, guessed where only the tokenizer knows.

        Args:
            num_bytes: of the whole body.
        """
        limits = [self.document.get(name) for name in MAX_TOKENS_FIELDS]
        given = [limit for limit in limits if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0]
        # The largest: which one counts depends on the path, and a small one that does not count must not save quota.
        prompt = self.document.get("prompt")
        prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else 1
        samples = self.document.get("n")
        samples = samples if isinstance(samples, int) and not isinstance(samples, bool) and 0 < samples <= MAX_SAMPLES else 1
        return Size(max(1, num_bytes // BYTES_PER_TOKEN), max(given) if given else None, prompts * samples)

    def rewritten(self, selection: Selection, request_id: str | None = None, group: str | None = None) -> bytes:
        """The body that asks vLLM for ``selection``.

        Args:
            request_id: value of the field of that name, if one is to be written.
            group: whose profile the request is to follow, None if it keeps its own.
        """
        xargs = {**(self.document.get(XARGS_FIELD) or {}), XARGS_KEY: selection.profile}
        xargs.pop(GROUP_KEY, None)
        if group is not None:
            xargs[GROUP_KEY] = group
        replacements: dict[str, Any] = {XARGS_FIELD: xargs}
        if selection.model is not None:
            replacements[MODEL_FIELD] = selection.model
        if self.document.get(BEAM_SEARCH_FIELD):
            # vLLM's beam search drops the xargs and keeps the salt. A salt of the wrong type is vLLM's to refuse.
            salt = self.document.get(SALT_FIELD)
            if salt is None or isinstance(salt, str):
                replacements[SALT_FIELD] = salt_of_precision(selection.profile, salt)
        if request_id is not None:
            replacements[REQUEST_ID_FIELD] = request_id
        return self.document.with_members(replacements, removed=(BODY_FIELD,)).encode("utf-8")


async def read_body(receive: Receive, headers: Iterable[tuple[bytes, bytes]], max_bytes: int) -> bytes | None:
    """The whole request body, or None if the client went away first.

    Raises:
        RequestError: 413, the body has more than ``max_bytes`` bytes: announced by Content-Length, or counted.
    """
    for name, value in headers:
        if name.lower() == b"content-length" and value.isdigit() and int(value[:20]) > max_bytes:
            raise _too_large(max_bytes)
    parts: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(f"the request body is larger than {max_bytes} bytes; send a shorter one", "too_large", status=413)
