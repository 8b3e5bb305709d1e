"""The ways to a Redis: TLS, Sentinel, Cluster. Real processes on loopback."""

from __future__ import annotations

import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from certificates import Authority
from kv_stores import BLOCK_BYTES, NAMESPACE, blocks_of, loaded, names_of
from redis import Redis, RedisError
from redis_server import LOOPBACK, RedisServer, missing, server_binary

from moeray.ingress.ports import free_ports
from moeray.kv_cache import RedisBlocks, StoreFailed

WAIT_S = 60.0
NAMES = names_of(60)
WHOLE = [bytes(block) for block in blocks_of(NAMES)]


@pytest.fixture(autouse=True)
def _is_there() -> None:
    if (why := missing()) is not None:
        pytest.skip(f"NOT tested against a Redis server: {why}")


def opened(url: str, *, password: str | None = None, ca_file: str = "", timeout_s: float = WAIT_S) -> RedisBlocks:
    return RedisBlocks(url, password, NAMESPACE, BLOCK_BYTES, ttl_s=3600, timeout_s=timeout_s, tls_ca_file=ca_file)


def eventually(works: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            if works():
                return
        except (StoreFailed, RedisError, OSError):
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_blocks_go_through_tls_to_whom_the_authority_knows_alone(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs", "stranger")
    signed = authority.sign("redis")
    (port,) = free_ports(LOOPBACK, 1)
    options = {"tls-port": port, "port": 0, "bind": LOOPBACK, "save": "", "dir": tmp_path, "requirepass": "secret"}
    options |= {"tls-cert-file": signed.cert, "tls-key-file": signed.key, "tls-ca-cert-file": authority.file}
    options |= {"tls-auth-clients": "no"}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    process = subprocess.Popen([str(server_binary()), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"rediss://{LOOPBACK}:{port}/0"
        store = opened(url, password="secret", ca_file=str(authority.file))

        def answers() -> bool:
            if process.poll() is not None:
                pytest.skip("this redis-server was built without TLS")
            return store.has(NAMES[:1]) == [False]

        eventually(answers)
        assert store.store(NAMES, blocks_of(NAMES)) == len(NAMES)
        assert loaded(store, NAMES) == WHOLE
        for wrong in (str(stranger.file), ""):
            with pytest.raises(StoreFailed, match="certificate verify failed"):
                opened(url, password="secret", ca_file=wrong).has(NAMES)
        with pytest.raises(StoreFailed):
            opened(f"redis://{LOOPBACK}:{port}/0", password="secret").has(NAMES)
    finally:
        process.kill()
        process.wait(WAIT_S)


def test_sentinel_leads_to_the_primary_of_the_moment(tmp_path: Path) -> None:
    """The primary is killed: until another one is elected calls fail, then they go there, with what it had copied."""
    with ExitStack() as stack:
        servers = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            servers.append(RedisServer(tmp_path / name, appendonly="no"))
            stack.callback(servers[-1].kill)
            servers[-1].start()
        first, second = servers
        first_port = int(first.url.rpartition(":")[2].partition("/")[0])
        copy = stack.enter_context(Redis.from_url(second.url))
        copy.replicaof(LOOPBACK, str(first_port))
        eventually(lambda: copy.info("replication")["master_link_status"] == "up")
        (port,) = free_ports(LOOPBACK, 1)
        (file := tmp_path / "sentinel.conf").write_text(
            f"port {port}\nbind {LOOPBACK}\ndir {tmp_path}\nsentinel monitor blocks {LOOPBACK} {first_port} 1\n"
            "sentinel down-after-milliseconds blocks 500\nsentinel failover-timeout blocks 3000\n"
        )
        sentinel = subprocess.Popen([str(server_binary()), str(file), "--sentinel"], stdout=subprocess.DEVNULL)
        stack.callback(sentinel.wait, WAIT_S)
        stack.callback(sentinel.kill)
        watch = stack.enter_context(Redis(host=LOOPBACK, port=port))
        eventually(lambda: watch.execute_command("SENTINEL", "REPLICAS", "blocks") != [])
        store = opened(f"redis+sentinel://{LOOPBACK}:{port}/blocks/0", timeout_s=2.0)
        assert store.store(NAMES, blocks_of(NAMES)) == len(NAMES)
        eventually(lambda: copy.dbsize() == len(NAMES))
        first.kill()
        with pytest.raises(StoreFailed, match=r"kv_cache\.redis_url: Redis at redis\+sentinel://"):
            store.has(NAMES)
        eventually(lambda: loaded(store, NAMES) == WHOLE)
        more = names_of(5, 1000)
        eventually(lambda: store.store(more, blocks_of(more)) == len(more))


def free_cluster_port() -> int:
    """A node takes its port + 10000 too."""
    for port in random.sample(range(12_000, 22_000), 1000):
        try:
            with socket.create_server((LOOPBACK, port)), socket.create_server((LOOPBACK, port + 10_000)):
                return port
        except OSError:
            continue
    pytest.fail("no two ports are free")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[RedisServer]]:
    """Three nodes with a third of the slots each."""
    nodes = []
    try:
        for index in range(3):
            (folder := tmp_path / str(index)).mkdir()
            nodes.append(
                RedisServer(
                    folder, free_cluster_port(), appendonly="no", cluster_enabled="yes", maxmemory="20mb",
                    maxmemory_policy="allkeys-lru",
                    cluster_require_full_coverage="no", cluster_node_timeout="1000",
                )
            )  # fmt: skip
            nodes[-1].start()
        clients = [Redis.from_url(node.url) for node in nodes]
        for index, client in enumerate(clients):
            client.execute_command("CLUSTER", "ADDSLOTS", *range(16384 * index // 3, 16384 * (index + 1) // 3))
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
            client.execute_command("CLUSTER", "MEET", LOOPBACK, nodes[0].url.rpartition(":")[2].partition("/")[0])
        for client in clients:
            eventually(lambda client=client: b"cluster_known_nodes:3" in client.execute_command("CLUSTER", "INFO"))  # type: ignore[misc]
            eventually(lambda client=client: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO"))  # type: ignore[misc]
            client.close()
        yield nodes
    finally:
        for node in nodes:
            node.kill()


def test_a_cluster_spreads_blocks_over_its_nodes_and_does_without_one_of_them_later(cluster: list[RedisServer]) -> None:
    store = opened(cluster[0].url.replace("redis://", "redis+cluster://").removesuffix("/0"), timeout_s=1.0)
    assert store.store(NAMES, blocks_of(NAMES)) == len(NAMES)
    assert loaded(store, NAMES) == WHOLE
    assert store.has(NAMES) == [True] * len(NAMES)
    store.touch(NAMES)
    held = []
    for node in cluster:
        with Redis.from_url(node.url) as client:
            held.append(client.dbsize())
    assert sum(held) == len(NAMES) and min(held) > 0
    assert (store.usage().blocks, store.usage().budget_bytes) == (len(NAMES), 60 << 20)
    cluster[2].kill()
    with pytest.raises(StoreFailed):
        store.has(NAMES)
    cluster[2].start()  # empty
    eventually(lambda: store.store(NAMES, blocks_of(NAMES)) >= 0 and loaded(store, NAMES) == WHOLE)
    assert store.flush() == len(NAMES)
    assert store.usage().blocks == 0
