"""The default cluster serves the bundled model, over both protocols, to strangers."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
from clusters import Cluster, wrong_answers

PROTO_ROOT = Path(__file__).resolve().parents[2] / "deployments" / "moeray" / "ingress" / "proto"


def test_status_names_every_process_of_the_default_topology(shared_cluster: Cluster) -> None:
    state = shared_cluster.status()
    roles = [process["role"] for process in state["processes"] if process["state"] == "ready"]
    assert (state["is_complete"], state["model"]) == (True, "moeray-tiny")
    assert {role: roles.count(role) for role in roles} == {
        "controller": 1, "ingress": 1, "attention_shard": 2, "expert_group": 2,
    }  # fmt: skip
    assert all(process["pid"] > 0 and process["node"] and process["id"] for process in state["processes"])
    assert set(state["endpoints"]) == {"http", "grpc"}


def test_every_thread_of_shards_and_groups_is_on_the_cores_that_status_shows(shared_cluster: Cluster) -> None:
    available = sorted(os.sched_getaffinity(0))
    used: list[int] = []
    for shard in shared_cluster.processes("attention_shard"):
        assert (len(shard["cores"]), shard["threads"]) == (1, 1)
        assert cores_of_threads(shard["engine_pid"]) == set(shard["cores"])
        assert cores_of_threads(shard["shard_pid"]) == {shard["relay_core"]}
        used += shard["cores"]
    for group in shared_cluster.processes("expert_group"):
        assert cores_of_threads(group["pid"]) == set(group["cores"])
        used += group["cores"]
    assert set(used) <= set(available)
    assert len(set(used)) == min(len(used), len(available)), "a core is shared while another one is free"


def cores_of_threads(pid: int) -> set[int]:
    """Every CPU that any thread of a process may run on."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it ended
            found |= os.sched_getaffinity(int(task.name))
    return found


def test_what_shards_share_is_counted_and_can_be_emptied(shared_cluster: Cluster) -> None:
    prompt = "one two three four five six seven eight nine ten " * 60
    status, _ = shared_cluster.post("/v1/completions", {"model": "moeray-tiny", "prompt": prompt, "max_tokens": 2})
    assert status == 200
    told = cache_stats(shared_cluster)
    assert [each["blocks"] > 0 for each in told["stores"].values()] == [True]
    assert set(told["shards"]) == {process["id"] for process in shared_cluster.processes("attention_shard")}
    assert "blocks" in shared_cluster.moeray("cache", "stats").stdout
    assert "blocks deleted" in shared_cluster.moeray("cache", "flush").stdout
    assert sum(each["blocks"] for each in cache_stats(shared_cluster)["stores"].values()) == 0


def cache_stats(cluster: Cluster) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cluster.moeray("cache", "stats", "--json").stdout)
    return found


def test_crowded_cores_are_told_by_up_and_status(shared_cluster: Cluster) -> None:
    warnings = shared_cluster.status()["warnings"]
    groups = shared_cluster.processes("expert_group")
    compute = [*shared_cluster.processes("attention_shard"), *groups]
    cores = [core for process in compute for core in process["cores"]]
    assert bool(warnings) >= (len(set(cores)) < len(cores))
    for text in warnings:
        assert text in shared_cluster.up_output
        assert f"warning: {text}" in shared_cluster.moeray("status").stdout


def test_golden_prompts_are_answered_exactly(shared_cluster: Cluster, golden: list[dict[str, Any]]) -> None:
    wrong = wrong_answers(shared_cluster, golden)
    assert not wrong, f"{len(wrong)} of {len(golden)} differ, first: {wrong[0]}"


def test_both_shards_and_both_groups_did_the_work(shared_cluster: Cluster, golden: list[dict[str, Any]]) -> None:
    before = [group["experts"]["routed_tokens"] for group in shared_cluster.processes("expert_group")]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(shared_cluster.chat, golden[:8]))
    import time

    time.sleep(1.5)  # counters are published twice a second
    after = [group["experts"]["routed_tokens"] for group in shared_cluster.processes("expert_group")]
    assert all(late > early for early, late in zip(before, after, strict=True))
    assert all(shard["hop"]["calls"] > 0 for shard in shared_cluster.processes("attention_shard"))


def test_chat_streams_the_same_answer_over_grpc_and_http(shared_cluster: Cluster, golden: list[dict[str, Any]]) -> None:
    question, expected = single_question(golden)
    over_grpc = shared_cluster.moeray("chat", question)
    over_http = shared_cluster.moeray("chat", "--http", question)
    assert over_grpc.returncode == 0, over_grpc.stderr
    assert over_grpc.stdout.strip() == over_http.stdout.strip() == expected


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A Python that has the public packages and not ours."""
    folder = tmp_path_factory.mktemp("stranger")
    venv.create(folder, with_pip=False)
    python = [str(folder / "bin" / "python")]
    # The packages of this environment, without the .pth files that make ours importable.
    (
        folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages" / "sitecustomize.py"
    ).write_text(f"import sys\nsys.path.append({sysconfig.get_path('purelib')!r})\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    there = subprocess.run([*python, "-c", "import openai, grpc"], env=env, capture_output=True, text=True, check=False)
    assert there.returncode == 0, there.stderr
    ours = subprocess.run([*python, "-c", "import moeray.config"], env=env, capture_output=True, check=False)
    assert ours.returncode != 0, "our package must not be importable there"
    return python


def test_the_openai_sdk_works_from_an_environment_without_our_package(
    shared_cluster: Cluster, stranger: list[str], golden: list[dict[str, Any]], tmp_path: Path
) -> None:
    question, expected = single_question(golden)
    program = f"""
from openai import OpenAI
client = OpenAI(base_url={shared_cluster.http + "/v1"!r}, api_key="none")
model = client.models.list().data[0].id
ask = dict(model=model, messages=[{{"role": "user", "content": {question!r}}}], temperature=0, max_tokens=64,
           extra_body={{"chat_template_kwargs": {{"thinking": False}}}})
whole = client.chat.completions.create(**ask).choices[0].message.content
chunks = client.chat.completions.create(**ask, stream=True)
pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
assert "".join(pieces) == whole and len(pieces) > 3, pieces
print(whole)
"""
    assert run(stranger, program, tmp_path) == expected


def test_a_generated_grpc_stub_works_from_an_environment_without_our_package(
    shared_cluster: Cluster, stranger: list[str], golden: list[dict[str, Any]], tmp_path: Path
) -> None:
    question, expected = single_question(golden)
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO_ROOT}", f"--python_out={tmp_path}",
         f"--grpc_python_out={tmp_path}", "moeray/v1/inference.proto"], check=True,
    )  # fmt: skip
    program = f"""
import grpc
from moeray.v1 import inference_pb2 as pb, inference_pb2_grpc as rpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
channel = grpc.insecure_channel({shared_cluster.grpc!r})
health = health_pb2_grpc.HealthStub(channel)
for service in ("", "moeray.v1.Inference"):
    answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
ask = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
listed = next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(ask)).list_services_response
assert "moeray.v1.Inference" in [service.name for service in listed.service], listed
stub = rpc.InferenceStub(channel)
model = stub.ListModels(pb.ListModelsRequest(), timeout=10).data[0].id
user = pb.ChatMessage(role="user", content={question!r})
request = pb.ChatRequest(model=model, messages=[user], temperature=0, max_tokens=64)
request.chat_template_kwargs["thinking"] = False
whole = stub.Chat(request, timeout=60).choices[0].message.content
chunks = list(stub.ChatStream(request, timeout=60))
assert "".join(choice.delta.content for chunk in chunks for choice in chunk.choices) == whole and len(chunks) > 3
text = stub.Complete(pb.CompletionRequest(model=model, prompt=["What is"], max_tokens=4, temperature=0), timeout=60)
assert text.usage.completion_tokens == 4, text
print(whole)
"""
    assert run(stranger, program, tmp_path) == expected


def run(python: list[str], program: str, folder: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*python, "-c", program], cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def single_question(golden: list[dict[str, Any]]) -> tuple[str, str]:
    """A golden prompt of one user turn without thinking or tools: (question, answer)."""
    for prompt in golden:
        thinks = prompt.get("chat_template_kwargs", {}).get("thinking", True)
        if len(prompt["messages"]) == 1 and not prompt.get("tools") and not thinks:
            return prompt["messages"][0]["content"], prompt["expected_content"]
    raise AssertionError("golden.json has no plain question")
