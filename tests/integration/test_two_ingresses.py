"""Two ingresses on one node share the ports: the death of one costs its own connections and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from answers import CHAT, Asked
from front_process import ShardProcess, chat, until
from google.protobuf.json_format import ParseDict

from moeray.v1 import inference_pb2 as pb
from moeray.v1.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.full


class IngressProcess:
    """One of several ingresses with the same ports."""

    def __init__(self, model: Path, shard: ShardProcess, http_port: int = 0, grpc_port: int = 0) -> None:
        program = str(Path(__file__).with_name("ingress_process.py"))
        command = [sys.executable, program, str(model), str(http_port), str(grpc_port), f"s0={shard.address}"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert self.process.stdout is not None
        self.http_port, self.grpc_port = map(int, self.process.stdout.readline().split())
        self.http, self.grpc = f"http://127.0.0.1:{self.http_port}", f"127.0.0.1:{self.grpc_port}"


@pytest.fixture
def pair(model: Path, shared_shard: ShardProcess) -> Iterator[list[IngressProcess]]:
    first = IngressProcess(model, shared_shard)
    both = [first, IngressProcess(model, shared_shard, first.http_port, first.grpc_port)]
    yield both
    for ingress in both:
        ingress.process.kill()
        ingress.process.wait()


def test_an_ingress_that_dies_leaves_the_ports_to_the_other(
    pair: list[IngressProcess], shared_shard: ShardProcess
) -> None:
    lasting, killed = pair
    streams = [Asked(lasting, CHAT, chat(max_tokens=600, ignore_eos=True), stream=True) for _ in range(12)]
    until(lambda: shared_shard.info().num_requests == len(streams), 60)

    killed.process.kill()

    until(lambda: shared_shard.info().num_requests < len(streams), 60)
    time.sleep(0.5)
    left = shared_shard.info().num_requests
    assert left > 0, "the kernel had given each some"
    for _ in range(10):
        assert Asked(lasting, CHAT, chat(), stream=False).end().choices[0].finish
        with grpc.insecure_channel(
            f"127.0.0.1:{lasting.grpc_port}", [("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            assert InferenceStub(channel).Chat(ParseDict(chat(), pb.ChatRequest()), timeout=60).choices
    ends = [stream.end() for stream in streams]
    assert sum(bool(end.choices) and end.choices[0].finish == "length" for end in ends) == left
