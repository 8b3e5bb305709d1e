"""Runs batches: each by one ingress at a time, and from where it stood if that one ended.

Each line becomes a request to this ingress' own application, as if a client had sent it, with a priority below all
clients'. One that is refused for a time, because there is too much work or no shard, is sent again later: that is what
a batch is for. Every other answer is the line's answer. Owners do not wait for each other; the batches of one come one
after the other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from moeray.config import IngressConfig
from moeray.ingress.batches.objects import Batch, Counts, LineError, Status
from moeray.ingress.batches.requests import BatchLine, NotABatch, check, lines_of
from moeray.ingress.batches.store import BatchStore, NotStored

logger = logging.getLogger(__name__)

PRIORITY = 1 << 40
"""Above any that a client may give: lower goes first."""
SCAN_S = 2.0
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 30.0
BUSY = (429, 503)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the application said; retry_after_s is 0 if it did not say."""

    status: int
    body: Any
    retry_after_s: float = 0.0


Ask = Callable[[str, dict[str, Any], str], Awaitable[Answer]]
"""`ask(url, body, owner)`: one request to the application, as that tenant's."""


class BatchRunner:
    """Of one ingress; `run` until it is cancelled."""

    def __init__(self, store: BatchStore, ask: Ask, limits: IngressConfig) -> None:
        self._store, self._ask, self._limits = store, ask, limits
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """There is a new batch."""
        self._wake.set()

    async def run(self) -> None:
        """Look for batches that nobody runs, the oldest of each owner first."""
        running: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                try:
                    for owner, ids in (await asyncio.to_thread(self._waiting)).items():
                        if owner not in running or running[owner].done():
                            running[owner] = asyncio.create_task(self._run_in_turn(ids), name=f"batches of {owner}")
                    await asyncio.to_thread(self._store.remove_expired, time.time() - self._limits.batches.keep_s)
                except Exception:  # whatever it was: without this loop no batch runs
                    logger.exception("batches: %s", self._limits.batches.directory)
                self._wake.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), SCAN_S)
        finally:
            for task in running.values():
                task.cancel()
            await asyncio.gather(*running.values(), return_exceptions=True)

    def _waiting(self) -> dict[str, list[str]]:
        """Ids of the batches that have not ended, by owner, the oldest first."""
        found: dict[str, list[str]] = {}
        for batch in reversed(self._store.batches()):
            if not batch.has_ended:
                found.setdefault(batch.owner, []).append(batch.id)
        return found

    async def _run_in_turn(self, ids: list[str]) -> None:
        for id in ids:
            try:
                await self._run_if_free(id)
            except (OSError, NotStored):
                logger.exception("batch %s: it is tried again if it is still there", id)

    async def _run_if_free(self, id: str) -> None:
        with self._store.claimed(id) as is_mine:
            if not is_mine:
                return
            batch = self._store.batch(id)  # it may have ended since it was listed
            if batch.has_ended:
                return
            run = _Run(self._store, self._ask, self._limits, batch)
            try:
                await run.to_its_end()
            except FileNotFoundError:
                run.fail(LineError(code="file_not_found", message="its input file was deleted"))
            except OSError:
                raise  # a full disk has room again, one day
            except Exception:
                logger.exception("batch %s: it is given up", id)
                run.fail(
                    LineError(code="internal_error", message="this batch could not be run; the log has the reason")
                )


class _Run:
    """One batch in this ingress' hands."""

    def __init__(self, store: BatchStore, ask: Ask, limits: IngressConfig, batch: Batch) -> None:
        self._store, self._ask, self._limits, self._batch = store, ask, limits, batch
        self._completed = self._failed = 0

    async def to_its_end(self) -> None:
        batch = self._batch
        if batch.status == "validating" and not await self._starts():
            return
        done = await asyncio.to_thread(self._answered_before)
        if batch.status != "cancelling":
            await self._work_until_told(done)
        await asyncio.to_thread(self._finish)

    def fail(self, error: LineError) -> None:
        """It can never be run. What was answered until then is kept in the folder, and not handed out."""
        self._put(self._batch.to("failed", time.time(), errors=(error,)))

    async def _work_until_told(self, done: set[str]) -> None:
        """Until every line that is not done has its answer, the batch is cancelled, or its time is over."""
        batch = self._batch
        input_file = self._store.content(batch.input_file_id)
        logger.info("batch %s: %d of %d answered", batch.id, len(done), self._batch.request_counts.total)
        with self._part("output") as output, self._part("errors") as errors:
            left = (line for line in lines_of(input_file) if line.custom_id not in done)
            working = [
                asyncio.create_task(self._work(left, output, errors)) for _ in range(self._limits.batches.concurrency)
            ]
            watching = asyncio.create_task(self._watch())
            try:
                waiting: set[asyncio.Task[None]] = {watching, *working}
                while waiting > {watching}:
                    done_now, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for task in done_now:
                        task.result()
                    if watching in done_now:
                        return
            finally:
                for task in (*working, watching):
                    task.cancel()
                await asyncio.gather(*working, watching, return_exceptions=True)

    async def _starts(self) -> bool:
        """Check the input; whether there is anything to do."""
        batch = self._batch
        try:
            path = self._store.content(batch.input_file_id)
            limits = self._limits
            total = await asyncio.to_thread(
                check, path, batch.endpoint, limits.batches.max_requests, limits.max_body_bytes
            )
        except NotABatch as error:
            self._put(batch.to("failed", time.time(), errors=error.errors))
            return False
        self._put(batch.to("in_progress", time.time(), request_counts=Counts(total=total)))
        return True

    async def _work(self, left: Iterator[BatchLine], output: BinaryIO, errors: BinaryIO) -> None:
        for line in left:
            answer = await self._answer(line)
            is_good = answer.status == 200
            self._completed += is_good
            self._failed += not is_good
            _append(output if is_good else errors, line.custom_id, answer)

    async def _answer(self, line: BatchLine) -> Answer:
        wait_s = FIRST_RETRY_S
        body = {**line.body, "priority": PRIORITY}
        while True:
            answer = await self._ask(line.url, body, self._batch.owner)
            if answer.status not in BUSY or (answer.status == 429 and not answer.retry_after_s):
                return answer  # a quota that no waiting fills again, such as a month's, says no time
            await asyncio.sleep(max(wait_s, answer.retry_after_s))
            wait_s = min(2 * wait_s, LAST_RETRY_S)

    async def _watch(self) -> None:
        """Tell how far it is; returns when it is to end early."""
        while True:
            await asyncio.sleep(SCAN_S / 2)
            self._put(msgspec.structs.replace(self._batch, request_counts=self._counts()))
            if self._store.batch(self._batch.id).status == "cancelling" or time.time() > self._batch.expires_at:
                return

    def _answered_before(self) -> set[str]:
        """Ids that have an answer; a line that was not written whole has none and is cut off."""
        done: set[str] = set()
        for kind in ("output", "errors"):
            ids, good_bytes = _ids_in(self._store.part(self._batch.id, kind))
            done |= ids
            if good_bytes is not None:
                os.truncate(self._store.part(self._batch.id, kind), good_bytes)
            if kind == "output":
                self._completed = len(ids)
            else:
                self._failed = len(ids)
        return done

    def _finish(self) -> None:
        batch = self._put(self._store.batch(self._batch.id).to("finalizing", time.time()))
        was_cancelled = batch.cancelling_at is not None
        counts = self._counts()
        files = {
            "output_file_id": self._file_of("output", counts.completed),
            "error_file_id": self._file_of("errors", counts.failed),
        }
        is_whole = counts.completed + counts.failed == counts.total
        status: Status = "cancelled" if was_cancelled else "completed" if is_whole else "expired"
        self._put(batch.to(status, time.time(), request_counts=counts, **files))
        logger.info("batch %s %s: %d answered, %d failed", batch.id, status, counts.completed, counts.failed)

    def _file_of(self, kind: str, num_lines: int) -> str | None:
        if not num_lines:
            return None
        batch = self._batch
        with self._store.part(batch.id, kind).open("rb") as content:
            name = f"{batch.id}_{kind}.jsonl"
            return self._store.add_file(content, filename=name, purpose="batch_output", owner=batch.owner).id

    def _counts(self) -> Counts:
        total = self._batch.request_counts.total
        return Counts(total=total, completed=self._completed, failed=self._failed)

    def _part(self, kind: str) -> BinaryIO:
        return self._store.part(self._batch.id, kind).open("ab", buffering=0)

    def _put(self, batch: Batch) -> Batch:
        self._batch = self._store.put(batch)
        return batch


def _append(part: BinaryIO, custom_id: str, answer: Answer) -> None:
    """In one write, so that a process that dies leaves at most its last line in pieces."""
    line = {
        "id": f"batch_req_{secrets.token_hex(8)}",
        "custom_id": custom_id,
        "response": {"status_code": answer.status, "request_id": _id_in(answer.body), "body": answer.body},
        "error": None,
    }
    part.write(msgspec.json.encode(line) + b"\n")


def _id_in(body: Any) -> str:
    return str(body.get("id", "")) if isinstance(body, dict) else ""


def _ids_in(path: Path) -> tuple[set[str], int | None]:
    """(custom ids, bytes of whole lines) of a part; (no ids, None) where there is none."""
    ids: set[str] = set()
    good_bytes = 0
    try:
        with path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                ids.add(msgspec.json.decode(line)["custom_id"])
                good_bytes += len(line)
    except FileNotFoundError:
        return ids, None
    return ids, good_bytes
