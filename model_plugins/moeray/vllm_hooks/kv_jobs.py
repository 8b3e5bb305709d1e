"""What a request may fetch, one fetch on its way, and what was done in all."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field


@dataclass(slots=True)
class Plan:
    """What one request may fetch: names per store. Kept in the request's ReqContext.

    Attributes:
        deadline: monotonic; fetches that have not ended by then are given up, and the tokens computed.
    """

    names: dict[str, set[bytes]]
    deadline: float


@dataclass(slots=True)
class Load:
    """One fetch. `lock` is held while bytes are put into the region: never after the job was given up."""

    job_id: int
    names: list[bytes]
    rows: list[int]
    deadline: float
    plan: Plan | None
    started: float
    future: Future[None] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    loaded: list[bytes] = field(default_factory=list)
    given_up: bool = False


@dataclass(slots=True)
class TierCounts:
    """Since the engine began; blocks, bytes and jobs."""

    fetched_blocks: int = 0
    fetched_bytes: int = 0
    missing_blocks: int = 0
    given_up: int = 0
    stored_blocks: int = 0
    dropped_blocks: int = 0
    failures: int = 0
