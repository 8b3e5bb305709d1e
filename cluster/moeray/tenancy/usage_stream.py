"""Usage records in Redis: one bounded stream for all ingresses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from redis import RedisError

if TYPE_CHECKING:
    from redis import Redis

STREAM = "moeray:usage"
MAX_RECORDS = 1_000_000
"""About 300 MB. The oldest go when more come."""
PAGE = 1000
SKEW_S = 3600.0
"""How far the clocks of ingresses and server may differ without a record being missed."""

Page = list[tuple[str, dict[str, str]]]


class UsageStream:
    """A UsageSink. One thread. Durable as far as Redis is (appendonly)."""

    def __init__(self, client: Redis, *, max_records: int = MAX_RECORDS) -> None:
        """`client` decodes its answers."""
        self._redis, self._max_records = client, max_records

    def write(self, lines: list[bytes]) -> None:
        """All lines or none. Raises OSError; if only the answer was lost, another try writes them twice."""
        pipe = self._redis.pipeline(transaction=True)
        for line in lines:
            pipe.xadd(STREAM, {"r": line.rstrip(b"\n")}, maxlen=self._max_records, approximate=True)
        try:
            pipe.execute()
        except RedisError as error:
            raise OSError(f"redis: {error}") from error

    def sync(self) -> None:
        """Nothing to do: the server writes it down."""

    def close(self) -> None:
        self._redis.close()


def read_stream(client: Redis, *, since: float = float("-inf")) -> Iterator[str]:
    """Every record's line from `since` on; some may be older.

    Raises:
        OSError: Redis does not answer.
    """
    next_id = str(max(0, int((since - SKEW_S) * 1000))) if since > 0 else "-"
    try:
        while page := cast(Page, client.xrange(STREAM, min=next_id, count=PAGE)):
            for _, record in page:
                yield str(record["r"])
            next_id = f"({page[-1][0]}"
    except RedisError as error:
        raise OSError(f"redis: {error}") from error
