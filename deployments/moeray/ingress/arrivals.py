"""Requests at the door of one ingress: how many are in hand, whether more are taken, and what clients call theirs."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus

from moeray.ingress.errors import REQUEST_ID
from moeray.telemetry import RequestMetrics

MAX_REQUEST_ID_CHARS = 128
_REQUEST_ID = re.compile(rf"[A-Za-z0-9._:/+=@-]{{1,{MAX_REQUEST_ID_CHARS}}}", re.ASCII)


@dataclass(slots=True)
class Arrival:
    """One request at the door.

    Attributes:
        endpoint: a path or method, of few.
        code: of the answer; HTTP's number or gRPC's name.
        tenant: whose it is; empty while nobody showed who he is.
    """

    protocol: str
    endpoint: str
    code: str
    tenant: str = ""


_ARRIVAL: ContextVar[Arrival | None] = ContextVar("the request at the door that this task handles", default=None)


def came_from(tenant: str) -> None:
    """The request that this task handles is this tenant's."""
    if (arrival := _ARRIVAL.get()) is not None:
        arrival.tenant = tenant


class Arrivals:
    """Single event loop.

    Args:
        metrics: told of every request at its end.

    Attributes:
        is_leaving: the ingress stops: it is not ready any more, and connections that are open end with their answers.
        is_closed: what arrives is refused.
        num_in_hand: requests that arrived and are not answered to their end.
    """

    def __init__(self, metrics: RequestMetrics | None = None) -> None:
        self._metrics = metrics or RequestMetrics()
        self.is_leaving = self.is_closed = False
        self.num_in_hand = 0
        self._none_in_hand = asyncio.Event()
        self._none_in_hand.set()

    def leave(self) -> None:
        self.is_leaving = True

    def close(self) -> None:
        self.is_leaving = self.is_closed = True

    @contextlib.contextmanager
    def counted(self, arrival: Arrival) -> Iterator[None]:
        """This task handles the request inside the block; what is known of it at the end is counted."""
        begun = time.monotonic()
        _ARRIVAL.set(arrival)
        try:
            yield
        finally:
            _ARRIVAL.set(None)  # not a token's reset: an abandoned stream is closed by another task than it began in
            self._metrics.ended(
                tenant=arrival.tenant, protocol=arrival.protocol, endpoint=arrival.endpoint, code=arrival.code,
                seconds=time.monotonic() - begun,
            )  # fmt: skip

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """A request is in hand inside the block.

        Raises:
            ShardUnavailable: none is taken any more.
        """
        if self.is_closed:
            from moeray.vllm_hooks.engine_core import ShardUnavailable

            raise ShardUnavailable("this ingress is stopping; ask again on a new connection")
        self.num_in_hand += 1
        self._none_in_hand.clear()
        try:
            yield
        finally:
            self.num_in_hand -= 1
            if not self.num_in_hand:
                self._none_in_hand.set()

    async def all_answered(self, timeout_s: float) -> bool:
        """Wait until nothing is in hand; False if that takes longer."""
        try:
            await asyncio.wait_for(self._none_in_hand.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


def checked_request_id(value: str) -> str:
    """What a client calls its request; it is part of the answer's id and of log lines.

    Raises:
        Refused: 400, it is too long or has characters that are not allowed.
    """
    if _REQUEST_ID.fullmatch(value) is None:
        from moeray.vllm_hooks.admission import Refused

        raise Refused(
            f"{REQUEST_ID}: 1 to {MAX_REQUEST_ID_CHARS} of A-Z a-z 0-9 . _ : / + = @ -",
            HTTPStatus.BAD_REQUEST,
            parameter=REQUEST_ID,
        )
    return value
