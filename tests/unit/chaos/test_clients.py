"""A client outlives whatever it is answered."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from chaos.asks import Ask
from chaos.clients import Outcome, perform


def answered(*lines: bytes) -> Outcome:
    """What a client makes of this stream."""

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"".join(b"data: %s\n\n" % line for line in lines))

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ask = Ask("test", "http", {"model": "m", "stream": True, "messages": []}, flows=True)
    try:
        return perform(ask, {"http": f"http://127.0.0.1:{server.server_port}", "grpc": ""})
    finally:
        server.shutdown()
        server.server_close()


def test_an_answer_that_nobody_can_read_is_a_failure_of_that_request() -> None:
    outcome = answered(b"{x")
    assert outcome.answer is None and not outcome.cut
    assert "DecodeError" in outcome.failure
    assert outcome.ended > outcome.started


def test_a_token_that_comes_twice_shows_although_it_has_no_text() -> None:
    def streamed(*ids: int) -> str | None:
        chunks = [json.dumps({"choices": [{"delta": {"content": ""}, "token_ids": [id]}]}).encode() for id in ids]
        return answered(*chunks, b"[DONE]").answer

    assert streamed(5, 6) is not None
    assert streamed(5, 6) == streamed(5, 6) != streamed(5, 5, 6)
