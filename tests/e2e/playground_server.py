"""A small HTTP server that serves the playground beside a made-up engine: vLLM's stream format and a canned load."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Mapping

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from serve.playground.route import add_playground

MODEL = "tiny"
HELD_AFTER = 3
"""Words after which a stream waits while ``PlaygroundServer.hold`` is set."""

TEXTS = {
    "8": "The captain of the ship was a tall man, and he looked at the sea for a long time before he spoke.",
    "4": "The captain of the ship was a tall man, and he gazed at the sea for some time before he spoke.",
    "2": "The captain the ship ship was was a a man man the the sea <img src=x onerror=alert(1)> <b>bold</b> &amp; end.",
}


def precisions() -> dict:
    """A document of ``GET /v1/precisions``; "6" has not been measured."""
    rows = [("2", 2.0, 61.2, 4.1), ("3", 3.0, 27.9, 4.9), ("4", 4.0, 22.4, 5.8), ("6", 6.0, 20.6, None), ("8", 8.0, 20.1, 9.3)]
    rows += [("mix-3.0", 3.02, 25.1, 5.0), ("mix-5.0", 4.98, 20.9, 6.9)]
    now = time.time()
    decisions = [
        *[(5 * age, "8", "auto", 10.2, None, 2) for age in range(14, 8, -1)],
        (34, "4", "budget", 7.9, 8.0, 4),
        (21, "mix-5.0", "auto", 11.8, 12.0, 7),
        (9, "2", "best-effort", 9.6, 5.0, 9),
    ]
    return {
        "object": "list",
        "default": "8",
        "max_width": 8,
        "slice_rule": "nested",
        "data": [
            {
                "id": name,
                "object": "precision",
                "default": name == "8",
                "average_bits": bits,
                "bytes_per_weight": bits / 8 + 0.02,
                "models": [f"{MODEL}@{name}"],
                "step_ms": {"1": ms, "8": ms and round(1.2 * ms, 2), "32": ms and round(2.1 * ms, 2)},
                "perplexity": perplexity,
            }
            for name, bits, perplexity, ms in rows
        ],
        "workers": None,
        "load": {"running": {"2": 1, "4": 3, "8": 5}, "waiting": 2, "context_tokens": 2812, "kv_cache_usage": 0.083},
        "latency_model": {"source": "sweep", "observations": 412, "mean_error": 0.08},
        "slo": {"tpot_ms": 12, "ttft_ms": None, "auto_floor": "3"},
        "decisions": [
            {
                "time": now - age,
                "precision": precision,
                "reason": reason,
                "predicted_tpot_ms": predicted,
                "budget_tpot_ms": budget,
                "running": running,
            }
            for age, precision, reason, predicted, budget, running in decisions
        ],
    }


class PlaygroundServer:
    """A context manager; ``url`` is the page's.

    Attributes:
        key: what ``Authorization`` must carry; None: nothing.
        chat_template: whether the model can chat.
        hold: as long as it is set, streams wait after HELD_AFTER words.
        document: what ``GET /v1/precisions`` answers.
        breaks_off: whether streams end without their last event.
        texts: what each precision says, a word per token.
        requests: headers and body of every request for a completion.
        open_streams, most_streams, abandoned: streams under way, the most at a time, and those whose client went away.
    """

    def __init__(self) -> None:
        app = FastAPI()
        add_playground(app)
        app.add_api_route("/v1/models", self._models, methods=["GET"])
        app.add_api_route("/v1/precisions", self._precisions, methods=["GET"])
        app.add_api_route("/tokenize", self._tokenize, methods=["POST"])
        app.add_api_route("/v1/completions", self._generate, methods=["POST"])
        app.add_api_route("/v1/chat/completions", self._generate, methods=["POST"])
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self.reset()

    def reset(self) -> None:
        """Back to the state of a new server."""
        self.key: str | None = None
        self.chat_template = True
        self.hold = self.breaks_off = False
        self.word_delay_s = 0.004
        self.document = precisions()
        self.texts = dict(TEXTS)
        self.requests: list[tuple[Mapping[str, str], dict]] = []
        self.open_streams = self.most_streams = self.abandoned = 0

    def __enter__(self) -> "PlaygroundServer":
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/playground"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)

    def _refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": "Unauthorized"}, status_code=401)

    async def _models(self, request: Request) -> Response:
        names = [*(f"{MODEL}@{entry['id']}" for entry in self.document["data"]), MODEL]
        return self._refused(request) or JSONResponse({"object": "list", "data": [{"id": name} for name in names]})

    async def _precisions(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse(self.document)

    async def _tokenize(self, request: Request) -> Response:
        if self.chat_template:
            return JSONResponse({"count": 1, "tokens": [1]})
        return _error(400, "the tokenizer has no chat template")

    async def _generate(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append((dict(request.headers), body))
        asked = request.headers["x-precision"]
        if asked == "6":
            return _error(400, "precision '6' is not held by this replica; ask for one of 2, 3, 4, 8, auto")
        if asked == "auto" and request.headers.get("x-precision-policy") == "strict":
            return _error(429, "no precision meets the budget at the present load", {"Retry-After": "7"})
        profile = "4" if asked == "auto" else asked
        reason = "budget" if "x-latency-budget-ms" in request.headers else "auto" if asked == "auto" else "header"
        headers = {"X-Precision": profile, "X-Precision-Reason": reason}
        chat = request.url.path.endswith("/chat/completions")
        stream = self._stream(self.texts.get(profile, self.texts["8"]), chat, body["max_tokens"])
        return self._refused(request) or StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    async def _stream(self, text: str, chat: bool, max_tokens: int) -> AsyncIterator[str]:
        self.open_streams += 1
        self.most_streams = max(self.most_streams, self.open_streams)
        complete = False
        try:
            if chat:
                yield _event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            words = text.split(" ")[:max_tokens]
            for index, word in enumerate(words):
                while self.hold and index >= HELD_AFTER:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(self.word_delay_s)
                piece = word if index == 0 else f" {word}"
                choice = {"delta": {"content": piece}} if chat else {"text": piece}
                usage = {"prompt_tokens": 6, "completion_tokens": index + 1, "total_tokens": index + 7}
                yield _event({"choices": [{"index": 0, **choice, "finish_reason": None}], "usage": usage})
            if not self.breaks_off:
                yield "data: [DONE]\n\n"
            complete = True
        finally:
            self.open_streams -= 1
            self.abandoned += not complete


def _event(document: dict) -> str:
    return f"data: {json.dumps(document)}\n\n"


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": status}
    return JSONResponse({"error": error}, status_code=status, headers=headers)
