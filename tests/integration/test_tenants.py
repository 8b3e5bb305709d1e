"""An ingress that serves tenants only: by HTTP and gRPC, over a real engine, to the last token counted."""

from __future__ import annotations

import http.client
import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from front_process import MODEL, Ingress, ShardProcess, chat, until
from google.protobuf.json_format import ParseDict
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from prometheus_client.parser import text_string_to_metric_families
from tenants import Tenants

from moeray.v1 import inference_pb2 as pb
from moeray.v1.inference_pb2_grpc import InferenceStub

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    tenants = Tenants(tmp_path_factory.mktemp("tenants"))
    tenants.create("plain")
    tenants.create("other")
    return tenants


@pytest.fixture(scope="module")
def guarded(model: Path, shared_shard: ShardProcess, tenants: Tenants) -> Iterator[Ingress]:
    ingress = Ingress(model, **tenants.settings)
    ingress.set_shards(shared_shard)
    yield ingress
    ingress.stop()


@pytest.fixture
def known(guarded: Ingress, tenants: Tenants) -> Callable[..., dict[str, str]]:
    """Makes a tenant that the ingress knows when it returns."""

    def create(name: str, **fields: Any) -> dict[str, str]:
        headers = tenants.create(name, **fields)
        until(lambda: guarded.get("/v1/models", headers)[0] == 200)
        return headers

    return create


def ask(ingress: Ingress, headers: dict[str, str], **changes: Any) -> tuple[int, dict[str, Any], dict[str, str]]:
    return ingress.post(CHAT, chat(**({"ignore_eos": True} | changes)), headers=headers)


def over_grpc(ingress: Ingress, headers: dict[str, str], **changes: Any) -> pb.ChatResponse | grpc.RpcError:
    with grpc.insecure_channel(ingress.grpc) as channel:
        request = ParseDict(chat(ignore_eos=True, **changes), pb.ChatRequest())
        try:
            return InferenceStub(channel).Chat(request, timeout=60, metadata=list(headers.items()))
        except grpc.RpcError as error:
            return error


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/metrics"])
def test_nothing_is_served_to_nobody(guarded: Ingress, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer moeray-000000000000-" + 64 * "0"}, {"authorization": "Basic eDp5"}):
        status, body, sent = guarded.post(path, chat(), headers=headers)
        assert (status, body["error"]["code"], sent["www-authenticate"]) == (401, 401, "Bearer")


def test_probes_are_open(guarded: Ingress) -> None:
    assert guarded.get("/health")[0] == guarded.get("/ready")[0] == 200
    with grpc.insecure_channel(guarded.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        serving = health_pb2.HealthCheckResponse.SERVING  # five times a second it is looked at
        until(lambda: stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status == serving)


def test_grpc_serves_nobody_either(guarded: Ingress, tenants: Tenants) -> None:
    refused = over_grpc(guarded, {})
    assert isinstance(refused, grpc.RpcError) and refused.code() is grpc.StatusCode.UNAUTHENTICATED
    with grpc.insecure_channel(guarded.grpc) as channel:
        stub = InferenceStub(channel)
        with pytest.raises(grpc.RpcError) as models:
            stub.ListModels(pb.ListModelsRequest(), timeout=10)
        with pytest.raises(grpc.RpcError) as stream:
            list(stub.ChatStream(ParseDict(chat(), pb.ChatRequest()), timeout=10))
    assert models.value.code() is stream.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert isinstance(over_grpc(guarded, tenants.headers("plain")), pb.ChatResponse)


def test_every_token_is_on_its_tenants_record(guarded: Ingress, tenants: Tenants, known: Any) -> None:
    headers = known("counted")
    status, answered, _ = ask(guarded, headers, n=2, max_tokens=9, temperature=0.9, seed=3)
    assert status == 200, answered
    whole = answered["usage"]
    with _stream(guarded, headers, max_tokens=7, stream_options={"include_usage": True}) as events:
        stream = json.loads([line for line in events if line.startswith(b"data: {")][-1].removeprefix(b"data: "))[
            "usage"
        ]
    answer = over_grpc(guarded, headers, max_tokens=5)
    assert isinstance(answer, pb.ChatResponse)
    completion = {"model": MODEL, "prompt": ["one", "two three"], "max_tokens": 4, "ignore_eos": True}
    both = guarded.post("/v1/completions", completion, headers=headers)[1]["usage"]

    until(lambda: len(tenants.records("counted")) == 4)
    records = tenants.records("counted")
    told = [(each["prompt_tokens"], each["completion_tokens"]) for each in (whole, stream, both)]
    told.insert(2, (answer.usage.prompt_tokens, answer.usage.completion_tokens))
    assert [(each.prompt_tokens, each.completion_tokens) for each in records] == told
    assert [each.completion_tokens for each in records] == [18, 7, 5, 8]
    assert [each.protocol for each in records] == ["http", "http", "grpc", "http"]
    assert {(each.outcome, each.model, each.key_id) for each in records} == {
        ("ok", MODEL, tenants.keys["counted"].split("-")[1])
    }
    assert all(0 < each.queue_s < each.ttft_s <= each.total_s for each in records)


def test_a_client_that_goes_away_pays_for_what_it_got(guarded: Ingress, tenants: Tenants, known: Any) -> None:
    headers = known("leaver")
    with _stream(guarded, headers, max_tokens=600) as answer:
        for _ in range(20):
            answer.readline()
    until(lambda: len(tenants.records("leaver")) == 1)
    record = tenants.records("leaver")[0]
    assert record.outcome == "aborted" and 5 <= record.completion_tokens < 600


def test_one_tenants_cache_is_not_anothers(guarded: Ingress, known: Any, tenants: Tenants) -> None:
    first, second = known("cache-a"), known("cache-b")
    long = chat(messages=[{"role": "user", "content": "Tell me about attention. " * 150}], max_tokens=2)

    def cached(headers: dict[str, str], **changes: Any) -> int:
        usage = guarded.post(CHAT, long | changes, headers=headers)[1]["usage"]
        return int((usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0)

    assert cached(first) == 0
    assert cached(first) > 0
    assert cached(second) == 0, "it was found in another tenant's cache"
    assert cached(second, cache_salt="part") == 0 and cached(second, cache_salt="part") > 0
    completion = {"model": long["model"], "prompt": list(range(20, 320)), "max_tokens": 2}
    salts = ("one", "one", "other")
    asked = [guarded.post("/v1/completions", completion | {"cache_salt": salt}, headers=second)[1] for salt in salts]
    found = [(each["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0 for each in asked]
    assert found[0] == found[2] == 0 < found[1], "a completion's salt counts as well"
    until(lambda: len(tenants.records("cache-b")) == 6)
    assert [each.cached_tokens > 0 for each in tenants.records("cache-b")][:3] == [False, False, True]


def test_limits_refuse_before_the_answer_begins(guarded: Ingress, known: Any) -> None:
    headers = known("limited", requests_per_minute=2)
    status, _, sent = ask(guarded, headers)
    assert (status, sent["x-ratelimit-limit-requests"], sent["x-ratelimit-remaining-requests"]) == (200, "2", "1")
    assert ask(guarded, headers)[0] == 200

    for changes in ({}, {"stream": True}):  # a stream, too, is refused by its status
        status, body, sent = ask(guarded, headers, **changes)
        assert status == 429 and "requests_per_minute" in body["error"]["message"]
        assert 1 <= int(sent["retry-after"]) <= 60 and sent["x-ratelimit-remaining-requests"] == "0"
    refused = over_grpc(guarded, headers)
    assert isinstance(refused, grpc.RpcError) and refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert _detail(refused, error_details_pb2.RetryInfo).retry_delay.seconds >= 1


def test_tokens_are_reserved_and_what_was_not_used_is_given_back(guarded: Ingress, known: Any) -> None:
    headers = known("tokens", tokens_per_minute=700)
    _, body, sent = ask(guarded, headers, max_tokens=600, stop=["e"], ignore_eos=False)
    used = body["usage"]["total_tokens"]
    assert used < 200
    assert int(sent["x-ratelimit-remaining-tokens"]) == 700 - 600 - body["usage"]["prompt_tokens"]
    until(lambda: int(ask(guarded, headers, max_tokens=1)[2]["x-ratelimit-remaining-tokens"]) > 350)
    status, body, sent = ask(guarded, headers, max_tokens=900)
    assert status == 429 and "retry-after" not in sent, "it would be refused for ever"


def test_what_a_tenant_may_never_have_is_forbidden_by_name(guarded: Ingress, known: Any) -> None:
    small, elsewhere = known("small", max_context=40), known("elsewhere", models=["another"])
    status, body, _ = ask(guarded, small, max_tokens=60)
    assert (status, body["error"]["param"]) == (403, "max_tokens")
    status, body, _ = ask(guarded, elsewhere)
    assert (status, body["error"]["param"]) == (403, "model")
    assert guarded.get("/v1/models", elsewhere)[1]["data"] == []
    refused = over_grpc(guarded, elsewhere)
    assert isinstance(refused, grpc.RpcError) and refused.code() is grpc.StatusCode.PERMISSION_DENIED
    assert _detail(refused, error_details_pb2.BadRequest).field_violations[0].field == "model"


def test_one_request_at_a_time(guarded: Ingress, known: Any) -> None:
    headers = known("single", concurrent_requests=1)
    with _stream(guarded, headers, max_tokens=600) as answer:
        answer.readline()
        status, body, _ = ask(guarded, headers)
        assert status == 429 and "concurrent_requests" in body["error"]["message"]
    until(lambda: ask(guarded, headers, max_tokens=1)[0] == 200)


def test_a_revoked_key_is_refused_within_a_second(guarded: Ingress, tenants: Tenants, known: Any) -> None:
    headers = known("revoked")
    tenants.revoke("revoked")
    since = time.monotonic()
    while guarded.get("/v1/models", headers)[0] == 200:
        assert time.monotonic() - since < 1.0
    status, body, _ = ask(guarded, headers)
    assert status == 401 and "revoked" in body["error"]["message"]


def test_a_request_that_the_cluster_failed_costs_nothing(
    guarded: Ingress, shared_shard: ShardProcess, known: Any, tenants: Tenants
) -> None:
    headers = known("unlucky", requests_per_minute=5)
    guarded.call(guarded.server.set_shards({}))
    try:
        guarded.server.hold("a test")
        assert ask(guarded, headers)[0] == 503
    finally:
        guarded.server.hold("")
        guarded.set_shards(shared_shard)
    assert ask(guarded, headers)[2]["x-ratelimit-remaining-requests"] == "4"


def _stream(ingress: Ingress, headers: dict[str, str], **changes: Any) -> http.client.HTTPResponse:
    """The open answer of a streamed chat."""
    body = json.dumps(chat(stream=True, ignore_eos=True, **changes)).encode()
    request = urllib.request.Request(ingress.http + CHAT, body, {"content-type": "application/json", **headers})
    answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=60)
    return answer


def _detail(error: grpc.RpcError, kind: Any) -> Any:
    status = rpc_status.from_call(error)
    assert status is not None
    found = kind()
    assert any(each.Unpack(found) for each in status.details)
    return found


def test_metrics_show_a_tenant_its_own_numbers_and_an_admin_all(
    guarded: Ingress, known: Callable[..., dict[str, str]]
) -> None:
    fields: dict[str, dict[str, Any]] = {
        "m1": {},
        "m2": {},
        "hasty": {"requests_per_minute": 1},
        "watcher": {"is_admin": True},
    }
    who = {name: known(name, **given) for name, given in fields.items()}
    for name in ("m1", "m2"):
        assert ask(guarded, who[name], max_tokens=4)[0] == 200
    assert [ask(guarded, who["hasty"], max_tokens=1)[0] for _ in range(2)] == [200, 429]

    def seen(name: str) -> dict[tuple[str, str], float]:
        request = urllib.request.Request(f"{guarded.http}/metrics", headers=who[name])
        with urllib.request.urlopen(request, timeout=30) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        samples = [each for family in families for each in family.samples if each.labels.get("tenant")]
        answers = [each for each in samples if each.labels.get("kind", "answer") == "answer"]
        return {(each.name, each.labels["tenant"]): each.value for each in answers}

    everybody = seen("watcher")
    assert everybody["moeray_tenant_tokens_total", "m1"] == everybody["moeray_tenant_tokens_total", "m2"] == 4
    assert everybody["moeray_quota_rejections_total", "hasty"] == 1
    assert {tenant for _, tenant in seen("m1")} == {"m1"}
