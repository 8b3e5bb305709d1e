"""More than can be done in time: refused at once and with when to come back; the urgent go first; nothing is kept."""

from __future__ import annotations

import json
import socket
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, ClassVar

import grpc
import psutil
import pytest
from front_process import Ingress, ShardProcess, chat, until
from google.protobuf.json_format import ParseDict
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from moeray.config import IngressConfig
from moeray.v1 import inference_pb2 as pb
from moeray.v1.inference_pb2_grpc import InferenceStub

CHAT = "/v1/chat/completions"
LONG = {"max_tokens": 3000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def one_at_a_time(model: Path) -> Iterator[ShardProcess]:
    """A shard that runs one request at a time, and a KV cache that vLLM says the size of."""
    shard = ShardProcess("narrow", model, max_num_seqs=1)
    assert shard.wait_ready().event == "ready"
    shard.connect(model)
    yield shard
    shard.stop()


@pytest.fixture(scope="module")
def small(model: Path, one_at_a_time: ShardProcess) -> Iterator[Ingress]:
    """An ingress that takes three requests of one priority."""
    ingress = Ingress(model, IngressConfig(max_requests=3))
    ingress.set_shards(one_at_a_time)
    until(lambda: ingress.server.describe()["admission"]["kv_tokens"] > 0)
    yield ingress
    ingress.stop()


class Stream(threading.Thread):
    """One HTTP stream in a thread: its place in the order of first tokens, until it is closed."""

    order: ClassVar[list[str]] = []
    lock = threading.Lock()

    def __init__(self, ingress: Ingress, name: str, **changes: Any) -> None:
        super().__init__(daemon=True, name=name)
        body = json.dumps(chat(**LONG | changes)).encode()
        request = urllib.request.Request(ingress.http + CHAT, body, {"content-type": "application/json"})
        self._answer = urllib.request.urlopen(request, timeout=120)
        self.start()

    def run(self) -> None:
        with suppress(OSError, ValueError, AttributeError):  # closed while it was read
            for line in self._answer:
                if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    with self.lock:
                        if self.name not in self.order:
                            self.order.append(self.name)

    def close(self) -> None:
        self._answer.fp.raw._sock.shutdown(2)  # a reader in another thread holds the buffer's lock
        self.join(60)


def admission(ingress: Ingress) -> dict[str, Any]:
    described: dict[str, Any] = ingress.server.describe()["admission"]
    return described


def test_overload_is_refused_before_the_response_and_the_urgent_overtake(small: Ingress) -> None:
    Stream.order.clear()
    streams = [Stream(small, "first")]
    until(lambda: Stream.order == ["first"])
    streams += [Stream(small, "second"), Stream(small, "third")]

    for stream in (True, False):
        status, answer, headers = small.post(CHAT, chat(stream=stream))
        assert (status, int(headers["retry-after"]) >= 1) == (429, True)
        assert answer["error"]["code"] == 429 and "ingress.max_requests is 3" in answer["error"]["message"]
    with grpc.insecure_channel(small.grpc) as channel, pytest.raises(grpc.RpcError) as refused:
        InferenceStub(channel).Chat(ParseDict(chat(), pb.ChatRequest()), timeout=60)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    retry = error_details_pb2.RetryInfo()
    rich = rpc_status.from_call(refused.value)
    assert rich is not None and rich.details[0].Unpack(retry) and retry.retry_delay.seconds >= 1

    streams.append(Stream(small, "urgent", priority=-1))
    until(lambda: admission(small)["requests"] == 4)
    streams[0].close()
    until(lambda: "urgent" in Stream.order, 60)
    assert Stream.order == ["first", "urgent"]
    for each in streams[1:]:
        each.close()
    until(lambda: admission(small)["requests"] == 0, 60)
    assert small.post(CHAT, chat())[0] == 200


def test_a_request_waits_until_its_own_first_token_whatever_others_are_called(small: Ingress) -> None:
    Stream.order.clear()
    with ExitStack() as streams:
        first = Stream(small, "first", request_id="same")
        until(lambda: Stream.order == ["first"], 60)
        assert admission(small)["waiting"] == 0
        streams.callback(Stream(small, "second", request_id="same").close)
        until(lambda: admission(small)["waiting"] == 1, 60)
        assert small.server.num_requests == 2
        first.close()
        until(lambda: Stream.order == ["first", "second"], 60)
        assert admission(small)["waiting"] == 0
    until(lambda: admission(small)["requests"] == 0, 60)


def test_tokens_are_judged_against_what_the_shard_says_it_holds(small: Ingress, one_at_a_time: ShardProcess) -> None:
    described = admission(small)
    assert described["kv_tokens"] > 4096
    stream = Stream(small, "counted", max_tokens=1000, n=2, temperature=1)
    until(lambda: admission(small)["tokens"] > 2000)
    assert 2000 < admission(small)["tokens"] < 2200
    stream.close()
    until(lambda: admission(small)["tokens"] == 0, 60)


@pytest.fixture(scope="module")
def impatient(model: Path, one_at_a_time: ShardProcess) -> Iterator[Ingress]:
    """An ingress that ends what is not read for two seconds."""
    ingress = Ingress(model, IngressConfig(max_wait_s=2))
    ingress.set_shards(one_at_a_time)
    yield ingress
    ingress.stop()


@pytest.mark.full
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_client_that_reads_nothing_of_its_stream_loses_its_place(
    impatient: Ingress, one_at_a_time: ShardProcess, protocol: str
) -> None:
    """Chunks of some kilobytes each, because what the kernel takes in counts as read."""
    body = chat(**LONG | {"logprobs": True, "top_logprobs": 20})
    with ExitStack() as stack:
        if protocol == "http":
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", impatient.server.http_port))
            data = json.dumps(body).encode()
            client.sendall(
                b"POST %s HTTP/1.1\r\nhost: ingress\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
                % (CHAT.encode(), len(data), data)
            )
        else:
            small_window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096))
            channel = stack.enter_context(grpc.insecure_channel(impatient.grpc, options=small_window))
            message = ParseDict({key: value for key, value in body.items() if key != "stream"}, pb.ChatRequest())
            call = InferenceStub(channel).ChatStream(message)
            stack.callback(call.cancel)
        until(lambda: admission(impatient)["requests"] == 1, 60)
        until(lambda: admission(impatient)["requests"] == 0, 120)
        until(lambda: one_at_a_time.info().num_requests == 0, 60)
        if protocol == "grpc":
            with pytest.raises(grpc.RpcError) as ended:
                list(call)
            assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "ingress.max_wait_s" in str(ended.value.details())
        else:
            client.settimeout(60)
            said = b""
            while b"ingress.max_wait_s" not in said[-4096:]:
                said += (piece := client.recv(1 << 16))
                assert piece, "it ended without a word"


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_memory_stays_flat_over_thousands_of_small_requests_with_aborts(ingress: Ingress, model: Path) -> None:
    """The ingress runs in this process, which also asks: both count. The KV cache is small: its pages become resident
    when they are first written, which the first requests have done to all of them.
    """
    shard = ShardProcess("small", model, kv_cache_memory_bytes=32 << 20)
    assert shard.wait_ready().event == "ready"
    shard.connect(model)
    ingress.set_shards(shard)
    processes = [psutil.Process(pid) for pid in (None, shard.up.pid, shard.up.engine_pid)]

    def one(number: int) -> None:
        prompt = [{"role": "user", "content": f"{number}: " + "what " * (number % 40)}]
        if number % 4 == 0:
            Stream(ingress, f"cut {number}", messages=prompt, max_tokens=500).close()
        elif number % 4 == 2:
            Stream(ingress, f"read {number}", messages=prompt, max_tokens=1 + number % 5).join(60)
        else:
            assert ingress.post(CHAT, chat(messages=prompt, max_tokens=1 + number % 5))[0] == 200

    def run(numbers: range) -> list[int]:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, numbers))
        Stream.order.clear()
        until(lambda: admission(ingress)["requests"] == 0 and not ingress.server.num_requests, 60)
        until(lambda: shard.info().num_requests == 0, 60)
        return [process.memory_info().rss for process in processes]

    run(range(5000))  # caches fill, and malloc's arenas, for which the engine takes some 4000 requests
    before = run(range(5000, 6000))
    after = run(range(6000, 9000))
    grown = [(now - then) >> 20 for then, now in zip(before, after, strict=True)]
    assert max(grown) <= 16, f"MiB grown over 3000 requests by ingress, shard process and engine: {grown}"
    shard.stop()
