"""An ingress that stops: what it has is answered, what it cannot end is told so, nothing new is lost on the way."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import pytest
from answers import CHAT, Asked
from front_process import Ingress, ShardProcess, chat, until
from google.protobuf.json_format import ParseDict
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from test_two_ingresses import IngressProcess

from moeray.ingress import stopping
from moeray.v1 import inference_pb2 as pb
from moeray.v1.inference_pb2_grpc import InferenceStub

ENDLESS = {"max_tokens": 3000, "ignore_eos": True}


@pytest.fixture
def leaving(model: Path, shared_shard: ShardProcess) -> Iterator[Ingress]:
    """An ingress to stop."""
    ingress = Ingress(model)
    ingress.set_shards(shared_shard)
    yield ingress
    ingress.stop()


def stop(ingress: Ingress, drain_s: float) -> Future[None]:
    return asyncio.run_coroutine_threadsafe(ingress.server.stop(drain_s), ingress._loop)


def grpc_stream(ingress: Ingress, stack: contextlib.ExitStack, **changes: Any) -> tuple[grpc.Channel, Any]:
    """A stream on a channel of its own that has had a chunk."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = stack.enter_context(grpc.insecure_channel(ingress.grpc, options))
    call = InferenceStub(channel).ChatStream(ParseDict(chat(**changes), pb.ChatRequest()))
    next(call)
    return channel, call


def asked(connection: http.client.HTTPConnection, method: str, path: str, body: Any = None) -> tuple[int, Any, Any]:
    connection.request(method, path, json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read()), answer.headers


def open_connections(ingress: Ingress, count: int) -> list[http.client.HTTPConnection]:
    """Connections that the ingress knows, and that have asked nothing yet."""
    found = [http.client.HTTPConnection("127.0.0.1", ingress.server.http_port, timeout=60) for _ in range(count)]
    server = ingress.server._http
    assert server is not None
    before = server.num_connections
    for connection in found:
        connection.connect()
    until(lambda: server.num_connections == before + count)
    return found


def test_streams_end_by_themselves_while_nothing_new_is_taken(
    leaving: Ingress, shared_shard: ShardProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "SETTLE_S", 2.0)  # the streams must last longer, however fast this machine is
    lasting = {"max_tokens": 1200, "ignore_eos": True}
    with contextlib.ExitStack() as stack:
        over_http = Asked(leaving, CHAT, chat(**lasting), stream=True)
        channel, over_grpc = grpc_stream(leaving, stack, **lasting)
        watched = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service="moeray.v1.Inference")
        )
        until(lambda: next(watched).status == health_pb2.HealthCheckResponse.SERVING)
        until(lambda: shared_shard.info().num_requests == 2, 60)
        new, ready, alive, other = open_connections(leaving, 4)

        stopped = stop(leaving, 120)

        assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
        status, body, headers = asked(ready, "GET", "/ready")
        assert (status, body["status"], headers["connection"]) == (503, "stopping", "close")
        assert asked(alive, "GET", "/health")[0] == 200
        until(lambda: leaving.server._arrivals.is_closed)
        status, body, headers = asked(new, "POST", CHAT, chat())
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, 503, "1")
        assert "stopping" in body["error"]["message"] and headers["connection"] == "close"
        with pytest.raises(ConnectionRefusedError):
            http.client.HTTPConnection("127.0.0.1", leaving.server.http_port, timeout=60).connect()
        with pytest.raises(grpc.RpcError) as refused:
            InferenceStub(channel).Chat(ParseDict(chat(), pb.ChatRequest()), timeout=60)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not stopped.done()

        assert over_http.end().choices[0].finish == "length"
        assert [chunk.choices[0].finish_reason for chunk in over_grpc if chunk.choices][-1] == "length"
        stopped.result(120)
        other.close()


def test_what_outlasts_the_drain_is_told_so_and_may_be_asked_again(
    leaving: Ingress, shared_shard: ShardProcess
) -> None:
    with contextlib.ExitStack() as stack:
        over_http = Asked(leaving, CHAT, chat(**ENDLESS), stream=True)
        whole = Asked(leaving, CHAT, chat(**ENDLESS), stream=False)
        _, over_grpc = grpc_stream(leaving, stack, **ENDLESS)
        until(lambda: shared_shard.info().num_requests == 3, 60)

        stop(leaving, 0.2).result(60)

        over_http.join(60)
        whole.join(60)
        for ended in (over_http, whole):
            assert ended.answer.error is not None and ended.answer.error["code"] == 503, ended.answer
            assert "stopping" in ended.answer.error["message"]
        with pytest.raises(grpc.RpcError) as cut:
            list(over_grpc)
        assert cut.value.code() is grpc.StatusCode.UNAVAILABLE and "stopping" in str(cut.value.details())
        rich = rpc_status.from_call(cut.value)
        assert rich is not None and rich.details[0].Unpack(error_details_pb2.RetryInfo())
        until(lambda: shared_shard.info().num_requests == 0, 60)


def test_a_request_that_is_on_its_way_when_the_stop_begins_is_answered(
    leaving: Ingress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of its head has come, or nothing yet on a connection that the ingress has not even seen."""
    monkeypatch.setattr(stopping, "SETTLE_S", 60.0)  # however slow this machine is
    (half,) = open_connections(leaving, 1)
    body = json.dumps(chat()).encode()
    head = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" % CHAT.encode()
    half.sock.sendall(head)
    unseen = http.client.HTTPConnection("127.0.0.1", leaving.server.http_port, timeout=60)

    async def stop_with_one_in_the_backlog() -> None:
        unseen.connect()  # the loop stands still meanwhile: the kernel alone knows of it
        await leaving.server.stop(60)

    stopped = asyncio.run_coroutine_threadsafe(stop_with_one_in_the_backlog(), leaving._loop)
    until(lambda: leaving.server._arrivals.is_leaving)

    half.sock.sendall(b"content-length: %d\r\n\r\n%s" % (len(body), body))
    status, answer, headers = asked(unseen, "POST", CHAT, chat())
    assert (status, headers["connection"]) == (200, "close"), answer
    answered = http.client.HTTPResponse(half.sock, method="POST")
    answered.begin()
    assert (answered.status, answered.headers["connection"]) == (200, "close"), answered.read()
    answered.read()
    stopped.result(60)


@pytest.mark.full
def test_a_rolling_restart_of_two_ingresses_costs_no_request(model: Path, shared_shard: ShardProcess) -> None:
    """Of clients that connect for each request, those of gRPC with the documented policy, and long streams."""
    first = IngressProcess(model, shared_shard)
    running = [first, IngressProcess(model, shared_shard, first.http_port, first.grpc_port)]
    answers: list[Any] = []
    failures: list[Exception] = []
    is_over = threading.Event()

    def keep_asking(ask: Callable[[], Any]) -> None:
        while not is_over.is_set():
            try:
                answers.append(ask())
            except Exception as error:  # noqa: BLE001  counted below
                failures.append(error)

    def over_http() -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", first.http_port, timeout=120)
        status, body, _ = asked(connection, "POST", CHAT, chat(max_tokens=2))
        assert status == 200, body
        connection.close()
        return body

    retry = {"maxAttempts": 5, "initialBackoff": "0.2s", "maxBackoff": "5s", "backoffMultiplier": 2}
    policy = {"name": [{}], "retryPolicy": retry | {"retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"]}}
    options = [("grpc.service_config", json.dumps({"methodConfig": [policy]}))]
    with grpc.insecure_channel(first.grpc, options) as channel:
        message = ParseDict(chat(max_tokens=2), pb.ChatRequest())
        threads = [threading.Thread(target=keep_asking, args=(over_http,)) for _ in range(2)]
        stub = InferenceStub(channel)
        threads += [threading.Thread(target=keep_asking, args=(lambda: stub.Chat(message, timeout=120),))]
        for thread in threads:
            thread.start()
        streams = [Asked(first, CHAT, chat(max_tokens=300, ignore_eos=True), stream=True) for _ in range(4)]
        try:
            for number in range(2):
                before = len(answers)
                until(lambda before=before: len(answers) > before + 5, 120)  # type: ignore[misc]
                running[number].process.terminate()
                assert running[number].process.wait(240) == 0
                if not number:
                    running.append(IngressProcess(model, shared_shard, first.http_port, first.grpc_port))
            ends = [stream.end() for stream in streams]
        finally:
            is_over.set()
            for thread in threads:
                thread.join(120)
            for ingress in running:
                ingress.process.kill()
                ingress.process.wait()
    assert not failures and len(answers) > 20
    assert [end.choices[0].finish for end in ends] == ["length"] * 4
