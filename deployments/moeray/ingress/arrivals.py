"""Requests at the door of one ingress: how many are in hand, whether more are taken, and what clients call theirs."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from http import HTTPStatus

from moeray.ingress.errors import REQUEST_ID

MAX_REQUEST_ID_CHARS = 128
_REQUEST_ID = re.compile(rf"[A-Za-z0-9._:/+=@-]{{1,{MAX_REQUEST_ID_CHARS}}}", re.ASCII)


class Arrivals:
    """Single event loop.

    Attributes:
        is_leaving: the ingress stops: it is not ready any more, and connections that are open end with their answers.
        is_closed: what arrives is refused.
        num_in_hand: requests that arrived and are not answered to their end.
    """

    def __init__(self) -> None:
        self.is_leaving = self.is_closed = False
        self.num_in_hand = 0
        self._none_in_hand = asyncio.Event()
        self._none_in_hand.set()

    def leave(self) -> None:
        self.is_leaving = True

    def close(self) -> None:
        self.is_leaving = self.is_closed = True

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
