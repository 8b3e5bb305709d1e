"""OpenAI's own client against the batch API; the application behind it is a few lines that answer, refuse or wait."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from openai.types import Batch
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from moeray.config import BatchConfig, IngressConfig
from moeray.ingress.batches import api as api_module
from moeray.ingress.batches import runner as runner_module
from moeray.ingress.batches.api import OWNER, asks, batch_routes
from moeray.ingress.batches.runner import PRIORITY, BatchRunner
from moeray.ingress.batches.store import BatchStore

ENDPOINT = "/v1/chat/completions"
LIMITS = IngressConfig(
    max_body_bytes=50_000,
    batches=BatchConfig(
        directory="unused", max_file_bytes=100_000, max_stored_bytes=300_000, max_requests=50, concurrency=4
    ),
)


class Application:
    """Answers a chat with its own words; its behaviour is in the words.

    Attributes:
        asked: bodies, in the order in which they came; owners: whose they were.
        is_open: while it is not set, "wait" is not answered.
    """

    def __init__(self, store: BatchStore, limits: IngressConfig) -> None:
        self.asked: list[dict[str, Any]] = []
        self.owners: set[str] = set()
        self.is_open = asyncio.Event()
        self.app = FastAPI()
        init_exception_handler(self.app)
        self.app.state.args = Namespace(log_error_stack=False)
        self.app.post(ENDPOINT)(self.chat)
        self.runner = BatchRunner(store, asks(self.app), limits)
        self.app.include_router(batch_routes(store, limits.batches, self.runner.wake))

    async def chat(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.asked.append(body)
        self.owners.add(getattr(request.state, OWNER))
        words = body["messages"][0]["content"]
        if words == "busy" and sum(each == body for each in self.asked) == 1:
            return JSONResponse({"error": {"message": "later"}}, 429, {"Retry-After": "1"})
        if words == "spent":
            return JSONResponse({"error": {"message": "next month"}}, 429)
        if words == "bad":
            return JSONResponse({"error": {"message": "bad", "param": "messages"}}, 400)
        if words == "wait":
            await self.is_open.wait()
        return JSONResponse({"id": f"chat-{len(self.asked)}", "words": words})

    def client(self, tenant: str = "") -> openai.AsyncOpenAI:
        async def as_tenant(scope: Any, receive: Any, send: Any) -> None:
            await self.app({**scope, "state": {OWNER: tenant}}, receive, send)

        http = httpx.AsyncClient(transport=httpx.ASGITransport(as_tenant), trust_env=False)
        return openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=http, max_retries=0)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "SCAN_S", 0.1)
    monkeypatch.setattr(runner_module, "FIRST_RETRY_S", 0.01)


@pytest.fixture
def store(tmp_path: Path) -> BatchStore:
    return BatchStore(tmp_path)


@pytest.fixture
async def application(store: BatchStore) -> AsyncIterator[Application]:
    running = Application(store, LIMITS)
    task = asyncio.create_task(running.runner.run())
    yield running
    task.cancel()


def requests(*words: str, **changes: Any) -> bytes:
    lines = [
        {"custom_id": f"r{number}", "method": "POST", "url": ENDPOINT, "body": {"messages": [{"content": each}]}}
        for number, each in enumerate(words)
    ]
    return b"".join(json.dumps({**line, **changes}).encode() + b"\n" for line in lines)


async def started(client: openai.AsyncOpenAI, content: bytes) -> Batch:
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    return await client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")


async def until(client: openai.AsyncOpenAI, id: str, *statuses: str) -> Batch:
    async with asyncio.timeout(60):
        while (batch := await client.batches.retrieve(id)).status not in statuses:
            await asyncio.sleep(0.02)
    return batch


async def lines(client: openai.AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    text = (await client.files.content(file_id)).text
    return {line["custom_id"]: line for line in map(json.loads, text.splitlines())}


async def test_every_request_gets_its_answer_at_the_lowest_priority(application: Application) -> None:
    client = application.client("team-a")
    batch = await started(client, requests(*(f"words {n}" for n in range(20))))
    batch = await until(client, batch.id, "completed")
    answers = await lines(client, batch.output_file_id)
    assert {id: line["response"]["body"]["words"] for id, line in answers.items()} == {
        f"r{n}": f"words {n}" for n in range(20)
    }
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.error_file_id) == (20, 20, None)
    assert {body["priority"] for body in application.asked} == {PRIORITY}
    assert application.owners == {"team-a"}


async def test_what_no_waiting_mends_is_the_lines_answer(application: Application) -> None:
    client = application.client()
    batch = await until(client, (await started(client, requests("a", "spent"))).id, "completed")
    errors = await lines(client, batch.error_file_id)
    assert errors["r1"]["response"]["status_code"] == 429


async def test_a_tenant_that_must_wait_keeps_no_other_waiting(application: Application) -> None:
    waiting, other = application.client("team-a"), application.client("team-b")
    first = await started(waiting, requests("wait"))
    await until(waiting, first.id, "in_progress")
    await until(other, (await started(other, requests("b"))).id, "completed")
    application.is_open.set()
    await until(waiting, first.id, "completed")


async def test_a_file_that_was_deleted_before_its_turn_ends_its_own_batch_alone(
    application: Application, store: BatchStore
) -> None:
    client = application.client()
    first = await started(client, requests("wait"))
    await until(client, first.id, "in_progress")
    second, third = await started(client, requests("b")), await started(client, requests("c"))
    await client.files.delete(second.input_file_id)
    application.is_open.set()
    failed = await until(client, second.id, "failed")
    assert failed.errors is not None and failed.errors.data is not None
    assert failed.errors.data[0].code == "file_not_found" and str(store.content("")) not in str(failed.errors)
    await until(client, third.id, "completed")


async def test_a_batch_that_cannot_be_run_for_an_unknown_reason_keeps_no_other_from_running(
    application: Application, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = application.client()
    original = runner_module.check

    def fails_at(path: Path, *arguments: Any) -> int:
        if b"poison" in path.read_bytes():
            raise ZeroDivisionError("a bug")
        return original(path, *arguments)

    monkeypatch.setattr(runner_module, "check", fails_at)
    poison, good = await started(client, requests("poison")), await started(client, requests("a"))
    failed = await until(client, poison.id, "failed")
    assert failed.errors is not None and failed.errors.data is not None
    assert failed.errors.data[0].code == "internal_error" and "a bug" in caplog.text
    await until(client, good.id, "completed")


async def test_a_line_cannot_raise_its_own_priority(application: Application) -> None:
    client = application.client()
    content = requests("a", body={"messages": [{"content": "a"}], "priority": -5})
    await until(client, (await started(client, content)).id, "completed")
    assert [body["priority"] for body in application.asked] == [PRIORITY]


async def test_what_a_tenant_stores_is_bounded_and_deleting_makes_room(application: Application) -> None:
    client, other = application.client("team-a"), application.client("team-b")
    files = [await client.files.create(file=("in.jsonl", b"x" * 100_000), purpose="batch") for _ in range(3)]
    with pytest.raises(openai.BadRequestError, match="max_stored_bytes"):
        await client.files.create(file=("in.jsonl", b"x"), purpose="batch")
    await other.files.create(file=("in.jsonl", b"x" * 100_000), purpose="batch")
    await client.files.delete(files[0].id)
    await client.files.create(file=("in.jsonl", b"x" * 100_000), purpose="batch")


async def test_a_refused_line_is_an_error_of_its_own_and_a_busy_one_is_sent_again(application: Application) -> None:
    client = application.client()
    batch = await until(client, (await started(client, requests("a", "bad", "busy"))).id, "completed")
    assert set(await lines(client, batch.output_file_id)) == {"r0", "r2"}
    errors = await lines(client, batch.error_file_id)
    assert errors["r1"]["response"]["status_code"] == 400
    assert errors["r1"]["response"]["body"]["error"]["param"] == "messages"
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)


@pytest.mark.parametrize(
    ("content", "code", "line"),
    [
        (b"", "empty_file", None),
        (requests("a") + b"{", "invalid_json_line", 2),
        pytest.param(requests("a") + requests("b" * 50_000), "request_too_large", 2, id="large"),
        pytest.param(requests("a") + b'{"body":{"a":' + 40_000 * b"[", "invalid_json_line", 2, id="deep"),
        (requests("a", method="GET"), "invalid_method", 1),
        (requests("a", url="/v1/completions"), "mismatched_endpoint", 1),
        (requests("a", "b", custom_id="same"), "duplicate_custom_id", 2),
        (requests("a", body={"stream": True}), "invalid_request", 1),
        (requests(*["a"] * 51), "too_many_requests", 51),
    ],
)
async def test_a_file_that_is_no_batch_fails_with_the_line_and_runs_nothing(
    application: Application, content: bytes, code: str, line: int | None
) -> None:
    client = application.client()
    batch = await until(client, (await started(client, content)).id, "failed")
    assert batch.errors is not None and batch.errors.data is not None
    assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, line)
    assert application.asked == []


async def test_a_cancelled_batch_keeps_what_was_answered(application: Application) -> None:
    client = application.client()
    batch = await started(client, requests("a", "b", *["wait"] * 6))
    async with asyncio.timeout(60):
        while len(application.asked) < 6:
            await asyncio.sleep(0.02)
    assert (await client.batches.cancel(batch.id)).status == "cancelling"
    batch = await until(client, batch.id, "cancelled")
    assert set(await lines(client, batch.output_file_id)) == {"r0", "r1"}
    with pytest.raises(openai.BadRequestError, match="ended already"):
        await client.batches.cancel(batch.id)


async def test_another_ingress_goes_on_where_the_first_one_ended(store: BatchStore) -> None:
    first, second = Application(store, LIMITS), Application(store, LIMITS)
    running = asyncio.create_task(first.runner.run())
    batch = await started(first.client(), requests("a", "b", *["wait"] * 6))
    async with asyncio.timeout(60):
        while len(first.asked) < 6:
            await asyncio.sleep(0.02)
    also = asyncio.create_task(second.runner.run())
    await asyncio.sleep(0.5)
    assert second.asked == []  # only one runs a batch
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    with store.part(batch.id, "output").open("ab") as output:
        output.write(b'{"custom_id": "r7", "resp')  # its last line, in pieces
    second.is_open.set()
    batch = await until(second.client(), batch.id, "completed")
    assert len(second.asked) == 6
    assert set(await lines(second.client(), batch.output_file_id)) == {f"r{n}" for n in range(8)}
    also.cancel()


def test_a_batch_is_free_again_when_the_process_that_ran_it_was_killed(store: BatchStore, tmp_path: Path) -> None:
    holding = (
        "import sys, time; from pathlib import Path; from moeray.ingress.batches.store import BatchStore\n"
        "with BatchStore(Path(sys.argv[1])).claimed('batch-1') as mine: print(mine, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", holding, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"True\n"
        with store.claimed("batch-1") as is_mine:
            assert not is_mine
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with store.claimed("batch-1") as is_mine:
        assert is_mine


async def test_a_batch_that_is_not_done_in_its_time_expires_with_what_it_has(
    application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_module, "WINDOW_S", 1)
    client = application.client()
    batch = await until(client, (await started(client, requests("a", "wait"))).id, "expired")
    assert set(await lines(client, batch.output_file_id)) == {"r0"}


async def test_files_and_batches_are_their_owners_alone(application: Application) -> None:
    mine, other = application.client("team-a"), application.client("team-b")
    batch = await until(mine, (await started(mine, requests("a"))).id, "completed")
    assert [each.id async for each in other.batches.list()] == []
    assert [each.id async for each in other.files.list()] == []
    assert batch.output_file_id is not None
    for asking in (
        other.batches.retrieve(batch.id),
        other.batches.cancel(batch.id),
        other.files.content(batch.output_file_id),
        other.files.delete(batch.input_file_id),
        other.batches.create(input_file_id=batch.input_file_id, endpoint=ENDPOINT, completion_window="24h"),
        mine.files.retrieve("../batches/x"),
    ):
        with pytest.raises(openai.NotFoundError):
            await asking


async def test_bad_input_is_named(application: Application) -> None:
    client = application.client()
    file = await client.files.create(file=("in.jsonl", requests("a")), purpose="batch")
    bad_endpoint: Any = "/v1/embeddings"
    for asking, param in (
        (client.files.create(file=("in.jsonl", b"x"), purpose="vision"), "purpose"),
        (client.files.create(file=("in.jsonl", b"x" * 100_001), purpose="batch"), "file"),
        (client.batches.create(input_file_id=file.id, endpoint=bad_endpoint, completion_window="24h"), "endpoint"),
        (client.batches.list(limit=1000)._get_page(), "limit"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await asking
        assert caught.value.param == param
    assert [each.id async for each in client.files.list()] == [file.id]


async def test_lists_go_page_by_page(application: Application) -> None:
    client = application.client()
    ids = [(await started(client, requests("a"))).id for _ in range(5)]
    assert {each.id async for each in client.batches.list(limit=2)} == set(ids)


def test_what_is_old_is_deleted(store: BatchStore, tmp_path: Path) -> None:
    with (tmp_path / "in").open("wb+") as content:
        kept = store.add_file(content, filename="in", purpose="batch", owner="")
    store.remove_expired(time.time() - 60)
    assert store.files("") == [kept]
    store.remove_expired(time.time() + 60)
    assert store.files("") == []
    assert not store.content(kept.id).exists()
