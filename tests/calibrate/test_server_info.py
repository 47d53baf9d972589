import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from calibrate.evaluate.server import ask_server
from matgptq_vllm.core.errors import InputError

REPLICA = {
    "/v1/models": {"data": [{"id": "name", "max_model_len": 64}, {"id": "name@4", "max_model_len": 64}]},
    "/v1/precisions": {"data": [{"id": "4"}, {"id": "mix-3.0"}]},
}


@pytest.fixture
def serve() -> Iterator:
    """Function from paths and documents to the address of a server that answers them, and 404 to all else."""
    servers = []

    def start(documents: dict) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                document = documents.get(self.path)
                self.send_response(404 if document is None else 200)
                self.end_headers()
                self.wfile.write(json.dumps(document).encode())

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_a_replica_tells_its_model_context_and_precisions(serve, suffix):
    url = serve(REPLICA)
    server = ask_server(url + suffix)
    assert (server.url, server.model, server.context, server.precisions) == (url, "name", 64, ("4", "mix-3.0"))
    server.check_precision("mix-3.0")
    with pytest.raises(InputError, match=r"'8' is not held by the server at http.*; it holds 4, mix-3\.0, auto"):
        server.check_precision("8")


def test_what_is_no_replica_is_refused(serve):
    with pytest.raises(InputError, match="/v1/precisions answered 404"):
        ask_server(serve({"/v1/models": REPLICA["/v1/models"]}))
    with pytest.raises(InputError, match="is not a MatGPTQ replica"):
        ask_server(serve({"/v1/models": {"models": []}}))
    with pytest.raises(InputError, match="is not an address"):
        ask_server("localhost:8000")
    with pytest.raises(InputError, match=r"no server answers at http://127\.0\.0\.1:1 .*; start one with `matgptq serve DIR`"):
        ask_server("http://127.0.0.1:1")
