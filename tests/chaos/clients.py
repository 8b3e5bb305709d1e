"""One request as a client makes it, and what came back when: text, usage, chunk times, errors."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import grpc
from google.protobuf.json_format import ParseDict

from chaos.asks import Ask
from moeray.ingress.convert import to_json
from moeray.v1 import inference_pb2 as pb
from moeray.v1.inference_pb2_grpc import InferenceStub

TIMEOUT_S = 240.0
"""Of one request; more than `experts.wait_s`, which may pass when experts have no copy left."""
_BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""What gRPC makes of it; the second of a call that arrives while the server ends."""
_DETAILS = "grpc-status-details-bin"
"""Carried by every error that the service itself gives, and by none that gRPC makes of a broken connection."""


REQUEST_ID = "x-request-id"


class Refused(Exception):
    """The server answered with an error."""


class Cut(Exception):
    """The connection broke or was not accepted."""


@dataclass
class Outcome:
    """What one client saw.

    Attributes:
        ask: what it asked.
        started, ended: monotonic seconds.
        times: when each chunk came (streams), or the answer.
        answer: canonical content, to be compared as it is; None if there is none.
        logprobs: every log-probability in order; compared with a tolerance.
        failure: what the server said, or what broke.
        cut: the connection broke, and the protocol has no way to go on: a client may ask again.
        cuts: when that happened, to this ask before it was answered.
        request_id: what the client called it.
    """

    ask: Ask
    started: float
    ended: float = 0.0
    times: list[float] = field(default_factory=list)
    answer: str | None = None
    logprobs: list[float] = field(default_factory=list)
    failure: str = ""
    cut: bool = False
    cuts: list[float] = field(default_factory=list)
    request_id: str = ""

    def gaps(self, first_chunk_s: float = 0.0) -> Iterator[tuple[float, float]]:
        """(from, to) of every wait of a stream that flows: for its first chunk longer than usual, and between two.

        Args:
            first_chunk_s: what is usual.
        """
        if self.ask.flows and self.times:
            yield min(self.started + first_chunk_s, self.times[0]), self.times[0]
            yield from pairwise(self.times)


def perform(ask: Ask, endpoints: dict[str, str], request_id: str = "") -> Outcome:
    """Ask once."""
    outcome = Outcome(ask, time.monotonic(), request_id=request_id)
    over = http_chunks if ask.protocol == "http" else _grpc_chunks
    chunks = over(ask, endpoints[ask.protocol], {REQUEST_ID: request_id} if request_id else {})
    collected = _Answer()
    try:
        for chunk in chunks:
            outcome.times.append(time.monotonic())
            collected.add(chunk)
            if ask.abort_after is not None and len(outcome.times) >= ask.abort_after:
                break
        outcome.answer, outcome.logprobs = collected.canonical(), collected.logprobs
    except Refused as error:
        outcome.failure = str(error)
    except Cut as error:
        outcome.failure, outcome.cut = str(error), True
    except Exception as error:  # noqa: BLE001  an answer that nobody can read is a failed one, not the end of a client
        outcome.failure = f"{type(error).__name__}: {error}"
    finally:
        chunks.close()  # type: ignore[attr-defined]
        outcome.ended = time.monotonic()
    return outcome


class _Answer:
    """Chunks or a whole answer, as one comparable text."""

    def __init__(self) -> None:
        self.logprobs: list[float] = []
        self._choices: dict[int, dict[str, Any]] = {}
        self._usage: Any = None

    def add(self, data: dict[str, Any]) -> None:
        if data.get("usage"):
            self._usage = {key: int(data["usage"].get(key) or 0) for key in ("prompt_tokens", "completion_tokens")}
        for choice in data.get("choices") or ():
            into = self._choices.setdefault(
                int(choice.get("index") or 0),
                {"content": "", "reasoning": "", "calls": {}, "finish": None, "tokens": [], "ids": []},
            )
            into["ids"] += choice.get("token_ids") or ()
            part = choice.get("delta") or choice.get("message") or {}
            into["content"] += part.get("content") or ""
            into["reasoning"] += part.get("reasoning") or ""
            for number, call in enumerate(part.get("tool_calls") or ()):
                known = into["calls"].setdefault(int(call.get("index") or number), ["", ""])
                function = call.get("function") or {}
                known[0] += function.get("name") or ""
                known[1] += function.get("arguments") or ""
            if choice.get("finish_reason"):
                into["finish"] = choice["finish_reason"]
            for token in (choice.get("logprobs") or {}).get("content") or ():
                into["tokens"].append(token["token"])
                self.logprobs.append(float(token["logprob"]))

    def canonical(self) -> str:
        return json.dumps([sorted(self._choices.items()), self._usage], ensure_ascii=False)


def http_chunks(ask: Ask, base: str, headers: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Every chunk of a stream, or the answer.

    Raises:
        Refused, Cut: see there.
    """
    where = urlsplit(base)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=TIMEOUT_S)
    try:
        connection.request(
            "POST",
            ask.path,
            json.dumps(ask.body),
            {"content-type": "application/json", "connection": "close", **headers},
        )
        answer = connection.getresponse()
        if answer.status != 200:
            raise Refused(f"HTTP {answer.status}: {answer.read(2000).decode(errors='replace')}")
        if not ask.is_stream:
            yield json.loads(answer.read())
            return
        finished = False
        for line in answer:
            if line.startswith(b"data: {"):
                data = json.loads(line[6:])
                if "error" in data:
                    raise Refused(f"error event: {data['error']}")
                yield data
            finished = finished or line.startswith(b"data: [DONE]")
        if not finished:
            raise Cut("the stream ended without [DONE]")
    except (OSError, http.client.HTTPException) as error:
        raise Cut(f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()


def _grpc_chunks(ask: Ask, address: str, headers: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    body = {key: value for key, value in ask.body.items() if key != "stream"}
    body.pop("stream_options", None) if not ask.is_stream else None
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
    with grpc.insecure_channel(address, options=options) as channel:
        stub, request = InferenceStub(channel), ParseDict(body, pb.ChatRequest())
        metadata = tuple(headers.items())
        try:
            if ask.is_stream:
                call = stub.ChatStream(request, timeout=TIMEOUT_S, metadata=metadata)
                try:
                    for chunk in call:
                        yield to_json(chunk)
                finally:
                    call.cancel()
            else:
                yield to_json(stub.Chat(request, timeout=TIMEOUT_S, metadata=metadata))
        except grpc.RpcError as error:
            answered = any(key == _DETAILS for key, _ in error.trailing_metadata() or ())
            broken = error.code() in _BROKEN and not answered
            raise (Cut if broken else Refused)(f"gRPC {error.code().name}: {error.details()}") from error
