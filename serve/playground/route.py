"""``GET /playground``: one static page, and the headers that keep it to this server.

The page holds no secret and asks for the API key itself, so that it may be served outside authentication. Its content
security policy names the hashes of the one style sheet and the one script in the file: nothing else is applied or run,
nothing is loaded from elsewhere, and the script talks to this server alone.
"""

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import Response

PLAYGROUND_PATH = "/playground"

PAGE_FILE = "page.html"

_INLINE = re.compile(r"<(style|script)\b[^>]*>(.*?)</\1>", re.DOTALL)


def add_playground(app: FastAPI) -> None:
    """Serve the page at ``/playground``. It finds the API by paths relative to its own, so ``root_path`` may be any."""
    page = files(__package__).joinpath(PAGE_FILE).read_text(encoding="utf-8")
    content, headers = page.encode(), page_headers(page)

    async def playground() -> Response:
        return Response(content, media_type="text/html", headers=headers)

    # Not part of the API: the OpenAPI schema leaves it out.
    app.add_api_route(PLAYGROUND_PATH, playground, methods=["GET", "HEAD"], include_in_schema=False)


def page_headers(page: str) -> dict[str, str]:
    """Response headers for ``page``, an HTML document whose styles and scripts are all inline."""
    return {
        "Content-Security-Policy": content_security_policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        # The page belongs to the server's version: never an old page with a new API.
        "Cache-Control": "no-cache",
    }


def content_security_policy(page: str) -> str:
    """The policy under which the inline styles and scripts of ``page`` work, and nothing else does."""
    allowed: dict[str, list[str]] = {"style": [], "script": []}
    for tag, text in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allowed[tag].append(f"'sha256-{digest}'")
    return "; ".join(
        [
            "default-src 'none'",
            f"style-src {' '.join(allowed['style'])}",
            f"script-src {' '.join(allowed['script'])}",
            "connect-src 'self'",
            # The empty icon in the page, so that browsers do not ask for /favicon.ico.
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            # Assigning markup from a string is an error in the browser: model output can only ever be text.
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )
