"""A hop over real groups: they die, hang and lie in the middle of a call, and the rows are those of the oracle."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from test_transport import SMALL, serve
from torch import Tensor
from transport_peers import Peer, spec_of, spread

from moeray.membership import Charge
from moeray.transport import Transport, connect
from moeray.vllm_hooks.hop import Hop
from moeray.vllm_hooks.route import Route

COPIES = (8, 8)
"""Both groups hold every expert."""
PATIENCE_S = 0.3


@pytest.fixture
def hops() -> Iterator[list[Hop]]:
    made: list[Hop] = []
    yield made
    for hop in made:
        hop.close()


def hop_to(
    hops: list[Hop],
    addresses: list[str],
    slots: tuple[int, ...] = COPIES,
    number: int = 0,
    accused: list[tuple[str, Charge]] | None = None,
) -> Hop:
    """A hop that has moved to generation 1.

    Args:
        accused: whom it accuses, and of what.
    """
    spec = spec_of(SMALL, shard_number=number, patience_s=PATIENCE_S)

    def connector(route: Route, absent: frozenset[int], in_a_hurry: bool) -> Transport:
        now = replace(spec, connect_timeout_s=1.0) if in_a_hurry else spec
        return connect(now, route.placement, route.addresses, absent=absent)

    hop = Hop()
    hop.set_up(connector, lambda group, _, charge: None if accused is None else accused.append((group, charge)))
    hop.follow(Route(spread(SMALL, slots), ("group-0", "group-1"), tuple(addresses)))
    hops.append(hop)
    return hop


def rows(hop: Hop, num_tokens: int) -> Tensor:
    hop.dispatch(0, *SMALL.batch(num_tokens))
    return hop.combine()


def expected(num_tokens: int) -> Tensor:
    oracle = SMALL.oracle()
    return oracle.combine(oracle.dispatch(0, *SMALL.batch(num_tokens)))


def assert_right_through(hop: Hop, harm: Callable[[], None], group: int) -> None:
    """Calls before, at and after the harm give the oracle's bits, and the group is left out."""
    for num_tokens in (1, 5, 100):
        assert torch.equal(rows(hop, num_tokens), expected(num_tokens))
    harm()
    for num_tokens in (5, 1, 5, 100):
        assert torch.equal(rows(hop, num_tokens), expected(num_tokens))
    assert list(hop.left_out) == [group]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_groups_copies_give_the_same_bits(
    mortal_groups: list[Peer], links: str, hops: list[Hop], victim: int, number: int
) -> None:
    _, addresses = serve(mortal_groups, SMALL, COPIES)
    hop = hop_to(hops, addresses, number=number)
    assert_right_through(hop, mortal_groups[victim].kill, victim)


def test_a_group_killed_while_it_computes_is_replaced_within_the_call(
    mortal_groups: list[Peer], links: str, hops: list[Hop]
) -> None:
    _, fast = serve(mortal_groups, SMALL, COPIES)
    _, slow = serve(mortal_groups, SMALL, COPIES, delay_s=60.0)
    hop = hop_to(hops, [fast[0], slow[1]])
    timer = threading.Timer(0.3, mortal_groups[1].kill)
    timer.start()
    assert torch.equal(rows(hop, 5), expected(5))
    assert hop.report()["longest_stall_us"] < 10e6


def test_a_stopped_group_costs_the_patience_and_no_more(mortal_groups: list[Peer], links: str, hops: list[Hop]) -> None:
    _, addresses = serve(mortal_groups, SMALL, COPIES)
    hop = hop_to(hops, addresses)
    assert_right_through(hop, lambda: mortal_groups[1].kill(signal.SIGSTOP), 1)
    mortal_groups[1].kill(signal.SIGCONT)
    for _ in range(600):
        if hop.left_out:
            hop.heal()
    assert hop.left_out == {}
    assert torch.equal(rows(hop, 5), expected(5))


@pytest.mark.parametrize("slow", [0, 1])
def test_a_group_a_hundred_times_slower_is_left_out_though_it_answers(
    groups: list[Peer], links: str, hops: list[Hop], slow: int
) -> None:
    _, fast_ones = serve(groups, SMALL, COPIES)
    _, slow_ones = serve(groups, SMALL, COPIES, delay_s=0.1)
    addresses, accused = list(fast_ones), []
    addresses[slow] = slow_ones[slow]
    hop = hop_to(hops, addresses, accused=accused)
    # The oracle is asked once: the time between two calls counts for the group.
    right = expected(5)
    for _ in range(400):
        assert torch.equal(rows(hop, 5), right)
        if hop.left_out:
            break
    assert list(hop.left_out) == [slow]
    assert accused == [(f"group-{slow}", Charge.SLOW)]
    assert torch.equal(rows(hop, 5), expected(5))
    hop.heal()
    assert hop.left_out == {}


def test_equally_slow_groups_are_not_left_out(groups: list[Peer], links: str, hops: list[Hop]) -> None:
    _, addresses = serve(groups, SMALL, COPIES, delay_s=0.03)
    hop = hop_to(hops, addresses)
    for _ in range(40):
        assert torch.equal(rows(hop, 5), expected(5))
    assert hop.left_out == {}


def test_a_lying_group_is_left_out(groups: list[Peer], links: str, hops: list[Hop]) -> None:
    _, honest = serve(groups, SMALL, COPIES)
    _, lying = serve(groups, SMALL, COPIES, lies_about=int(SMALL.batch(5)[1][0, 0]))
    # Which of the copies this shard uses is the placement's choice: try both shards, one of them is lied to.
    left_out = []
    for number in (0, 1):
        hop = hop_to(hops, [honest[0], lying[1]], number=number)
        assert torch.equal(rows(hop, 5), expected(5))
        left_out += list(hop.left_out)
    assert left_out == [1]


def test_without_copies_the_call_waits_for_the_replacement(
    mortal_groups: list[Peer], groups: list[Peer], links: str, hops: list[Hop]
) -> None:
    slots = (4, 4)
    key, addresses = serve(mortal_groups, SMALL, slots)
    hop = hop_to(hops, addresses, slots)
    assert torch.equal(rows(hop, 5), expected(5))
    mortal_groups[1].kill()
    results: list[Tensor] = []
    calling = threading.Thread(target=lambda: results.append(rows(hop, 100)))
    calling.start()
    other_key, others = serve(groups, SMALL, slots)
    groups[1].ask("serve_generations", other_key, {2: 1})
    mortal_groups[0].ask("serve_generations", key, {1: 0, 2: 0})
    hop.follow(Route(spread(SMALL, slots, generation=2), ("group-0", "group-2"), (addresses[0], others[1])))
    calling.join(60)
    assert torch.equal(results[0], expected(100))
    assert hop.generation == 2
