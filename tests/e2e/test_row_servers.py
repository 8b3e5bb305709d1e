"""Engram rows come from row servers: the same text as from a table of the shard's own, whatever happens to a server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import psutil
import pytest
from clusters import Cluster, cluster, is_running, kill, wait_for, wrong_answers
from streams import text_of as whole_text_of

CONFIG: dict[str, Any] = {
    "attention": {"num_shards": 1}, "experts": {"num_groups": 1}, "health": {"hang_s": 5},
    "engram": {"placement": "sharded", "num_servers": 2},
}  # fmt: skip


NUM_TOKENS = 600
text_of = partial(whole_text_of, max_tokens=NUM_TOKENS)


@pytest.fixture(scope="module")
def served() -> Iterator[Cluster]:
    """Each row is in one of two servers. A test leaves both of them ready."""
    with cluster(CONFIG) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(served: Cluster) -> str:
    text = text_of(served)
    assert len(text) > 100
    return text


def servers(running: Cluster) -> list[dict[str, Any]]:
    return running.processes("engram_server")


def wait_until_both_serve(running: Cluster, but: set[int]) -> None:
    """Other processes than these."""

    def both() -> bool:
        now = [server for server in servers(running) if server["state"] == "ready" and server["pid"] not in but]
        return [server["index"] for server in now] == [0, 1]

    wait_for(both, 120, "two row servers")


def test_every_answer_is_the_golden_one_and_both_servers_brought_its_rows(
    served: Cluster, golden: list[dict[str, Any]]
) -> None:
    assert not wrong_answers(served, golden)
    held = [server["engram"]["columns"] for server in servers(served)]
    assert sorted(column for columns in held for column in columns) == list(range(sum(map(len, held))))
    wait_for(lambda: all(server["engram"]["rows_sent"] > 1000 for server in servers(served)), 10, "the report")


def test_a_stream_waits_for_the_rows_of_killed_servers_and_goes_on(served: Cluster, undisturbed: str) -> None:
    before = servers(served)
    engine = served.processes("attention_shard")[0]["engine_pid"]

    def kill_all() -> None:
        for server in before:
            kill(server["pid"])

    assert text_of(served, kill_all) == undisturbed
    wait_until_both_serve(served, {server["pid"] for server in before})
    assert served.processes("attention_shard")[0]["engine_pid"] == engine


@pytest.mark.full
def test_a_stopped_server_is_replaced_and_the_stream_goes_on(served: Cluster, undisturbed: str) -> None:
    stopped = psutil.Process(servers(served)[0]["pid"])
    assert text_of(served, stopped.suspend) == undisturbed
    wait_for(lambda: not is_running(stopped.pid), 60, "the end of the stopped server")
    wait_until_both_serve(served, {stopped.pid})


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_pool_of_row_servers_is_restarted_while_streams_go_on(served: Cluster, undisturbed: str) -> None:
    before = {server["pid"] for server in servers(served)}
    done: list[Any] = []
    restart = threading.Thread(target=lambda: done.append(served.moeray("restart", "engram", timeout_s=240)))
    texts = [text_of(served, restart.start)]
    while restart.is_alive():
        texts.append(text_of(served))
    assert set(texts) == {undisturbed}
    assert done[0].returncode == 0, done[0].stderr
    assert not before & {server["pid"] for server in servers(served)}
