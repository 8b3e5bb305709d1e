"""Both places of tenants: a change is seen in time, a wrong state is refused loudly, editors do not undo each other."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from redis import Redis
from redis_server import RedisServer

from moeray.tenancy import (
    Authenticator,
    Registry,
    RegistryUnavailable,
    Roster,
    RosterError,
    RosterFile,
    RosterRedis,
    RosterStore,
    Tenant,
    Unauthenticated,
    connect,
)
from moeray.tenancy.registry import POLL_S
from moeray.tenancy.roster_changes import add_key, create_tenant, revoke
from moeray.tenancy.roster_redis import TENANTS, VERSION

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
WAIT_S = 60.0


@pytest.fixture(params=["yaml", "json", "redis"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], RosterStore]:
    if request.param != "redis":
        return lambda: RosterFile(tmp_path / f"tenants.{request.param}")
    redis: Redis = request.getfixturevalue("redis")
    server: RedisServer = request.getfixturevalue("redis_server")
    assert redis.ping()
    return lambda: RosterRedis(connect(server.url, None, timeout_s=WAIT_S))


def with_tenant(name: str) -> Callable[[Roster], Roster]:
    return lambda roster: create_tenant(roster, name, {})


def test_what_one_writes_another_reads(open_store: Callable[[], RosterStore]) -> None:
    writer, reader = open_store(), open_store()
    writer.edit(with_tenant("search"))
    assert set(reader.read().tenants) == {"search"}
    assert reader.read_if_changed() is None
    writer.edit(with_tenant("chat"))
    changed = reader.read_if_changed()
    assert changed is not None
    assert set(changed.tenants) == {"chat", "search"}
    writer.edit(lambda roster: roster.without("search"))
    changed = reader.read_if_changed()
    assert changed is not None
    assert set(changed.tenants) == {"chat"}


def test_no_editor_undoes_anothers_change(open_store: Callable[[], RosterStore]) -> None:
    open_store().edit(with_tenant("first"))

    def add(name: str) -> None:
        open_store().edit(with_tenant(name))

    names = [f"t{number}" for number in range(8)]
    threads = [threading.Thread(target=add, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert set(open_store().read().tenants) == {"first", *names}


def test_a_change_in_redis_is_made_anew_if_others_wrote_meanwhile(redis: Redis) -> None:
    store, seen = RosterRedis(redis), list[set[str]]()

    def change(roster: Roster) -> Roster:
        seen.append(set(roster.tenants))
        if len(seen) == 1:
            RosterRedis(redis).edit(with_tenant("other"))
        return create_tenant(roster, "ours", {})

    store.edit(change)
    assert seen == [set(), {"other"}]
    assert set(store.read().tenants) == {"other", "ours"}


def test_a_change_that_fails_writes_nothing(open_store: Callable[[], RosterStore]) -> None:
    store = open_store()
    store.edit(with_tenant("search"))
    with pytest.raises(RosterError):
        store.edit(with_tenant("search"))
    assert store.read_if_changed() is None or set(store.read().tenants) == {"search"}
    store.edit(with_tenant("chat"))
    assert set(store.read().tenants) == {"chat", "search"}


async def test_a_revoked_key_is_refused_by_an_ingress_that_runs(open_store: Callable[[], RosterStore]) -> None:
    """The bound is a second: twice a second it is looked for. Here only that it comes by itself."""
    assert POLL_S <= 0.5
    editor = open_store()
    roster, key = add_key(Roster([Tenant(name="search")]), "search", now=NOW)
    editor.edit(lambda _: roster)
    registry = Registry(open_store())
    authenticator = Authenticator(registry)
    watch = asyncio.create_task(registry.watch())
    await asyncio.sleep(0)
    assert authenticator.authenticate(key.text).tenant.name == "search"
    await asyncio.to_thread(editor.edit, lambda now: revoke(now, "search", key.record.id, now=NOW))
    deadline = time.monotonic() + WAIT_S
    while not registry.roster.tenants["search"].keys[0].revoked:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    with pytest.raises(Unauthenticated, match="the API key was revoked"):
        authenticator.authenticate(key.text)
    watch.cancel()


def test_a_wrong_file_leaves_the_last_good_state_in_force_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text("tenants: {search: {}}\n")
    registry = Registry(RosterFile(path))
    path.write_text("tenants: {search: {limts: {}}}\n")
    for _ in range(3):
        registry.refresh()
    assert set(registry.roster.tenants) == {"search"}
    assert registry.problem is not None
    assert "tenants.search.limts: unknown key" in registry.problem
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 1
    path.unlink()
    registry.refresh()
    assert "cannot be read" in str(registry.problem)
    assert set(registry.roster.tenants) == {"search"}
    path.write_text("tenants: {search: {limts: {}}}\n")
    registry.refresh()
    assert "limts" in str(registry.problem), "it is there again, and still wrong"
    path.write_text("tenants: {chat: {}}\n")
    registry.refresh()
    assert (set(registry.roster.tenants), registry.problem) == ({"chat"}, None)


def test_wrong_tenants_in_redis_leave_the_last_good_ones_in_force(redis: Redis) -> None:
    store = RosterRedis(redis)
    store.edit(with_tenant("search"))
    registry = Registry(RosterRedis(redis))
    for wrong in ("{", '{"limts": 1}'):
        redis.hset(TENANTS, "chat", wrong)
        redis.incr(VERSION)
        registry.refresh()
        assert "chat" in str(registry.problem)
        assert set(registry.roster.tenants) == {"search"}
    with pytest.raises(RosterError):
        store.edit(with_tenant("more"))


def test_how_long_the_store_is_silent_is_known(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    times = iter([0.0, 2.0, 5.0])
    registry = Registry(RosterRedis(connect(server.url, None, timeout_s=WAIT_S)), clock=lambda: next(times))
    server.kill()
    registry.refresh()
    assert registry.unreached_s == 2.0
    assert "cannot be read" in str(registry.problem)
    server.start()
    registry.refresh()
    assert registry.problem is None
    assert next(times, None) is None, "the time of this answer was taken"
    server.kill()


def test_without_a_good_state_there_is_nothing_to_start_with(tmp_path: Path) -> None:
    with pytest.raises(RegistryUnavailable, match="cannot be read: No such file"):
        Registry(RosterFile(tmp_path / "tenants.yaml"))
    (tmp_path / "tenants.yaml").write_text("tenants: [")
    with pytest.raises(RosterError, match="is not YAML"):
        Registry(RosterFile(tmp_path / "tenants.yaml"))


def test_a_symlink_that_is_swapped_is_a_change(tmp_path: Path) -> None:
    """As a mounted Secret is replaced: same size, and the new file may even be older."""
    for number, name in enumerate(("one", "two")):
        (tmp_path / f"v{number}").mkdir()
        path = tmp_path / f"v{number}" / "tenants.yaml"
        path.write_text(f"tenants: {{{name}: {{}}}}\n")
        os.utime(path, (1000 - number, 1000 - number))
    (tmp_path / "data").symlink_to("v0")
    store = RosterFile(tmp_path / "data" / "tenants.yaml")
    assert set(store.read().tenants) == {"one"}
    assert store.read_if_changed() is None
    (tmp_path / "new").symlink_to("v1")
    (tmp_path / "new").rename(tmp_path / "data")
    changed = store.read_if_changed()
    assert changed is not None
    assert set(changed.tenants) == {"two"}


def test_a_change_within_the_same_clock_tick_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text("tenants: {one: {}}\n")
    status = path.stat()
    store = RosterFile(path)
    store.read()
    with path.open("r+") as file:
        file.write("tenants: {two: {}}\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = store.read_if_changed()
    assert changed is not None
    assert set(changed.tenants) == {"two"}


def test_only_the_owner_may_read_what_is_written_and_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "tenants.yaml").symlink_to("real.yaml")
    RosterFile(tmp_path / "tenants.yaml").edit(with_tenant("search"))
    assert (tmp_path / "tenants.yaml").is_symlink()
    assert stat.S_IMODE((tmp_path / "real.yaml").stat().st_mode) == 0o600
    assert not list(tmp_path.glob(".real*"))
