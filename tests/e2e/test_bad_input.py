"""What a person gets wrong costs one clear error, names the field or file, and nobody else anything."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from clusters import Cluster

from moeray.ingress.ports import free_ports
from moeray.tiny import checkpoint_path

ASK = {"model": "moeray-tiny", "messages": [{"role": "user", "content": "What is moeray?"}], "max_tokens": 8}


@pytest.mark.parametrize(
    ("change", "status", "names"),
    [
        ({"model": "gpt-5"}, 404, "gpt-5"),
        ({"messages": []}, 400, "messages"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": 10**12}, 400, "max_tokens"),
        ({"temperature": "warm"}, 400, "temperature"),
        ({"temperature": -1}, 400, "temperature"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "4096"),
        ({"n": 0}, 400, "n must be"),
    ],
)
def test_a_bad_request_names_the_field(
    shared_cluster: Cluster, change: dict[str, Any], status: int, names: str
) -> None:
    got, answer = shared_cluster.post("/v1/chat/completions", ASK | change)
    assert got == status, answer
    assert set(answer["error"]) >= {"message", "type", "code"}
    assert names in json.dumps(answer["error"]), answer


@pytest.mark.parametrize(
    "body",
    [
        b"{not json",
        b'{"model": "moeray-tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
        b"",
    ],
    ids=["malformed", "nan", "empty"],
)
def test_a_bad_body_is_a_400_with_an_error_object(shared_cluster: Cluster, body: bytes) -> None:
    status, answer = shared_cluster.post("/v1/chat/completions", body)
    assert status == 400, answer
    assert answer["error"]["message"]


def test_bad_requests_over_grpc_carry_a_status_that_names_the_field(shared_cluster: Cluster) -> None:
    import grpc
    from google.rpc import error_details_pb2
    from grpc_status import rpc_status

    from moeray.v1 import inference_pb2 as pb
    from moeray.v1 import inference_pb2_grpc as rpc

    user = [pb.ChatMessage(role="user", content="hi")]
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    wrong = [
        (pb.ChatRequest(model="gpt-5", messages=user), grpc.StatusCode.NOT_FOUND, "model"),
        (pb.ChatRequest(model="moeray-tiny"), invalid, "messages"),
        (pb.ChatRequest(model="moeray-tiny", messages=user, max_tokens=-5), invalid, "max_tokens"),
        (pb.ChatRequest(model="moeray-tiny", messages=user, temperature=math.nan), invalid, "temperature"),
    ]  # fmt: skip
    with grpc.insecure_channel(shared_cluster.grpc) as channel:
        stub = rpc.InferenceStub(channel)
        for request, code, field in wrong:
            with pytest.raises(grpc.RpcError) as caught:
                stub.Chat(request, timeout=30)
            assert caught.value.code() is code, caught.value.details()
            status = rpc_status.from_call(caught.value)
            assert status is not None
            violations = error_details_pb2.BadRequest()
            assert any(detail.Unpack(violations) for detail in status.details)
            assert field in violations.field_violations[0].field


def test_bad_requests_do_not_disturb_a_stream(shared_cluster: Cluster) -> None:
    good = ASK | {"max_tokens": 200, "ignore_eos": True, "temperature": 0}
    answers: list[tuple[int, Any]] = []
    thread = threading.Thread(target=lambda: answers.append(shared_cluster.post("/v1/chat/completions", good)))
    alone = shared_cluster.post("/v1/chat/completions", good)
    thread.start()
    while thread.is_alive():
        assert shared_cluster.post("/v1/chat/completions", ASK | {"messages": []})[0] == 400
    assert answers[0][0] == 200
    assert answers[0][1]["choices"] == alone[1]["choices"]


def up(tmp_path: Path, text: str, **env: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    environment = {**os.environ, "MOERAY_STATE_DIR": str(tmp_path), **env}
    return subprocess.run(
        [sys.executable, "-m", "moeray.cli", "up", "-f", str(file), "--detach"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_an_unknown_key_is_refused_before_anything_starts(tmp_path: Path) -> None:
    done = up(tmp_path, "experts: {num_group: 2}\n")
    assert done.returncode == 2
    assert "experts.num_group: unknown key; did you mean num_groups?" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_engine_argument_is_named(tmp_path: Path) -> None:
    done = up(tmp_path, "attention: {engine_args: {max_modle_len: 5}}\n")
    assert done.returncode == 2, done.stderr
    assert "attention.engine_args.max_modle_len" in done.stderr


def test_a_missing_model_says_what_was_tried(tmp_path: Path) -> None:
    done = up(tmp_path, "model: ./nowhere\n")
    assert (done.returncode, "./nowhere" in done.stderr, "moeray-tiny" in done.stderr) == (2, True, True), done.stderr


def damaged(tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(checkpoint_path(), copy)
    return copy


def test_a_missing_checkpoint_file_is_named(tmp_path: Path) -> None:
    (damaged(tmp_path) / "model.safetensors").unlink()
    done = up(tmp_path, f"model: {tmp_path / 'model'}\n")
    assert done.returncode == 2
    assert "safetensors" in done.stderr and "Traceback" not in done.stderr


def test_a_truncated_checkpoint_is_named_with_its_bytes(tmp_path: Path) -> None:
    file = damaged(tmp_path) / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 4096)
    done = up(tmp_path, f"model: {tmp_path / 'model'}\n")
    assert done.returncode == 2
    assert "model.safetensors" in done.stderr and f"{size:,}".replace(",", "") in done.stderr.replace(",", "").replace(
        "_", ""
    )


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    file = damaged(tmp_path) / "model.safetensors"
    with file.open("r+b") as handle:
        handle.write(struct.pack("<Q", 2**60))
    done = up(tmp_path, f"model: {tmp_path / 'model'}\n")
    assert (done.returncode, "model.safetensors" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize("key", ["http_port", "grpc_port"])
def test_a_port_in_use_is_named_with_its_key(tmp_path: Path, key: str) -> None:
    taken, other = free_ports("127.0.0.1", 2)
    with socket.create_server(("127.0.0.1", taken)):
        rest = "grpc_port" if key == "http_port" else "http_port"
        done = up(tmp_path, f"ingress: {{{key}: {taken}, {rest}: {other}}}\n")
    assert done.returncode == 2
    assert f"ingress.{key}" in done.stderr and str(taken) in done.stderr


def test_too_little_memory_shows_the_arithmetic(tmp_path: Path) -> None:
    http, grpc = free_ports("127.0.0.1", 2)
    ports = f"ingress: {{http_port: {http}, grpc_port: {grpc}}}"
    done = up(tmp_path, f"attention: {{num_shards: 1, engine_args: {{kv_cache_memory_bytes: {2**50}}}}}\n{ports}\n")
    assert done.returncode == 2
    assert "too little memory" in done.stderr and "kv_cache_memory_bytes" in done.stderr


def test_commands_without_a_cluster_say_how_to_start_one(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "MOERAY_STATE_DIR": str(tmp_path)
    }
    for command in (["status"], ["down"], ["chat", "hi"]):
        done = subprocess.run(
            [sys.executable, "-m", "moeray.cli", *command],
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, "moeray up" in done.stderr, "Traceback" in done.stderr) == (1, True, False), (
            done.stderr
        )
