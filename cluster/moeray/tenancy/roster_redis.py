"""Tenants in Redis: a hash of JSON by name, and a version that every change counts up. All keys are in one slot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from redis import RedisError, WatchError

from moeray.tenancy.errors import RegistryUnavailable, RosterError
from moeray.tenancy.roster import Roster, parse_roster, tenant_to_data

if TYPE_CHECKING:
    from redis import Redis

TENANTS = "moeray:{roster}:tenants"
VERSION = "moeray:{roster}:version"
MAX_TRIES = 100
"""Of a change, while others change too."""


class RosterRedis:
    """See module docstring. Calls block, for the client's timeout at the most; one thread at a time."""

    def __init__(self, client: Redis) -> None:
        """`client` decodes its answers."""
        self._redis = client
        self._seen: str | None = None

    def read(self) -> Roster:
        """All tenants now.

        Raises:
            RegistryUnavailable: Redis does not answer.
            RosterError: what it keeps is wrong.
        """
        try:
            version = self._redis.get(VERSION)  # before the tenants: what changes in between is read again
            entries = self._redis.hgetall(TENANTS)
        except (RedisError, OSError) as error:
            raise RegistryUnavailable(f"redis: {error}") from error
        self._seen = _text(version)
        return _parse(entries)

    def read_if_changed(self) -> Roster | None:
        """As `read`; None if the version is the one that was read last."""
        try:
            version = _text(self._redis.get(VERSION))
        except (RedisError, OSError) as error:
            raise RegistryUnavailable(f"redis: {error}") from error
        return None if version == self._seen else self.read()

    def edit(self, change: Callable[[Roster], Roster]) -> None:
        """Write what changes; `change` is called again if others wrote meanwhile.

        Raises:
            RegistryUnavailable: Redis does not answer.
            RosterError: what it keeps is wrong; it is left as it is.
        """
        try:
            for _ in range(MAX_TRIES):
                try:
                    return self._try(change)
                except WatchError:
                    continue
        except (RedisError, OSError) as error:
            raise RegistryUnavailable(f"redis: {error}") from error
        raise RegistryUnavailable(f"redis: others changed the tenants {MAX_TRIES} times meanwhile")

    def _try(self, change: Callable[[Roster], Roster]) -> None:
        with self._redis.pipeline() as pipe:
            pipe.watch(VERSION, TENANTS)  # type: ignore[no-untyped-call]
            before = _parse(pipe.hgetall(TENANTS))  # watching, it answers at once
            after = change(before)
            pipe.multi()
            for name in before.tenants.keys() - after.tenants.keys():
                pipe.hdel(TENANTS, name)
            for name, tenant in after.tenants.items():
                if before.tenants.get(name) != tenant:
                    pipe.hset(TENANTS, name, json.dumps(tenant_to_data(tenant)))
            pipe.incr(VERSION)
            pipe.execute()


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _parse(entries: Mapping[Any, Any]) -> Roster:
    tenants: dict[str, Any] = {}
    for name, text in entries.items():
        try:
            tenants[str(name)] = json.loads(text)
        except ValueError as error:
            raise RosterError(f"redis: tenants.{name}: is not JSON: {error}") from error
    return parse_roster({"tenants": tenants}, source="redis")
