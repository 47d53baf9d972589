"""serve.exchange: when the headers of an answer leave."""

import asyncio

from starlette.types import Message

from serve.exchange import Exchange

START: Message = {"type": "http.response.start", "status": 200, "headers": []}


def test_headers_wait_for_the_first_piece_of_the_answer() -> None:
    sent: list[str] = []

    async def send(message: Message) -> None:
        sent.append(message["type"])

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def answer() -> None:
        exchange = Exchange.unchanged({"type": "http", "headers": []}, receive, send)
        await exchange.send(START)
        assert sent == []
        for more in (True, False):
            await exchange.send({"type": "http.response.body", "body": b"token", "more_body": more})
        assert exchange.outcome == 200

    asyncio.run(answer())
    assert sent == ["http.response.start", "http.response.body", "http.response.body"]
