"""Numbers that follow the load: both pools grow while clients wait, shrink when they go, and nobody loses anything."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import pytest
from clusters import Cluster, answer_text, cluster, expected_text, golden_request, wait_for

MANY, PLACES = 8, 4
CONFIG: dict[str, Any] = {
    "attention": {"num_shards": 1, "engine_args": {"max_num_seqs": PLACES}},
    "experts": {"num_groups": 1},
    "autoscaling": {
        "tpot_p95_s": 100, "ttft_p95_s": 100,  # nobody misses them: what counts is how many requests there are
        "attention": {"most": 2}, "experts": {"most": 2},
        "busy": 0.002,  # any stream is too much for one group
        "out_s": 1, "in_s": 5, "join_s": 0,
    },
}  # fmt: skip
SCALED_S = 120.0


@pytest.fixture(scope="module")
def scaled() -> Iterator[Cluster]:
    with cluster(CONFIG) as running:
        yield running


class Clients:
    """Each asks one golden prompt after the other; what came back wrong is in `wrong`."""

    def __init__(self, running: Cluster, golden: Sequence[dict[str, Any]]) -> None:
        self._running, self._golden = running, golden
        self.wrong: list[str] = []
        self.answered = 0

    @contextlib.contextmanager
    def asking(self, number: int) -> Iterator[None]:
        """So many of them, while the context lasts."""
        stop = threading.Event()
        threads = [threading.Thread(target=self._ask, args=(first, stop)) for first in range(number)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _ask(self, first: int, stop: threading.Event) -> None:
        for number in count(first, 7):
            if stop.is_set():
                return
            prompt = self._golden[number % len(self._golden)]
            status, answer = self._running.post("/v1/chat/completions", golden_request(prompt), 120)
            text = answer_text(answer["choices"][0]["message"]) if status == 200 else f"{status}: {answer}"
            self.answered += 1
            if text != expected_text(prompt):
                self.wrong.append(text)


def serving(running: Cluster) -> tuple[int, int]:
    """Shards and groups."""
    states = [(each["role"], each["state"]) for each in running.status()["processes"]]
    return states.count(("attention_shard", "ready")), states.count(("expert_group", "ready"))


def test_both_pools_follow_the_load_and_no_request_notices(scaled: Cluster, golden: list[dict[str, Any]]) -> None:
    clients = Clients(scaled, golden)
    with clients.asking(MANY):
        wait_for(lambda: serving(scaled) == (2, 2), SCALED_S, "a second shard and a second group")
        status = scaled.moeray("status").stdout
        assert "autoscaling, attention:" in status and "autoscaling, experts:" in status
    with clients.asking(1):
        wait_for(lambda: serving(scaled)[0] == 1, SCALED_S, "one shard again, while a client streams")
    wait_for(lambda: serving(scaled) == (1, 1), SCALED_S, "one group again")
    with clients.asking(1):
        before = clients.answered
        wait_for(lambda: clients.answered > before, SCALED_S, "an answer of what is left")
    assert not clients.wrong and clients.answered > MANY


def test_a_pool_that_follows_the_load_is_not_scaled_by_hand(scaled: Cluster) -> None:
    refused = scaled.moeray("scale", "attention=2")
    assert refused.returncode == 2 and "its number follows the load" in refused.stderr
