"""Requests that a server must refuse with a status of 400 to 499, and that must leave the requests beside them alone."""

import json
from collections.abc import Callable
from typing import Any

Body = dict[str, Any]

FORMS: dict[str, Callable[[Body], bytes]] = {
    # Name -> from the body of a good request to the bytes of a bad one.
    "no JSON": lambda body: json.dumps(body).encode()[:-1],
    "no UTF-8": lambda body: b'{"model": "\xff\xfe", "prompt": "a"}',
    "a list": lambda body: json.dumps([body]).encode(),
    "no prompt": lambda body: json.dumps({key: value for key, value in body.items() if key != "prompt"}).encode(),
    "unknown model": lambda body: json.dumps({**body, "model": "no such model"}).encode(),
    "text for a number": lambda body: json.dumps({**body, "max_tokens": "many"}).encode(),
    "negative length": lambda body: json.dumps({**body, "max_tokens": -1}).encode(),
    "temperature out of range": lambda body: json.dumps({**body, "temperature": -3}).encode(),
    "prompt too long": lambda body: json.dumps({**body, "prompt": [1] * (1 << 18)}).encode(),
}
