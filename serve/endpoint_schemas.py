"""What our endpoints declare in the server's OpenAPI schema: request bodies, answers and errors as they really are."""

from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]


def _nullable(kind: str, **more: Any) -> dict[str, Any]:
    return {"anyOf": [{"type": kind, **more}, {"type": "null"}]}


def _object(properties: Mapping[str, Schema], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), **more}


def _answer(description: str, schema: Schema) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


_MILLISECONDS = _nullable("number", exclusiveMinimum=0, exclusiveMaximum=1e7)
_FLOOR = _nullable("string", pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
_SLO = {"tpot_ms": _MILLISECONDS, "ttft_ms": _MILLISECONDS, "auto_floor": _FLOOR}
# A width may be written as a number, as in a request's "precision".
_ASKED_SLO = {**_SLO, "auto_floor": {"anyOf": [*_FLOOR["anyOf"], {"type": "integer"}]}}
_COUNTS = {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0}}

_ERROR = _object(
    {
        "error": _object(
            {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _nullable("string"),
                "code": {"type": "integer"},
            }
        )
    }
)
# vLLM's own authentication answers {"error": "Unauthorized"}.
_UNAUTHORIZED = {"anyOf": [_ERROR, _object({"error": {"type": "string"}})]}

_PRECISION = _object(
    {
        "id": {"type": "string"},
        "object": {"const": "precision"},
        "default": {"type": "boolean"},
        "average_bits": _nullable("number"),
        "bytes_per_weight": _nullable("number"),
        "perplexity": _nullable("number"),
        "models": {"type": "array", "items": {"type": "string"}},
        "step_ms": {"type": "object", "additionalProperties": _nullable("number")},
    }
)
_LOAD = _object(
    {
        "running": _COUNTS,
        "waiting": {"type": "integer", "minimum": 0},
        "context_tokens": {"type": "integer", "minimum": 0},
        "kv_cache_usage": _nullable("number"),
    }
)
_COST = {"type": "number", "minimum": 0}
_MODEL = _object(
    {
        "source": {"enum": ["none", "cache", "sweep", "online"]},
        "observations": {"type": "integer", "minimum": 0},
        "mean_error": _nullable("number"),
        "coefficients": _object(
            {
                "base": _COST,
                **{kind: {"type": "object", "additionalProperties": _COST} for kind in ("fixed", "decode", "prefill")},
                "context": _COST,
                "prompts": _COST,
            }
        ),
    }
)
_DECISION = _object(
    {
        "time": {"type": "number"},
        "precision": {"type": "string"},
        "reason": {"type": "string"},
        "predicted_tpot_ms": _nullable("number"),
        "budget_tpot_ms": _nullable("number"),
        "running": {"type": "integer", "minimum": 0},
    }
)
_WIDTH = {"enum": [2, 3, 4, 6, 8]}
_POLICY = {"enum": ["finish", "refuse"]}
_CHANGE = _object({"max_width": _WIDTH, "policy": _POLICY, "waiting_for": {"type": "integer", "minimum": 0}})
_MEMORY = _object({"budget_bytes": _nullable("integer"), "reason": _nullable("string"), "weight_bytes": _COUNTS})
_PRECISIONS = _object(
    {
        "object": {"const": "list"},
        "data": {"type": "array", "items": _PRECISION},
        "default": {"type": "string"},
        "max_width": {"type": "integer"},
        "available_max_width": {"type": "integer"},
        "elastic": {"type": "boolean"},
        "change": {"anyOf": [_CHANGE, {"type": "null"}]},
        "memory": _MEMORY,
        "slice_rule": {"type": "string"},
        "workers": {"anyOf": [{"type": "array", "items": {"type": "object"}}, {"type": "null"}]},
        "load": _LOAD,
        "latency_model": _MODEL,
        "slo": _object(_SLO),
        "decisions": {"type": "array", "items": _DECISION, "maxItems": 100},
    }
)

PRECISIONS_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: _answer("What is held, what has been learned of it, and the present load", _PRECISIONS),
    401: _answer("No key, or an unknown one", _UNAUTHORIZED),
    501: _answer("The engine is no MatGPTQ replica", _ERROR),
}

SLO_REQUEST: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"type": "object", "properties": _ASKED_SLO, "additionalProperties": False},
                "example": {"tpot_ms": 30, "ttft_ms": None, "auto_floor": "3"},
            }
        },
    }
}
"""What is missing or null is not set."""

SLO_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: _answer("What is aimed at from now on", _object(_SLO)),
    400: _answer("The body is no such object, or the floor is not held", _ERROR),
    401: _answer("No key of this server, or an unknown one", _UNAUTHORIZED),
    403: _answer("No admin key, a wrong one, or the server has none", _ERROR),
    413: _answer("The body is larger than 4096 bytes", _ERROR),
    501: _answer("The engine is no MatGPTQ replica", _ERROR),
}

_READY = _object({"ready": {"type": "boolean"}, "problem": _nullable("string")})

READY_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: _answer("The model is loaded, has generated a token, and takes requests", _READY),
    503: _answer("Not yet, or no more; `problem` says why", _READY),
}

WIDTH_REQUEST: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {"max_width": _WIDTH, "policy": _POLICY},
                    "required": ["max_width"],
                    "additionalProperties": False,
                },
                "example": {"max_width": 4, "policy": "finish"},
            }
        },
    }
}

WIDTH_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: _answer("The width holds; the answer is that of GET", _PRECISIONS),
    400: _answer("The body is no such object, or the replica was not started with that width", _ERROR),
    401: _answer("No key of this server, or an unknown one", _UNAUTHORIZED),
    403: _answer("No admin key, a wrong one, or the server has none", _ERROR),
    409: _answer("Another change is under way", _ERROR),
    413: _answer("The body is larger than 4096 bytes", _ERROR),
    501: _answer("The width cannot be changed on this server", _ERROR),
    503: _answer("The planes cannot be read again now; nothing has changed", _ERROR),
}
