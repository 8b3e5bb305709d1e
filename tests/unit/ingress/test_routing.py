"""The choice of a shard, and what it is made from."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from echo_shards import Shard, all_ready, cluster, until
from hypothesis import given
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from moeray.attention_shard import link as wire
from moeray.config import KvCacheConfig
from moeray.ingress import prefix_index
from moeray.ingress.prefix_index import PrefixIndex, Sessions
from moeray.ingress.routing import REQUEST_TOKENS, SESSION_TOKENS, Candidate, choose
from moeray.vllm_hooks.block_hashes import BlockLayout, block_hashes, root_hash

ROOT = root_hash("sha256") or b""
LAYOUT = BlockLayout("sha256", ROOT, 4, 4)
PROMPT = list(range(100, 119))  # four blocks and three tokens

candidates = st.lists(
    st.builds(
        Candidate,
        st.text("abcdef", min_size=1, max_size=3),
        st.integers(0, 5000),
        st.integers(0, 20),
        st.integers(0, 50),
        st.booleans(),
        st.integers(0, 5000),
        st.integers(0, 5000),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda each: each.shard,
)


def asked(
    token_ids: list[int], *, salt: str | None = None, session: str | None = None, name: str = "r"
) -> EngineCoreRequest:
    made = EngineCoreRequest(name, token_ids, None, SamplingParams(max_tokens=9), None, 0.0, None, salt, None)
    made.session_id = session
    return made


def told(*stored: bytes, removed: tuple[bytes, ...] = (), cleared: bool = False) -> wire.Cached:
    return wire.Cached("sha256", ROOT, 4, 4, list(stored), list(removed), cleared)


def keys(token_ids: list[int], salt: str | None = None) -> list[bytes]:
    return list(block_hashes(LAYOUT, asked(token_ids, salt=salt)))


def test_the_longest_prefix_wins_until_its_load_costs_more() -> None:
    for extra in (0, 1, 2, 3):
        warm = Candidate("warm", 2 * REQUEST_TOKENS + 1, 1 + extra, 9)
        assert choose([Candidate("cold", 0, 1, 0), warm]) == ("warm" if extra <= 2 else "cold")


def test_without_prefix_or_session_the_least_loaded_takes_it_and_equals_take_turns() -> None:
    assert choose([Candidate("a", 0, 2, 0), Candidate("b", 0, 1, 9)]) == "b"
    assert choose([Candidate("a", 0, 1, 5), Candidate("b", 0, 1, 4)]) == "b"


def test_a_session_stays_unless_its_shard_has_much_more_to_do() -> None:
    at_par = SESSION_TOKENS // REQUEST_TOKENS
    for extra in range(at_par + 2):
        chosen = choose([Candidate("last", 0, extra, 9, has_session=True), Candidate("other", 0, 0, 0)])
        assert chosen == ("last" if extra < at_par else "other")


def test_a_prefix_counts_most_on_the_shard_less_on_its_node_and_least_in_the_pool() -> None:
    device, node = Candidate("d", 2048, 0, 9), Candidate("n", 0, 0, 0, node_tokens=2048)
    pool, none = Candidate("p", 0, 0, 0, pool_tokens=2048), Candidate("x", 0, 0, 0)
    for better, worse in ((device, node), (node, pool), (pool, none)):
        assert choose([worse, better]) == better.shard and better.worth_tokens > worse.worth_tokens
    everywhere = Candidate("e", 2048, 0, 0, node_tokens=2048, pool_tokens=2048)
    assert everywhere.worth_tokens == device.worth_tokens


def test_what_the_pool_has_makes_it_cheaper_to_avoid_a_loaded_shard() -> None:
    def busy(pool_tokens: int) -> str:
        warm = Candidate("warm", 4 * REQUEST_TOKENS, 2, 0, pool_tokens=pool_tokens)
        return choose([warm, Candidate("idle", 0, 0, 0, pool_tokens=pool_tokens)])

    assert busy(0) == "warm" and busy(4 * REQUEST_TOKENS) == "idle"


@given(candidates, st.randoms())
def test_the_order_of_the_shards_does_not_matter(shards: list[Candidate], random: st.random_module) -> None:
    shuffled = list(shards)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert choose(shuffled) == choose(shards)


@given(candidates)
def test_no_shard_is_worth_more_than_the_chosen_one(shards: list[Candidate]) -> None:
    chosen = next(each for each in shards if each.shard == choose(shards))
    assert all(each.worth_tokens <= chosen.worth_tokens for each in shards)


def test_no_shard_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        choose([])


def test_each_shard_counts_its_own_longest_prefix() -> None:
    index, blocks = PrefixIndex(), keys(PROMPT)
    index.take("a", told(*blocks[:3]))
    index.take("b", told(blocks[0], *blocks[2:]))
    assert index.cached_tokens(asked(PROMPT), [], ["a", "b", "c"]) == {"a": 12, "b": 4}
    assert index.cached_tokens(asked(PROMPT), [], ["b"]) == {"b": 4}
    assert index.cached_tokens(asked(PROMPT[:16]), PROMPT[16:], ["a"]) == {"a": 12}


def test_another_salt_is_another_prefix() -> None:
    index = PrefixIndex()
    index.take("a", told(*keys(PROMPT, "ours")))
    assert index.cached_tokens(asked(PROMPT, salt="ours"), [], ["a"]) == {"a": 16}
    assert index.cached_tokens(asked(PROMPT, salt="theirs"), [], ["a"]) == {}
    assert index.cached_tokens(asked(PROMPT), [], ["a"]) == {}


def test_what_was_removed_cleared_or_lost_counts_no_more() -> None:
    index, blocks = PrefixIndex(), keys(PROMPT)
    index.take("a", told(*blocks))
    index.take("a", told(removed=(blocks[2],)))
    assert index.cached_tokens(asked(PROMPT), [], ["a"]) == {"a": 8}
    index.take("a", told(blocks[0], cleared=True))
    assert index.cached_tokens(asked(PROMPT), [], ["a"]) == {"a": 4}
    index.forget("a")
    assert index.cached_tokens(asked(PROMPT), [], ["a"]) == {} and index.num_blocks("a") == 0


def test_what_a_shard_gave_to_its_node_outlives_the_shard_and_what_it_evicts() -> None:
    index, blocks = PrefixIndex(), keys(PROMPT)
    index.take("a", told(*blocks), ["node x", "pool"])
    index.take("b", told(blocks[0]), ["node y", "pool"])
    index.take("a", told(removed=tuple(blocks)), ["node x", "pool"])
    index.forget("a")
    found = index.cached_tokens(asked(PROMPT), [], ["a", "b", "node x", "node y", "pool"])
    assert found == {"b": 4, "node x": 16, "node y": 4, "pool": 16}


def test_a_place_forgets_what_was_told_longest_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_index, "MAX_BLOCKS", 3)
    index, blocks = PrefixIndex(), keys(PROMPT)
    index.take("a", told(*blocks[:3]), ["pool"])
    index.take("b", told(blocks[0]), ["pool"])
    index.take("c", told(b"x" * 8), ["pool"])
    assert index.num_blocks("pool") == 3
    assert index.cached_tokens(asked(PROMPT), [], ["pool"]) == {"pool": 4}


def test_the_index_never_holds_more_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_index, "MAX_BLOCKS", 5)
    index = PrefixIndex()
    for start in range(4):
        index.take("a", told(*(bytes([start, each]) for each in range(3))))
    assert index.num_blocks("a") == 5


def test_sessions_of_two_tenants_are_two_and_the_oldest_is_forgotten() -> None:
    sessions = Sessions(max_sessions=2)
    sessions.ran_on(asked([1], session="s", salt="x"), "a")
    sessions.ran_on(asked([1], session="s", salt="y"), "b")
    assert sessions.shard_of(asked([1], session="s", salt="x")) == "a"
    assert sessions.shard_of(asked([1], session="s")) is None
    sessions.ran_on(asked([1], session="t"), "b")
    assert sessions.shard_of(asked([1], session="s", salt="x")) is None
    assert sessions.shard_of(asked([1])) is None


def test_a_prompt_goes_where_its_prefix_is_until_that_link_is_lost() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a, b) as pool:
            await all_ready(pool, 2)
            long = list(range(3 * REQUEST_TOKENS))
            b.relay.cache_changed(told(*keys(long)))
            await until(lambda: pool.prefixes.num_blocks("b"))
            for name in ("r0", "r1"):  # the second although `a` has nothing to do
                await pool.add(asked(long, name=name))
            await until(lambda: {"r0", "r1"} <= set(b.engine.running))
            assert not a.engine.running
            await b.stop()
            await until(lambda: not pool.prefixes.num_blocks("b"))

    asyncio.run(scenario())


@pytest.mark.parametrize(("kv_cache", "shared"), [({"host_bytes": 1}, True), ({"host_bytes": 0}, False),
                                                ({"host_bytes": 0, "redis_url": "redis://h"}, True)])  # fmt: skip
def test_a_prefix_of_a_lost_shard_is_worth_something_where_its_blocks_are_shared(
    kv_cache: dict[str, Any], shared: bool
) -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a, b, kv_cache=KvCacheConfig(**kv_cache)) as pool:
            await all_ready(pool, 2)
            a.relay.cache_changed(told(*keys(PROMPT)))
            await until(lambda: pool.prefixes.num_blocks("a"))
            await a.stop()
            await until(lambda: not pool.prefixes.num_blocks("a"))
            holders = [*pool._node(pool._links["b"]), *pool._pool]
            assert pool.prefixes.cached_tokens(asked(PROMPT), [], holders) == dict.fromkeys(holders, 16)
            assert bool(holders) is shared

    asyncio.run(scenario())


def test_what_a_node_has_is_forgotten_with_its_last_shard() -> None:
    """Nodes come and go, and each is known under a name of its own."""

    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a, b, kv_cache=KvCacheConfig()) as pool:
            await all_ready(pool, 2)
            (node,) = pool._node(pool._links["a"])
            a.relay.cache_changed(told(*keys(PROMPT)))
            await until(lambda: pool.prefixes.num_blocks("a"))
            await pool.set_shards({"b": b.address})
            assert pool.prefixes.num_blocks(node) == len(keys(PROMPT)), "b can fetch them"
            await pool.set_shards({})
            assert pool.prefixes.num_blocks(node) == 0

    asyncio.run(scenario())


def test_a_session_goes_on_where_it_was() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a, b) as pool:
            await all_ready(pool, 2)
            await pool.add(asked([1, 2], session="s", name="r0"))
            await pool.add(asked([1, 2, 3], session="s", name="r1"))
            await until(lambda: len(a.engine.running) + len(b.engine.running) == 2)
            assert not (a.engine.running and b.engine.running)

    asyncio.run(scenario())


def test_an_ingress_of_before_is_not_sent_what_it_cannot_read() -> None:
    hello = wire.Hello(wire.PROTOCOL_VERSION, "0.32.0", "m", "ingress")
    fields = msgspec.msgpack.decode(wire.encode(hello))
    del fields["hears_cached"]
    again = wire.decode_to_shard(msgspec.msgpack.encode(fields))
    assert isinstance(again, wire.Hello) and not again.hears_cached
