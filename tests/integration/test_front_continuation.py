"""The link to a shard is cut in the middle of every kind of answer: the client cannot tell it from the whole one."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from answers import Answer, Asked, requests
from front_process import Ingress, ShardProcess, chat, until
from network_fault import Proxy

from moeray.attention_shard.link import KEEPALIVE_S
from moeray.tiny import checkpoint_path

SAME_LOGPROB = 0.1
NAMES = list(requests(checkpoint_path()))


class Network:
    """Two ways to the shard, as if there were two; each can be lost alone."""

    def __init__(self, ingress: Ingress, shard: ShardProcess) -> None:
        self.ingress, self.pool = ingress, ingress.server._pool
        self.proxies: dict[str, Proxy] = {}
        ingress.call(self._start(shard.address))
        self.ready()

    async def _start(self, address: str) -> None:
        self.proxies = {name: Proxy(address) for name in ("left", "right")}
        await self.ingress.server.set_shards({name: await proxy.start() for name, proxy in self.proxies.items()})

    def ready(self) -> None:
        until(lambda: len(self.pool.ready_shards) == 2, 60)

    async def lose(self, num_tokens: int, how: str) -> None:
        """Take the way of the first request that has so many tokens."""
        while True:
            for known in self.pool.in_flight.values():
                if known.shard and len(known.token_ids) >= num_tokens:
                    return getattr(self.proxies[known.shard], how)()
            await asyncio.sleep(0.001)

    async def stop(self) -> None:
        for proxy in self.proxies.values():
            await proxy.stop()


@pytest.fixture(scope="module")
def network(ingress: Ingress, shared_shard: ShardProcess) -> Iterator[Network]:
    found = Network(ingress, shared_shard)
    yield found
    ingress.set_shards(shared_shard)
    ingress.call(found.stop())


def ask(network: Network, request: tuple[str, dict[str, Any]], *, stream: bool, cut_at: tuple[int, ...] = ()) -> Answer:
    """The answer, its shard being lost each time it has so many tokens."""
    network.ready()
    before = network.pool.continued
    asked = Asked(network.ingress, *request, stream=stream)
    for num_tokens in cut_at:
        network.ingress.call(network.lose(num_tokens, "cut"))
    answer = asked.end()
    assert network.pool.continued - before >= len(cut_at)
    return answer


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_whose_shard_is_lost_on_the_way_is_the_same(network: Network, model: Path, name: str) -> None:
    request = requests(model)[name]
    whole = ask(network, request, stream=False)
    assert whole.usage is not None and whole.usage["completion_tokens"] > 7, "there must be something to lose"

    streamed = ask(network, request, stream=True)
    assert streamed.choices[0].text == whole.choices[0].text

    ask(network, request, stream=False, cut_at=(3,)).assert_same(whole, SAME_LOGPROB)
    lost = ask(network, request, stream=True, cut_at=(1, 6))
    lost.assert_same(streamed, SAME_LOGPROB)
    print(f"{name}: longest gap {max(lost.gaps_s):.3f} s with two cuts, {max(streamed.gaps_s):.3f} s without")


def test_a_link_that_lets_nothing_through_is_left_within_its_keepalive(network: Network, model: Path) -> None:
    request = requests(model)["past the end token"]
    expected = ask(network, request, stream=True)
    asked = Asked(network.ingress, *request, stream=True)
    network.ingress.call(network.lose(5, "hold"))
    lost = next(proxy for proxy in network.proxies.values() if proxy.is_held)
    try:
        asked.end().assert_same(expected, SAME_LOGPROB)
    finally:
        lost.release()
    print(f"longest gap {max(asked.answer.gaps_s):.3f} s; keepalive {KEEPALIVE_S} s")
    network.ready()


def test_a_client_that_leaves_while_its_request_waits_ends_it(network: Network, shared_shard: ShardProcess) -> None:
    body = chat(max_tokens=3000, ignore_eos=True)
    network.ready()

    def lose_both() -> None:
        until(lambda: any(known.token_ids for known in [*network.pool.in_flight.values()]), 60)
        network.ingress.call(network.ingress.server.set_shards({}))

    losing = threading.Thread(target=lose_both)
    losing.start()
    with pytest.raises(TimeoutError):
        network.ingress.post("/v1/chat/completions", body, timeout_s=5)
    losing.join()
    until(lambda: not network.pool.in_flight, 60)
    until(lambda: shared_shard.info().num_requests == 0, 60)


def test_an_ingress_may_warn(ingress: Ingress) -> None:
    """Whatever vLLM imports."""
    assert logging.getLogger("moeray.ingress.shard_pool").isEnabledFor(logging.WARNING)
