"""A step never gets slower on better devices, nor faster with more to do; and parts are what they are called."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeray.planning import Efficiency, Machines, Topology, Work, step_time
from moeray.planning.formats import Formats
from moeray.planning.hardware import Hardware, catalogue
from moeray.planning.spec import load_shape
from moeray.planning.step import touched

FLASH, V3 = load_shape("deepseek-v4-flash"), load_shape("deepseek-v3")
FORMATS = Formats(routed="fp4", other="fp8", kv_bytes=1.14, index_bytes=1.03, dispatch_bytes=1.03)
TOPOLOGIES = st.one_of(
    st.builds(Topology, st.just("split"), st.integers(1, 16), st.integers(1, 16)),
    st.builds(Topology, st.sampled_from(["tensor", "data"]), st.integers(1, 16)),
)
WORKS = st.builds(Work, st.integers(1, 2000), st.integers(1, 200_000))


def machines(device: Hardware, efficiency: Efficiency | None = None) -> Machines:
    return Machines(device, device, efficiency or Efficiency())


def total(topology: Topology, work: Work, device: Hardware, efficiency: Efficiency | None = None) -> float:
    return step_time(FLASH, FORMATS, topology, machines(device, efficiency), work).total


@given(topology=TOPOLOGIES, work=WORKS, better=st.sampled_from(["bandwidth", "near", "far", "tflops"]))
@settings(max_examples=60, deadline=None)
def test_a_better_device_is_never_slower(topology: Topology, work: Work, better: str) -> None:
    device = catalogue()["H200"]
    changed = (
        {name: 2 * each for name, each in device.tflops.items()} if better == "tflops" else 2 * getattr(device, better)
    )
    assert total(topology, work, replace(device, **{better: changed})) <= total(topology, work, device) * 1.0001


@given(topology=TOPOLOGIES, work=WORKS)
@settings(max_examples=60, deadline=None)
def test_more_requests_or_longer_ones_take_no_less_time(topology: Topology, work: Work) -> None:
    device = catalogue()["H200"]
    least = total(topology, work, device)
    assert total(topology, replace(work, tokens=2 * work.tokens), device) >= least * 0.9999
    assert total(topology, replace(work, context=2 * work.context), device) >= least * 0.9999


@given(topology=TOPOLOGIES, work=WORKS)
@settings(max_examples=40, deadline=None)
def test_a_step_takes_at_least_its_largest_part_and_no_more_than_all(topology: Topology, work: Work) -> None:
    step = step_time(FLASH, FORMATS, topology, machines(catalogue()["H200"]), work)
    parts = (step.attention, step.shared, step.experts)
    waits_for_others = topology.attention - 1  # shards that meet in a group compute each other's tokens, too
    assert step.total >= max(step.attention + step.head + step.fixed, step.experts) * 0.999
    assert step.total <= (sum(parts) + step.hop + step.head + step.fixed + waits_for_others * step.experts) * 1.001


def test_experts_are_touched_as_often_as_chance_has_it() -> None:
    assert touched(V3, 1) == pytest.approx(8)
    assert touched(V3, 1e6) == pytest.approx(256)
    assert touched(V3, 64) == pytest.approx(256 * (1 - (1 - 8 / 256) ** 64))


def test_one_decode_step_of_one_rank_takes_at_least_what_reading_its_weights_takes() -> None:
    """A floor by hand: DeepSeek-V3 in FP8 over eight H200 reads its experts and attention once for many tokens."""
    device, efficiency = catalogue()["H200"], Efficiency(attention_bandwidth=1.0, expert_bandwidth=1.0)
    fp8 = Formats(routed="fp8", other="fp8", kv_bytes=1.14)
    step = step_time(V3, fp8, Topology("data", 8), machines(device, efficiency), Work(64, 1000), cuts=(1,))
    floor_us = 1e6 * (V3.routed_parameters / 8 + sum(a.parameters for a in V3.attention)) / device.bandwidth
    assert step.total > floor_us and step.experts == pytest.approx(
        1e6 * V3.routed_parameters / 8 / device.bandwidth, rel=0.1
    )


def test_cores_that_are_shared_do_no_more_than_there_are() -> None:
    device = catalogue()["CPU"]
    topology, work = Topology("split", 8, 8), Work(8, 100)
    apart = step_time(FLASH, FORMATS, topology, machines(device), work, cuts=(1,)).total
    shared = Machines(device, device, Efficiency(), shared_cores=2)
    assert step_time(FLASH, FORMATS, topology, shared, work, cuts=(1,)).total > 1.5 * apart
    slower = replace(shared, efficiency=Efficiency(interference=0.5))
    both = Topology("split", 2, 1)
    assert (
        step_time(FLASH, FORMATS, both, slower, work, cuts=(1,)).total
        > step_time(FLASH, FORMATS, both, shared, work, cuts=(1,)).total
    )


def test_every_constant_of_the_catalogue_has_a_source() -> None:
    from moeray.planning.hardware import sources

    for name, constants in sources().items():
        for constant, said in constants.items():
            assert set(said) == {"value", "source"} and len(said["source"]) > 4, f"{name}.{constant}"
    assert {"H100", "H200", "B200", "GB200", "MI300X", "CPU"} <= set(catalogue())
