"""Every store keeps one text, gives it back to whoever opens it with the same id, and says when it cannot."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import redis
from redis_server import RedisServer, missing, nobody

from moeray.controller.store import PASSWORD_VARIABLE, RedisStore, Store, StoreError, open_store

WAIT_S = 60.0


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if (why := missing()) is not None:
        pytest.skip(f"RedisStore was NOT tested against a server: {why}")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def _ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    for attempt in range(3):
        try:
            ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False,
                     _temp_dir=str(Path("/tmp") / f"moeray-store-{os.getpid()}"))  # fmt: skip
            break
        except Exception:  # Ray gives its own processes 30 s, whatever else this machine does
            ray.shutdown()
            if attempt == 2:
                raise
    yield
    ray.shutdown()


@pytest.fixture(params=["ray", "redis"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        return server.url
    request.getfixturevalue("_ray")
    return ""


def test_the_last_text_is_found_by_the_same_cluster_and_by_no_other(url: str) -> None:
    store: Store = open_store(url, "one")
    assert store.load() is None
    store.save('{"größe": 1}')
    store.save('{"größe": 2}')
    assert open_store(url, "one").load() == '{"größe": 2}'
    assert open_store(url, "other").load() is None
    store.delete()
    assert open_store(url, "one").load() is None
    store.delete()


def test_a_redis_that_was_killed_gives_the_text_back_when_it_is_there_again(redis_server: RedisServer) -> None:
    store = open_store(redis_server.url, "killed")
    store.save("text")
    redis_server.kill()
    for call in (store.load, lambda: store.save("lost")):
        with pytest.raises(StoreError, match="redis"):
            call()
    redis_server.start()
    assert store.load() == "text"
    store.delete()


def test_a_redis_that_is_full_says_so_and_keeps_what_it_has(redis_server: RedisServer) -> None:
    store = open_store(redis_server.url, "full")
    store.save("text")
    with redis.Redis.from_url(redis_server.url) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        with pytest.raises(StoreError, match=r"redis.*maxmemory"):
            store.save("more")
        assert store.load() == "text"
        client.config_set("maxmemory", 0)
    store.delete()


def test_a_redis_that_does_not_answer_is_an_error_of_ours() -> None:
    store = RedisStore(nobody(), "key")
    for call in (store.load, store.delete, lambda: store.save("x")):
        with pytest.raises(StoreError, match="redis"):
            call()


def test_the_password_comes_from_the_environment_and_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener stands for the server: what a client says first is its password."""
    monkeypatch.setenv(PASSWORD_VARIABLE, "s3cret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        store = RedisStore(f"redis://127.0.0.1:{listener.getsockname()[1]}/0", "key")
        listener.settimeout(WAIT_S)
        said: list[bytes] = []

        def listen() -> None:
            connection, _ = listener.accept()
            with connection:
                said.append(connection.recv(4096))
                listener.close()  # a second try is refused at once

        thread = threading.Thread(target=listen)
        thread.start()
        with pytest.raises(StoreError) as error:
            store.load()
        thread.join(WAIT_S)
    assert b"s3cret" in said[0]
    assert "s3cret" not in str(error.value)
