"""A step in two halves gives what the whole step gives, wherever the experts are, and leaves nothing behind."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator

import pytest
from engine_runs import STORIES, Engine, Outcome, prompt_of, running_engine, serving
from transport_peers import Peer, group_peers

from moeray.placement import Placement, contiguous
from moeray.tiny import checkpoint_path
from moeray.transport import PeerLost
from moeray.vllm_hooks import micro_batches
from moeray.vllm_hooks.hop import hop
from moeray.vllm_hooks.micro_batch_choice import MIN_GAIN
from moeray.vllm_hooks.micro_batches import Plan, second_hop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # an engine starts in a test's time, on any machine

# Child processes import the same modules by name.
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in sys.path if path))

QUICK = ["batch of 7", "whole prefill next to decodes", "prefix hits"]
# In the third one vLLM itself gives a request another 0.03 next to others than it has alone, and than it has in a half.
SAME_BITS = QUICK[:2]
NEVER_CUT = "batch of 1"  # of one token
_generations = itertools.count(1)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    micro_batches.state.chosen = None
    with running_engine(checkpoint_path(), "always") as engine:
        engine.connect(placement_of(engine, 1), [], micro_batches="measured")
        yield engine
        second_hop.close()


@pytest.fixture(scope="module")
def first_plan(engine: Engine) -> Plan:
    """Made before the engine has seen a request."""
    assert micro_batches.state.chosen is not None
    return micro_batches.state.chosen


@pytest.fixture(scope="module")
def groups() -> Iterator[list[Peer]]:
    yield from group_peers(2)


def placement_of(engine: Engine, num_groups: int) -> Placement:
    shape = engine.checkpoint.shape
    return contiguous(
        generation=next(_generations), num_layers=shape.num_layers, num_experts=shape.num_experts,
        num_groups=num_groups,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(engine: Engine) -> dict[str, Outcome]:
    """Every story with whole steps, the experts in this process."""
    engine.connect(placement_of(engine, 1), [])
    return {name: engine.run(story) for name, story in STORIES.items()}


@pytest.mark.parametrize(
    "story",
    [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in STORIES if name not in (*QUICK, NEVER_CUT))],
)
def test_halves_give_the_same_bits_over_processes_and_in_this_one_and_the_tokens_of_whole_steps(
    engine: Engine, groups: list[Peer], whole: dict[str, Outcome], story: str
) -> None:
    engine.connect(placement_of(engine, 1), [], micro_batches="always")
    local = engine.run(STORIES[story])
    assert second_hop.costs.calls > 0, "no step was cut"
    placement = placement_of(engine, 2)
    with serving(groups, engine.checkpoint.path, placement) as addresses:
        engine.connect(placement, addresses, micro_batches="always")
        remote = engine.run(STORIES[story])
        assert second_hop.costs.calls > 0, "no step was cut"
        hop.close()
        second_hop.close()
    assert remote == local
    assert {name: answer.tokens for name, answer in local.answers.items()} == {
        name: answer.tokens for name, answer in whole[story].answers.items()
    }
    if story in SAME_BITS:
        assert local == whole[story]


def test_measuring_a_fresh_engine_gives_both_times_of_each_size_until_it_does_not_gain(
    engine: Engine, first_plan: Plan
) -> None:
    tried = [each.tokens for each in first_plan.measured]
    assert tried == [512 >> number for number in range(len(tried))]
    assert all(each.whole_ms > 0 and each.halves_ms > 0 for each in first_plan.measured)
    gained = [each.tokens for each in first_plan.measured if each.halves_ms <= (1 - MIN_GAIN) * each.whole_ms]
    assert tried[: len(gained)] == gained
    assert len(tried) - len(gained) <= 1
    assert first_plan.from_tokens == (min(gained) if gained else None)
    engine.connect(placement_of(engine, 1), [], micro_batches="measured")
    assert micro_batches.state.plan is first_plan, "it is measured once"
    assert (second_hop.generation is None) == (first_plan.from_tokens is None)


@pytest.mark.parametrize("lane", [0, 1], ids=["first", "second"])
def test_a_group_that_is_lost_to_one_half_ends_the_step_with_its_name(
    engine: Engine, groups: list[Peer], whole: dict[str, Outcome], lane: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.connect(placement_of(engine, 1), [], micro_batches="always")
    lost = (hop, second_hop)[lane]
    transport = lost._transport
    assert transport is not None
    calls = itertools.count()

    def combine(handle: object) -> object:
        if next(calls) == 2:
            raise PeerLost(1, "connection closed by peer")
        return type(transport).combine(transport, handle)  # type: ignore[arg-type]

    monkeypatch.setattr(transport, "combine", combine, raising=False)
    name = engine.add(prompt_of(40, seed=1), 2)
    with pytest.raises(PeerLost, match="expert group 1 lost"):
        engine.finish()
    assert micro_batches.state.running is None
    engine.engine.abort_request([name])
