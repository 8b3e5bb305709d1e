"""The load comes when it says, clients see what a server did, and a server that stalls cannot look good."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import pytest

from moeray.loadtest.arrivals import Lengths, LoadError, Planned, closed, from_trace, open_loop
from moeray.loadtest.drive import drive
from moeray.loadtest.outcome import Goals, Outcome, spread, summary
from moeray.loadtest.prompts import Prompts
from moeray.loadtest.report import html, text
from moeray.loadtest.targets import HttpTarget, model_of

Handle = Callable[[asyncio.StreamWriter, int], Awaitable[None]]


@contextlib.asynccontextmanager
async def server(handle: Handle) -> AsyncIterator[str]:
    """Its URL; `handle(writer, number)` answers each request on a connection of its own."""
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-l")), 0
        )
        await reader.readexactly(length)
        count += 1
        with contextlib.suppress(ConnectionError):
            await handle(writer, count - 1)
            await writer.drain()
        writer.close()

    running = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{running.sockets[0].getsockname()[1]}"
    finally:
        running.close()


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


def event(text: str, **more: object) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}], **more}).encode() + b"\n\n"


def streaming(first_s: float, later_s: float, tokens: int) -> Handle:
    async def handle(writer: asyncio.StreamWriter, _: int) -> None:
        writer.write(HEAD)
        await asyncio.sleep(first_s)
        for number in range(tokens):
            if number:
                await asyncio.sleep(later_s)
            writer.write(event(f"{number} "))
            await writer.drain()
        usage = {"completion_tokens": tokens, "prompt_tokens": 7}
        writer.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")

    return handle


async def run(handle: Handle, planned: list[Planned], users: int = 0, timeout_s: float = 30.0) -> list[Outcome]:
    async with server(handle) as url:
        target = HttpTarget(url, "m", timeout_s=timeout_s)
        try:
            return await drive(target, planned, lambda each: "x", users, lambda *_: None)
        finally:
            await target.close()


def at(*moments: float | None) -> list[Planned]:
    return [Planned(number, due_s, 4, 5) for number, due_s in enumerate(moments)]


async def test_times_are_those_of_the_server() -> None:
    outcomes = await run(streaming(0.2, 0.05, 5), at(0.0, 0.1, 0.2))
    found = summary(outcomes, Goals())
    assert (found["completed"], found["errors"], found["answer_tokens"], found["prompt_tokens"]) == (3, {}, 15, 21)
    assert 200 <= found["ttft_ms"]["p50"] < 600 and 50 <= found["tpot_ms"]["p50"] < 200
    assert 400 <= found["e2e_ms"]["p50"] < 1500 and found["itl_ms"]["p50"] >= 45
    assert outcomes[0].text == "0 1 2 3 4 "


async def test_a_server_that_stalls_is_late_by_when_requests_were_due() -> None:
    """One user at a time, ten requests due within a second, and a server that takes 0.3 s for each."""
    outcomes = await run(streaming(0.3, 0.0, 1), at(*(0.05 * number for number in range(10))), users=1)
    found = summary(outcomes, Goals(ttft_s=0.6))
    assert found["ttft_ms"]["p95"] < 1000, "each by itself was quick"
    assert found["ttft_from_due_ms"]["p95"] > 2000, "but the last came seconds after it was due"
    assert found["goodput_per_s"] < found["requests_per_s"] / 2


async def test_whatever_a_server_does_is_counted_by_its_kind_and_ends_nothing() -> None:
    async def handle(writer: asyncio.StreamWriter, number: int) -> None:
        if number == 0:
            writer.write(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\nconnection: close\r\n\r\nbusy")
        elif number == 1:
            writer.write(HEAD + event("half"))
        elif number == 2:
            writer.write(HEAD + b"data: {not json\n\n")
        elif number == 3:
            writer.write(HEAD + b'data: {"error": {"message": "overloaded"}}\n\n')
        elif number == 4:
            await asyncio.sleep(5)
        elif number == 5:
            writer.write(HEAD + b"data: [DONE]\n\n")
        else:
            await streaming(0.0, 0.0, 2)(writer, number)

    outcomes = await run(handle, at(*(0.2 * number for number in range(7))), timeout_s=2.0)
    kinds = [each.error for each in outcomes]
    assert kinds == ["HTTP 429", "cut stream", "not JSON", "error in the stream", "timeout", "no token", ""]
    assert summary(outcomes, Goals())["completed"] == 1 and "busy" in outcomes[0].detail


async def test_nobody_there_is_an_error_of_each_request() -> None:
    target = HttpTarget("http://127.0.0.1:9", "m")
    outcomes = await drive(target, at(0.0, None), lambda each: "x", 0, lambda *_: None)
    await target.close()
    assert [each.error for each in outcomes] == ["no connection"] * 2
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9"):
        await model_of("http://127.0.0.1:9", None, None)


async def test_in_a_closed_loop_there_are_never_more_than_its_users() -> None:
    running = most = 0

    async def handle(writer: asyncio.StreamWriter, number: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await streaming(0.05, 0.0, 1)(writer, number)
        running -= 1

    outcomes = await run(handle, list(closed(12, Lengths(4, 4), seed=1)), users=3)
    assert most == 3 and len(outcomes) == 12


def test_open_loop_gaps_have_the_wanted_mean_and_burstiness() -> None:
    for burstiness, variation in ((1.0, 1.0), (4.0, 0.5), (0.25, 2.0)):
        due = [each.due_s or 0.0 for each in open_loop(20_000, 50.0, burstiness, Lengths(8, 8), seed=3)]
        gaps = [after - before for before, after in pairwise(due)]
        assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
        assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(variation, rel=0.07)


def test_the_same_seed_is_the_same_load() -> None:
    first, again = (list(open_loop(50, 5.0, 1.0, Lengths(100, 20, 0.5, 10), seed=4)) for _ in range(2))
    assert first == again and all(50 <= each.prompt_tokens <= 150 for each in first)
    prompts = [Prompts(4, shared=10).text(number, 60, 10) for number in (1, 2)]
    assert prompts[0].split()[:10] == prompts[1].split()[:10] and prompts[0] != prompts[1]
    assert len(prompts[0].split()) == 60


@pytest.mark.parametrize("line", ["{}", "nonsense", '{"at_s": -1, "prompt_tokens": 1, "answer_tokens": 1}'])
def test_a_wrong_trace_is_refused_by_its_line(line: str, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"at_s": 0.5, "prompt_tokens": 9, "answer_tokens": 3}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(LoadError, match="line 2"):
        from_trace(file)


def test_a_trace_is_played_as_fast_as_asked(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(
        '{"at_s": 0, "prompt_tokens": 9, "answer_tokens": 3}\n{"at_s": 4, "prompt_tokens": 2, "answer_tokens": 1}\n'
    )
    assert from_trace(file, speed=2.0)[1] == Planned(1, 2.0, 2, 1)
    with pytest.raises(LoadError, match="cannot be read"):
        from_trace(tmp_path / "none")


def test_percentiles_are_of_what_there_was() -> None:
    assert spread([]) == {"mean": None, "p50": None, "p95": None, "p99": None}
    found = spread([*map(float, range(1, 101)), math.nan])
    assert found == {"mean": 50.5, "p50": 50.0, "p95": 95.0, "p99": 99.0}


def test_a_comparison_is_printed_as_ratios_and_kept_as_a_page() -> None:
    outcomes = [Outcome(number, 0.0, 0.0, 0.1, 0.5, 4, 5) for number in range(3)]
    slow = [Outcome(number, 0.0, 0.0, 0.2, 1.0, 4, 5) for number in range(3)]
    ours, theirs = (summary(each, Goals()) for each in (outcomes, slow))
    said = text([("a", ours), ("b", theirs)])
    assert "b over a" in said and "mean 2.000" in said
    page = html([("<a>", ours, [(0.1, 100.0)]), ("b", theirs, [(0.2, 200.0)])], "run")
    assert "<script" not in page and "&lt;a&gt;" in page and page.count("<circle") == 2
