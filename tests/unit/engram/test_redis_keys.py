"""`engram` of cluster.yaml: rows in Redis need a URL, nothing else takes one, and no secret is in it."""

from __future__ import annotations

from typing import Any

import pytest

from moeray.config import ConfigError, parse_config

URL = "redis://127.0.0.1:6379/0"


def test_rows_in_redis_are_asked_for_with_a_url() -> None:
    config = parse_config({"engram": {"placement": "redis", "redis_url": URL, "redis_hot_bytes": 1000}})
    assert (config.engram.placement, config.engram.redis_url, config.engram.redis_hot_bytes) == ("redis", URL, 1000)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"placement": "redis"}, "`redis` needs a URL"),
        ({"redis_url": URL}, "no other placement takes one"),
        ({"placement": "redis", "redis_url": "http://127.0.0.1"}, "write one of redis, rediss"),
        ({"placement": "redis", "redis_url": "redis://:secret@127.0.0.1"}, "no user or password"),
        ({"placement": "redis", "redis_url": URL, "redis_hot_bytes": 0}, "redis_hot_bytes"),
        ({"placement": "sharded"}, "placement"),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_config({"engram": keys})
