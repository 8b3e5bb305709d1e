"""A client outlives whatever it is answered."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from chaos.asks import Ask
from chaos.clients import perform


class Babble(BaseHTTPRequestHandler):
    """Answers a stream that is none."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"data: {x\n\n")

    def log_message(self, *_: object) -> None: ...


def test_an_answer_that_nobody_can_read_is_a_failure_of_that_request() -> None:
    server = HTTPServer(("127.0.0.1", 0), Babble)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ask = Ask("babble", "http", {"model": "m", "stream": True, "messages": []}, flows=True)
    outcome = perform(ask, {"http": f"http://127.0.0.1:{server.server_port}", "grpc": ""})
    server.shutdown()
    server.server_close()
    assert outcome.answer is None and not outcome.cut
    assert "DecodeError" in outcome.failure
    assert outcome.ended > outcome.started
