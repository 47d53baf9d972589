"""The playground's route: what it answers, and that the policy in its headers fits the page."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from fastapi import FastAPI
from starlette.responses import Response
from starlette.testclient import TestClient

from serve.playground.route import add_playground, content_security_policy

PAGE = files("serve.playground").joinpath("page.html").read_text(encoding="utf-8")


class Inline(HTMLParser):
    """The text of the page's inline styles and scripts, and every attribute of every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {"style": [], "script": []}
        self.attributes: list[tuple[str, str, str]] = []
        self._open: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in self.texts:
            self._open = tag
            self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.texts[self._open][-1] += data


@pytest.fixture
def inline() -> Inline:
    parser = Inline()
    parser.feed(PAGE)
    return parser


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    add_playground(app)
    return TestClient(app)


def policy(csp: str) -> dict[str, list[str]]:
    return {words[0]: words[1:] for words in (directive.split() for directive in csp.split("; "))}


def test_the_page_is_html_and_is_served_byte_for_byte(client: TestClient) -> None:
    answer = client.get("/playground")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.content == PAGE.encode()


def test_head_answers_with_the_same_headers_and_nothing_else_is_allowed(client: TestClient) -> None:
    head, get = client.head("/playground"), client.get("/playground")
    assert (head.status_code, dict(head.headers)) == (200, dict(get.headers))
    assert client.post("/playground").status_code == 405


def test_the_page_is_left_out_of_the_api_schema(client: TestClient) -> None:
    assert client.get("/openapi.json").json()["paths"] == {}


def test_security_headers(client: TestClient) -> None:
    headers = client.get("/playground").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["cache-control"] == "no-cache"


def test_the_policy_allows_the_inline_style_and_script_by_hash_and_nothing_else(client: TestClient, inline: Inline) -> None:
    found = policy(client.get("/playground").headers["content-security-policy"])
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inline.texts[tag]]
        assert len(digests) == 1
        assert found.pop(directive) == [f"'sha256-{digest}'" for digest in digests]
    assert found == {
        "default-src": ["'none'"],
        "connect-src": ["'self'"],
        "img-src": ["data:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
        "require-trusted-types-for": ["'script'"],
        "trusted-types": ["'none'"],
    }


def test_a_changed_script_changes_the_policy() -> None:
    assert content_security_policy(PAGE.replace("const POLL_MS = 2000;", "const POLL_MS = 1;")) != content_security_policy(PAGE)


def test_nothing_in_the_page_comes_from_elsewhere(inline: Inline) -> None:
    assert re.search(r"https?:|\bwss?:|['\"(]//|@import|url\(", PAGE) is None
    assert [value for _, name, value in inline.attributes if name in ("src", "srcset", "href", "action", "data")] == ["data:,"]


def test_the_page_uses_only_what_the_policy_allows(inline: Inline) -> None:
    names = {name for _, name, _ in inline.attributes}
    assert "style" not in names
    assert not any(name.startswith("on") for name in names)


@pytest.mark.parametrize("sink", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("])
def test_the_script_never_makes_markup_or_code_from_text(sink: str) -> None:
    assert sink not in PAGE


@pytest.mark.parametrize("store", ["localStorage", "sessionStorage", "cookie", "indexedDB", "location.hash", "pushState"])
def test_the_key_is_stored_nowhere(store: str) -> None:
    assert store not in PAGE


def test_no_positive_tabindex_and_every_control_has_a_label(inline: Inline) -> None:
    assert {value for _, name, value in inline.attributes if name == "tabindex"} == {"0"}
    controls = re.findall(r"<(?:input|select|textarea)\b", PAGE.split("<script")[0])
    labelled = re.findall(r"<label[^>]*>[^<]*<(?:input|select|textarea)\b", PAGE.split("<script")[0])
    assert len(labelled) == len(controls) > 8


def test_it_works_below_a_root_path() -> None:
    app = FastAPI(root_path="/models/tiny")
    add_playground(app)

    @app.get("/v1/models")
    async def models() -> Response:
        return Response("here")

    client = TestClient(app, base_url="http://server")
    page = client.get("/models/tiny/playground")
    assert page.status_code == 200
    # The script asks for relative paths; a browser resolves them like this.
    assert set(re.findall(r'ask\("(.*?)"', PAGE)) == {"v1/models", "v1/precisions", "tokenize"}
    assert client.get(str(page.url.join("v1/models"))).text == "here"
