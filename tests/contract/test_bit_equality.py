"""Bits equal to the local oracle's, whatever carries the rows: properties over random topologies and schedules.

A topology is a model (top-k 1..16, bf16 or fp32, hidden sizes with few and many inline rows) and a placement over 1..4
groups (uneven, groups of one expert, copies, another order in every layer). A schedule lets 1..3 shards call any layer
with 0..300 tokens in any order, one shard's replies waiting while another's calls go through. The oracle is one group
in this process. The groups are real processes.
"""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_transport import _keys
from torch import Tensor
from transport_peers import NUM_LAYERS, Model, Peer, ServerSettings, spec_of

from moeray.config import ChannelUsers
from moeray.placement import Placement
from moeray.transport import LocalTransport, Transport, connect
from moeray.transport.gloo import GlooCommunicator
from moeray.transport.packing import DevicePacker

NUM_SHARDS, MAX_GROUPS = 3, 4
HIDDEN_SIZES = (33, 64, 96, 1100)  # 64 rows fit inline into a dispatch, but at 1100 only 29 (bf16) or 14 (fp32)
BORDERS = (0, 1, 2, 14, 15, 29, 30, 63, 64, 65, 300)
QUICK = settings(deadline=None, suppress_health_check=list(HealthCheck))

models = st.builds(
    Model,
    hidden_size=st.sampled_from(HIDDEN_SIZES),
    num_experts=st.integers(16, 21),
    top_k=st.integers(1, 16),
    dtype=st.sampled_from(["bfloat16", "float32"]),
)
token_counts = st.sampled_from(BORDERS) | st.integers(0, 300)
calls = st.tuples(st.integers(0, NUM_LAYERS - 1), token_counts, st.integers(0, 3))
"""(layer, tokens, seed of the batch)"""


def random_placement(model: Model, random_: random.Random) -> Placement:
    """Any cover of the experts by the slots of 1..4 groups; in half of the cases with copies."""
    num_groups = random_.randint(1, MAX_GROUPS)
    num_slots = model.num_experts + random_.choice((0, random_.randint(1, model.num_experts)))
    cuts = sorted(random_.randint(0, num_slots) for _ in range(num_groups - 1))
    slots = tuple(end - begin for begin, end in zip([0, *cuts], [*cuts, num_slots], strict=True))
    copies = [random_.randrange(model.num_experts) for _ in range(num_slots - model.num_experts)]
    layers = [[*range(model.num_experts), *copies] for _ in range(NUM_LAYERS)]
    for layer in layers:
        random_.shuffle(layer)
    return Placement(1, model.num_experts, slots, tuple(map(tuple, layers)))


@dataclass(frozen=True)
class Topology:
    model: Model
    placement: Placement


placements = st.randoms(use_true_random=False)
topologies = st.builds(lambda model, random_: Topology(model, random_placement(model, random_)), models, placements)


def topology_with(top_k: int) -> Topology:
    """One for each top-k; dtype, hidden size, groups, unevenness and copies differ with it."""
    random_ = random.Random(top_k)
    model = Model(
        hidden_size=HIDDEN_SIZES[top_k % len(HIDDEN_SIZES)],
        num_experts=random_.randint(16, 21),
        top_k=top_k,
        dtype=("bfloat16", "float32")[top_k // 4 % 2],
    )
    return Topology(model, random_placement(model, random_))


@functools.lru_cache(maxsize=4)
def oracle_of(model: Model) -> Transport:
    return model.oracle()


@functools.lru_cache(maxsize=4)
def everything(model: Model) -> LocalTransport:
    """All experts, for local transports over any placement."""
    oracle = oracle_of(model)
    assert isinstance(oracle, LocalTransport)
    return oracle


@functools.lru_cache(maxsize=64)
def batch_and_bits(
    model: Model, layer: int, num_tokens: int, seed: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """A batch and what the oracle makes of it."""
    batch, oracle = model.batch(num_tokens, seed), oracle_of(model)
    return batch, oracle.combine(oracle.dispatch(layer, *batch))


@contextmanager
def shards_of(
    peers: list[Peer], topology: Topology, num_shards: int = NUM_SHARDS, *, gloo_only: bool = False
) -> Iterator[list[Transport]]:
    """Servers of one topology, and shards number 0, 1, .. connected to them.

    The shard in the middle comes by gloo, the others by channel; with an odd top-k, groups of odd numbers refuse that.
    """
    key, common = f"bits-{next(_keys)}", ServerSettings(topology.model, topology.placement, 0)
    addresses = [
        peers[group].ask("serve", key, replace(common, group=group, channel=_users(topology, group)))
        for group in range(topology.placement.num_groups)
    ]
    shards: list[Transport] = []
    try:
        for number in range(num_shards):
            users: ChannelUsers = "off" if gloo_only or number == 1 else "same_user"
            spec = spec_of(topology.model, f"s{number}", shard_number=number, timeout_s=120, channel=users)
            shards.append(connect(spec, topology.placement, addresses))
        yield shards
    finally:
        for shard in shards:
            shard.close()
        for group in range(topology.placement.num_groups):
            peers[group].ask("stop", key)


def _users(topology: Topology, group: int) -> ChannelUsers:
    return "off" if topology.model.top_k % 2 and group % 2 else "same_user"


def run_interleaved(
    model: Model, shards: Sequence[Transport], steps: Sequence[tuple[int, tuple[int, int, int]]]
) -> None:
    """Each step is one half of a call: a shard with a call in flight fetches it, another one sends the step's call."""
    in_flight: dict[int, tuple[object, Tensor]] = {}

    def fetch(number: int) -> None:
        handle, expected = in_flight.pop(number)
        assert_same_bits(shards[number].combine(handle), expected)  # type: ignore[arg-type]

    for step, (layer, num_tokens, seed) in steps:
        number = step % len(shards)
        if number in in_flight:
            fetch(number)
        else:
            batch, expected = batch_and_bits(model, layer, num_tokens, seed)
            in_flight[number] = shards[number].dispatch(layer, *batch), expected
    for number in sorted(in_flight):
        fetch(number)


def assert_same_bits(y_TD: Tensor, expected_TD: Tensor) -> None:
    assert y_TD.dtype == expected_TD.dtype and y_TD.shape == expected_TD.shape
    assert torch.equal(y_TD.view(torch.uint8), expected_TD.view(torch.uint8)), "even the sign of a zero"


# ---- over real processes


@pytest.mark.parametrize("top_k", range(1, 17))
def test_every_shard_gets_the_oracles_bits_in_any_order_of_calls(groups: list[Peer], top_k: int) -> None:
    topology = topology_with(top_k)
    schedules = st.lists(st.tuples(st.integers(0, NUM_SHARDS - 1), calls), max_size=16)

    with shards_of(groups, topology) as shards:

        @settings(QUICK, max_examples=12)
        @given(schedules, st.integers(1, NUM_SHARDS))
        def holds(steps: list[tuple[int, tuple[int, int, int]]], num_shards: int) -> None:
            run_interleaved(topology.model, shards[:num_shards], steps)

        holds()


@pytest.mark.parametrize("top_k", [2, 6, 16])
def test_shards_that_run_at_the_same_time_get_the_oracles_bits(groups: list[Peer], top_k: int) -> None:
    topology = topology_with(top_k)
    model = topology.model

    def run(shard: Transport, plan: Sequence[tuple[int, int, int]], errors: list[BaseException]) -> None:
        try:
            for call in plan:
                batch, expected = batch_and_bits(model, *call)
                assert_same_bits(shard.combine(shard.dispatch(call[0], *batch)), expected)
        except BaseException as error:  # noqa: BLE001 told to the test's own thread
            errors.append(error)

    with shards_of(groups, topology) as shards:

        @settings(QUICK, max_examples=8)
        @given(st.lists(st.lists(calls, max_size=8), min_size=2, max_size=NUM_SHARDS))
        def holds(plans: list[list[tuple[int, int, int]]]) -> None:
            errors: list[BaseException] = []
            threads = [
                threading.Thread(target=run, args=(shard, plan, errors))
                for shard, plan in zip(shards, plans, strict=False)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not errors, errors

        holds()


@pytest.mark.parametrize("top_k", [3, 9])
def test_bucketed_sizes_give_every_shard_the_oracles_bits(
    groups: list[Peer], top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a device does: see test_transport."""
    monkeypatch.setattr(GlooCommunicator, "bucketed", True)
    topology = topology_with(top_k)
    with shards_of(groups, topology, gloo_only=True) as shards:
        assert all(isinstance(shard._packer, DevicePacker) for shard in shards)  # type: ignore[attr-defined]

        @settings(QUICK, max_examples=12)
        @given(st.lists(st.tuples(st.integers(0, 2), calls), max_size=12))
        def holds(steps: list[tuple[int, tuple[int, int, int]]]) -> None:
            run_interleaved(topology.model, shards, steps)

        holds()


@pytest.mark.full
def test_any_topology_gives_every_shard_the_oracles_bits(groups: list[Peer]) -> None:
    """As above, with models and placements drawn anew for every example: the whole space, not sixteen points of it."""

    @settings(QUICK, max_examples=150)
    @given(topologies, st.integers(1, NUM_SHARDS), st.lists(st.tuples(st.integers(0, 2), calls), max_size=20))
    def holds(topology: Topology, num_shards: int, steps: list[tuple[int, tuple[int, int, int]]]) -> None:
        with shards_of(groups, topology, num_shards) as shards:
            run_interleaved(topology.model, shards, steps)

    holds()


# ---- the oracle itself


@settings(QUICK, max_examples=60)
@given(topologies, st.integers(0, 5), st.lists(calls, min_size=1, max_size=3))
def test_the_oracle_gives_the_same_bits_for_every_placement_and_shard(
    topology: Topology, shard: int, wanted: list[tuple[int, int, int]]
) -> None:
    local = LocalTransport(topology.placement, everything(topology.model)._compute, shard)
    for call in wanted:
        batch, expected = batch_and_bits(topology.model, *call)
        assert_same_bits(local.combine(local.dispatch(call[0], *batch)), expected)


def test_the_sixteen_topologies_cover_what_they_are_meant_to() -> None:
    """Otherwise the properties above would say less than their names."""
    all_ = [topology_with(top_k) for top_k in range(1, 17)]
    assert {topology.model.dtype for topology in all_} == {"bfloat16", "float32"}
    assert {topology.model.hidden_size for topology in all_} == set(HIDDEN_SIZES)
    assert {topology.placement.num_groups for topology in all_} == {1, 2, 3, 4}
    assert any(len(set(topology.placement.slots_per_group)) > 2 for topology in all_)
    with_copies = [t for t in all_ if sum(t.placement.slots_per_group) > t.model.num_experts]
    served = [{t.placement.group_of_expert(0, shard) for shard in range(NUM_SHARDS)} for t in with_copies]
    assert sum(len(by_shard) > 1 for by_shard in served) >= 3, "shards are served by different copies"
