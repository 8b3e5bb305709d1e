"""What dies is noticed, named and replaced; its clients get the answers that they would have got without that."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from chaos import sockets
from clusters import Cluster, cluster, is_running, kill, wait_for
from streams import LONG, stream, text_of, wait_until_healed


@pytest.fixture(scope="module")
def victim() -> Iterator[Cluster]:
    """A cluster that tests may hurt; it must have healed when a test ends."""
    config = {"attention": {"num_shards": 2}, "experts": {"num_groups": 2}, "health": {"hang_s": 5}}
    with cluster(config) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(victim: Cluster) -> str:
    text = text_of(victim)
    assert len(text) > 100
    return text


def test_a_stream_waits_for_the_return_of_all_expert_groups_and_goes_on(victim: Cluster, undisturbed: str) -> None:
    generation = victim.status()["generation"]
    groups, engines = victim.processes("expert_group"), engine_pids(victim)

    def kill_all() -> None:
        for group in groups:
            kill(group["pid"])

    assert text_of(victim, kill_all) == undisturbed
    wait_until_healed(victim, generation + 1)
    assert engine_pids(victim) == engines


def engine_pids(running: Cluster) -> list[int]:
    return [shard["engine_pid"] for shard in running.processes("attention_shard")]


@pytest.mark.parametrize(
    "part",
    ["engine_pid", pytest.param("shard_pid", marks=pytest.mark.full), pytest.param("pid", marks=pytest.mark.full)],
)
def test_streams_of_a_killed_shard_go_on_at_the_other(victim: Cluster, undisturbed: str, part: str) -> None:
    """Both shards have a stream, one of which is the victim's."""
    pids = [shard[part] for shard in victim.processes("attention_shard")]
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(text_of, victim)
        assert text_of(victim, lambda: kill(pids[0])) == undisturbed
        assert other.result() == undisturbed
    wait_until_healed(victim, 1)


def test_a_stopped_engine_is_killed_and_its_streams_go_on_at_the_other(victim: Cluster, undisturbed: str) -> None:
    stopped = psutil.Process(victim.processes("attention_shard")[0]["engine_pid"])
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(text_of, victim)
        assert text_of(victim, stopped.suspend) == undisturbed
        assert other.result() == undisturbed
    wait_for(lambda: not is_running(stopped.pid), 60, "the end of the stopped engine")
    wait_until_healed(victim, 1)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_scaling_up_and_down_under_load_changes_no_answer_and_restarts_nobody(
    victim: Cluster, undisturbed: str
) -> None:
    before = {p["id"]: p["pid"] for p in victim.status()["processes"] if p["state"] == "ready"}
    done = threading.Event()

    def ask_until_done() -> int:
        answers = 0
        while not done.is_set():
            assert text_of(victim) == undisturbed
            answers += 1
        return answers

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask_until_done) for _ in range(3)]
        try:
            for counts in (("experts=3", "attention=3"), ("experts=2", "attention=2")):
                scaled = victim.moeray("scale", *counts, timeout_s=240)
                assert scaled.returncode == 0, scaled.stdout + scaled.stderr
                there = {p["id"]: p["pid"] for p in victim.status()["processes"] if p["state"] == "ready"}
                if "experts=3" in counts:
                    assert before.items() <= there.items()
                assert (len(victim.processes("expert_group")), len(victim.processes("attention_shard"))) == tuple(
                    int(count[-1]) for count in counts
                )
        finally:
            done.set()
        assert all(each.result() > 0 for each in asking)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("pool", ["experts", "attention"])
def test_restarting_a_pool_under_load_replaces_each_process_and_changes_no_answer(
    victim: Cluster, undisturbed: str, pool: str
) -> None:
    role = {"experts": "expert_group", "attention": "attention_shard"}[pool]
    before = {process["id"] for process in victim.processes(role)}
    with ThreadPoolExecutor(1) as one:
        restarting = one.submit(victim.moeray, "restart", pool, timeout_s=280)
        while not restarting.done():
            assert text_of(victim) == undisturbed
    done = restarting.result()
    assert done.returncode == 0, done.stdout + done.stderr
    after = {process["id"] for process in victim.processes(role)}
    assert len(after) == len(before) and not before & after


def test_an_idle_loss_of_a_group_costs_no_engine(victim: Cluster) -> None:
    generation = victim.status()["generation"]
    engines = [shard["engine_pid"] for shard in victim.processes("attention_shard")]
    kill(victim.processes("expert_group")[1]["pid"])
    wait_for(lambda: victim.status()["generation"] > generation, 60, "the next generation")
    wait_until_healed(victim, generation + 1)
    assert [shard["engine_pid"] for shard in victim.processes("attention_shard")] == engines


@pytest.mark.parametrize(
    "part",
    ["pid", pytest.param("shard_pid", marks=pytest.mark.full), pytest.param("engine_pid", marks=pytest.mark.full)],
)
def test_a_shard_dies_as_one_and_is_replaced_while_the_other_serves(victim: Cluster, part: str) -> None:
    shard = victim.processes("attention_shard")[0]
    pids = [shard["pid"], shard["shard_pid"], shard["engine_pid"]]
    kill(shard[part])
    wait_for(lambda: not any(is_running(pid) for pid in pids), 15, f"all of {pids} gone")
    status, answer = victim.post("/v1/chat/completions", LONG | {"stream": False, "max_tokens": 4})
    assert status == 200, answer
    wait_until_healed(victim, 1)


def test_serving_goes_on_without_the_controller_and_it_comes_back_knowing_everybody(victim: Cluster) -> None:
    before = victim.status()
    controller = next(process for process in before["processes"] if process["role"] == "controller")
    events = stream(victim)
    for _ in range(5):
        next(events)
    psutil.Process(controller["pid"]).kill()
    received = 0
    for event in events:
        assert "error" not in event, event
        received += 1
    assert received > 100
    wait_until_healed(victim, 1)
    members = {(p["role"], p["id"]) for p in victim.status()["processes"] if p["state"] == "ready"}
    assert members == {(p["role"], p["id"]) for p in before["processes"] if p["state"] == "ready"}


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_shard_that_is_cut_off_from_the_controller_hands_its_streams_over_when_it_can_only_wait(
    victim: Cluster, undisturbed: str
) -> None:
    """Both shards have a stream when a group that has no copies is lost; only one of them keeps its lease."""
    state = victim.status()
    controller = next(process["pid"] for process in state["processes"] if process["role"] == "controller")
    group, (deaf, other) = victim.processes("expert_group")[0], victim.processes("attention_shard")
    ports = sockets.listeners(controller)

    def cut_off() -> None:
        for descriptor in ports:  # so that it does not simply connect anew
            sockets.deafen(controller, descriptor)
        for descriptor in sockets.connections_to(deaf["pid"], controller):
            sockets.deafen(deaf["pid"], descriptor)
        kill(group["pid"])

    with ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(text_of, victim, cut_off), pool.submit(text_of, victim)]
        try:
            # Far less than `experts.wait_s`; nobody can take the group's place meanwhile.
            wait_for(lambda: not is_running(deaf["engine_pid"]), 90, "the end of the shard that was cut off")
            assert is_running(other["engine_pid"]), "it has a lease, and waits"
        finally:
            for descriptor in ports:
                sockets.hear(controller, descriptor)
        assert [each.result() for each in streams] == [undisturbed, undisturbed]
    wait_until_healed(victim, state["generation"] + 1)
    assert other["engine_pid"] in engine_pids(victim)
