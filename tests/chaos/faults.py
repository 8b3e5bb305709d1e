"""Every fault that can be injected: on real processes, chosen by a seed, undone by itself where it can be.

A fault takes the context, does its harm and returns what it did. It may block as long as the harm lasts.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clusters import Cluster, is_running
from redis_server import RedisServer, missing

from chaos import sockets, weights
from chaos.watching import PIDS, ROLE_OF, Counts, Watcher

PAUSE_S = 2.0
SLOW_S, SLOW_SHARE = 8.0, 100
FULL_S = 5.0
DOWN_S = 7.0
SCALE_S = 240.0
TOLD_S = 10.0
BUSY, SPREAD_S = 3, 40.0
"""Requests on a shard that is to be killed, and how long to wait for them, and for watched streams to spread anew."""
DETAILS = {"attention_shard": {"shard_pid", "engine_pid"}, "expert_group": {"experts"}}


class CannotInject(Exception):
    """The cluster gives no way to do it; the run says so."""


class LacksMeans(CannotInject):
    """This machine has nothing to do it with; the run is not to blame."""


@dataclass
class Context:
    """What faults work on.

    Attributes:
        whole: the numbers of processes that make the cluster whole now; scaling changes them.
        shm: the cluster's own /dev/shm as this process reaches it; None where it has none of its own.
        redis: what keeps the controller's state; None where there is no server.
        have_all_begun_since: whether each watched stream began after a time.
        logs: of the cluster's processes.
        harmed: processes chosen in this injection: several faults at once have different victims.
    """

    cluster: Cluster
    watcher: Watcher
    rng: random.Random
    checkpoint: Path
    whole: Counts
    shm: Path | None = None
    redis: RedisServer | None = None
    have_all_begun_since: Callable[[float], bool] = lambda _: True
    logs: Path = Path()
    harmed: set[str] = field(default_factory=set)

    def one(self, role: str) -> dict[str, Any]:
        """A victim of which everything is known: a controller that has begun anew hears it with the next beat."""
        if not (found := self._known(role)):
            self.watcher.wait(lambda _: bool(self._known(role)), TOLD_S)
            found = self._known(role)
        if not found:
            raise CannotInject(f"no {role} is ready")
        victim = self.rng.choice(found)
        self.harmed.add(victim["id"])
        return victim

    def wait_until_it_is_busy(self, victim: dict[str, Any]) -> None:
        """A shard that has just started runs no long stream: its death would hurt nobody, and prove nothing."""
        asked = time.monotonic()

        def is_busy(state: dict[str, Any]) -> bool:
            return self.have_all_begun_since(asked) and any(
                each["id"] == victim["id"] and each.get("running", 0) >= BUSY for each in state["processes"]
            )

        self.watcher.wait(is_busy, SPREAD_S)

    def _known(self, role: str) -> list[dict[str, Any]]:
        return [
            each for each in self.watcher.processes(role)
            if each["id"] not in self.harmed
            and each.keys() >= DETAILS.get(role, set())
            and all(is_running(each[key]) for key in PIDS if key in each)
        ]  # fmt: skip


@dataclass(frozen=True)
class Harm:
    """What was done.

    Attributes:
        what: in words, with pids.
        cuts_clients: connections of clients are lost with it, which no protocol can go on with.
        beyond_repair: pids of which the cluster must be rid before it is whole.
        began: when, if preparing it took a while.
        is_broken: the product did not do what it was told: the cluster does not count as whole again.
    """

    what: str
    cuts_clients: bool = False
    beyond_repair: frozenset[int] = frozenset()
    began: float | None = None
    is_broken: bool = False


Fault = Callable[[Context], Harm]


@dataclass(frozen=True)
class Kind:
    """One kind of fault.

    Attributes:
        pools: which must be whole before it begins, and again before it is over; names of `Counts`, or "controller".
    """

    inject: Fault
    pools: frozenset[str]


def _of(inject: Fault, *roles: str) -> Kind:
    """A fault that harms the pools of these roles."""
    return Kind(inject, frozenset(pool for pool, role in ROLE_OF.items() if role in roles))


def _signal(number: signal.Signals, role: str, key: str = "pid") -> Kind:
    def inject(context: Context) -> Harm:
        victim = context.one(role)
        if role == "attention_shard":
            context.wait_until_it_is_busy(victim)
        began = time.monotonic()
        os.kill(victim[key], number)
        what = f"{number.name} {role} {victim['id']} {key} {victim[key]}"
        return Harm(what, role == "ingress", frozenset({victim[key]}), began)

    return _of(inject, role)


def _pause(role: str, key: str = "pid") -> Kind:
    """Stopped for PAUSE_S; whether it was replaced meanwhile is the cluster's decision."""

    def inject(context: Context) -> Harm:
        victim = context.one(role)
        os.kill(victim[key], signal.SIGSTOP)
        time.sleep(PAUSE_S)
        with suppress(ProcessLookupError):
            os.kill(victim[key], signal.SIGCONT)
        return Harm(f"paused {role} {victim['id']} {key} {victim[key]} for {PAUSE_S:g} s")

    return _of(inject, role)


def slow_group(context: Context) -> Harm:
    """Runs a hundredth of the time for SLOW_S."""
    pid, ends = context.one("expert_group")["pid"], time.monotonic() + SLOW_S
    with suppress(ProcessLookupError):
        while time.monotonic() < ends:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.002 * (SLOW_SHARE - 1))
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.002)
    return Harm(f"expert group pid {pid} at 1/{SLOW_SHARE} of its speed for {SLOW_S:g} s")


def _doorbell(context: Context) -> tuple[int, int]:
    """(pid of an EngineCore, descriptor of its socket to one group of its node)"""
    shard = context.one("attention_shard")["engine_pid"]
    found = sockets.doorbells(shard)
    if not found:
        raise CannotInject(f"EngineCore {shard} has no channel")
    return shard, context.rng.choice(found)


def cut_channel(context: Context) -> Harm:
    """One shard's socket to one group, which rings and tells of deaths."""
    shard, descriptor = _doorbell(context)
    sockets.cut(shard, descriptor)
    return Harm(f"cut channel socket {descriptor} of EngineCore pid {shard}")


def deafen_channel(context: Context) -> Harm:
    """One shard no longer hears one group's bell, and neither end knows."""
    shard, descriptor = _doorbell(context)
    sockets.deafen(shard, descriptor)
    return Harm(f"deafened channel socket {descriptor} of EngineCore pid {shard}")


def restart_ingresses(context: Context) -> Harm:
    """`moeray restart ingress`: each drains and is replaced, one after the other."""
    pids = frozenset(each["pid"] for each in context.watcher.processes("ingress"))
    began = time.monotonic()
    done = context.cluster.moeray("restart", "ingress", timeout_s=SCALE_S)
    if done.returncode:
        return Harm(f"moeray restart ingress failed: {done.stderr.strip()[-300:]}", is_broken=True)
    return Harm("moeray restart ingress", True, pids, began)


def cut_group_connection(context: Context) -> Harm:
    """One shard's TCP connection to one group."""
    shard, group = context.one("attention_shard")["engine_pid"], context.one("expert_group")["pid"]
    found = sockets.connections_to(shard, group)
    if not found:
        raise CannotInject(f"EngineCore {shard} has no TCP connection to expert group {group}")
    sockets.cut(shard, found[0])
    return Harm(f"cut TCP connection {found[0]} of EngineCore pid {shard} to expert group pid {group}")


def _link(harm: Callable[[int, int], None], word: str, both_ends: bool) -> Kind:
    def inject(context: Context) -> Harm:
        ingress, shard = context.one("ingress")["pid"], context.one("attention_shard")["shard_pid"]
        ends = sockets.connections_between(ingress, shard)
        if not ends:
            raise CannotInject(f"ingress {ingress} has no connection to shard process {shard}")
        for pid, descriptor in ends if both_ends else ends[:1]:
            harm(pid, descriptor)
        return Harm(f"{word} link of ingress pid {ingress} to shard process pid {shard}")

    return _of(inject, "ingress")


def _garbage(num_groups: int) -> Kind:
    """Random bytes over a part of the weights of so many groups, at once."""

    def inject(context: Context) -> Harm:
        found: dict[int, dict[int, int]] = {}
        for group in [context.one("expert_group") for _ in range(num_groups)]:
            held: Mapping[Any, Any] = group["experts"]["held"]
            found[group["pid"]] = weights.find(group["pid"], context.checkpoint, held)
            if not found[group["pid"]]:
                raise CannotInject(f"no weight was found in the memory of expert group {group['pid']}")
        began = time.monotonic()
        for pid, places in found.items():
            weights.spoil(pid, places, context.rng)
        what = " + ".join(f"{len(places)} matrices of expert group pid {pid}" for pid, places in found.items())
        return Harm(f"{what} overwritten", False, frozenset(found), began)

    return _of(inject, "expert_group")


def full_shm(context: Context) -> Harm:
    """The cluster's own /dev/shm has no byte left for FULL_S."""
    if context.shm is None:
        raise LacksMeans("the cluster shares /dev/shm with everybody: no mount namespace of its own here")
    file = context.shm / "chaos-fill"
    written = 0
    try:
        with file.open("wb", buffering=0) as sink, suppress(OSError):
            while True:
                written += sink.write(bytes(1 << 20))
        time.sleep(FULL_S)
    finally:
        file.unlink(missing_ok=True)
    return Harm(f"/dev/shm full ({written >> 20} MiB) for {FULL_S:g} s")


def kill_redis(context: Context) -> Harm:
    """And start it again, with what it had, after DOWN_S."""
    server = _redis(context)
    assert server.process is not None
    pid = server.process.pid
    server.kill()
    time.sleep(DOWN_S)
    server.start()
    return Harm(f"Redis pid {pid} killed, another started after {DOWN_S:g} s")


def stop_redis(context: Context) -> Harm:
    """For DOWN_S, which is longer than the controller waits for it."""
    server = _redis(context)
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    time.sleep(DOWN_S)
    server.process.send_signal(signal.SIGCONT)
    return Harm(f"Redis pid {server.process.pid} stopped for {DOWN_S:g} s")


def _redis(context: Context) -> RedisServer:
    if context.redis is None:
        raise LacksMeans(f"no Redis: {missing()}")
    return context.redis


def _scale(word: str, pool: str, by: int) -> Kind:
    """`moeray scale`, which calls the pool by this word."""

    def inject(context: Context) -> Harm:
        count = getattr(context.whole, pool) + by
        done = context.cluster.moeray("scale", f"{word}={count}", timeout_s=SCALE_S)
        if done.returncode:
            return Harm(f"moeray scale {word}={count} failed: {done.stderr.strip()[-300:]}", is_broken=True)
        context.whole = Counts(**(vars(context.whole) | {pool: count}))
        return Harm(f"moeray scale {word}={count}")

    return Kind(inject, frozenset({pool}))


def _together(*kinds: Kind) -> Kind:
    def inject(context: Context) -> Harm:
        done = [kind.inject(context) for kind in kinds]
        return Harm(
            " + ".join(each.what for each in done),
            any(each.cuts_clients for each in done),
            frozenset().union(*(each.beyond_repair for each in done)),
            min((each.began for each in done if each.began is not None), default=None),
        )

    return Kind(inject, frozenset().union(*(kind.pools for kind in kinds)))


_KILL, _STOP = signal.SIGKILL, signal.SIGSTOP

FAULTS: Mapping[str, Kind] = {
    "kill group": _signal(_KILL, "expert_group"),
    "kill shard process": _signal(_KILL, "attention_shard", "shard_pid"),
    "kill engine": _signal(_KILL, "attention_shard", "engine_pid"),
    "kill shard replica": _signal(_KILL, "attention_shard"),
    "kill ingress": _signal(_KILL, "ingress"),
    "kill controller": _signal(_KILL, "controller"),
    "stop controller": _signal(_STOP, "controller"),
    "stop ingress": _signal(_STOP, "ingress"),
    "kill Redis": _of(kill_redis, "controller"),
    "stop Redis": _of(stop_redis, "controller"),
    "stop group": _signal(_STOP, "expert_group"),
    "stop shard process": _signal(_STOP, "attention_shard", "shard_pid"),
    "stop engine": _signal(_STOP, "attention_shard", "engine_pid"),
    "pause group": _pause("expert_group"),
    "pause shard process": _pause("attention_shard", "shard_pid"),
    "pause engine": _pause("attention_shard", "engine_pid"),
    "slow group": _of(slow_group, "expert_group"),
    "cut channel": _of(cut_channel, "expert_group"),
    "cut group connection": _of(cut_group_connection, "expert_group"),
    "cut link": _link(sockets.cut, "cut", both_ends=False),
    "half-open link": _link(sockets.deafen, "deafened", both_ends=True),
    "deafened channel": _of(deafen_channel, "expert_group"),
    "garbage from group": _garbage(1),
    "garbage from two groups": _garbage(2),
    "restart ingresses": _of(restart_ingresses, "ingress"),
    "full /dev/shm": _of(full_shm),
    "more groups": _scale("experts", "groups", +1),
    "fewer groups": _scale("experts", "groups", -1),
    "more shards": _scale("attention", "shards", +1),
    "fewer shards": _scale("attention", "shards", -1),
    "kill group and engine": _together(_signal(_KILL, "attention_shard", "engine_pid"), _signal(_KILL, "expert_group")),
    "kill group and controller": _together(_signal(_KILL, "controller"), _signal(_KILL, "expert_group")),
    "kill two groups": _together(_signal(_KILL, "expert_group"), _signal(_KILL, "expert_group")),
}
"""By name. In a schedule, `more` comes before `fewer` of its kind."""


@dataclass(frozen=True)
class Planned:
    """One entry of a schedule: the fault's name, the seed of its choices, and the quiet before it."""

    name: str
    seed: int
    pause_s: float


@dataclass
class Schedule:
    """The same faults in the same order for the same seed.

    Attributes:
        repeats: how often the first two rounds together have these; others are in each round once.
    """

    seed: int
    names: list[str] = field(default_factory=lambda: list(FAULTS))
    repeats: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_rounds(self) -> int:
        """After which each fault was there as often as it is wanted."""
        return 2 if self._again() else 1

    def rounds(self) -> Iterator[list[Planned]]:
        """Without end: every fault once, in random order; then what is repeated; then every one again."""
        rng, is_first = random.Random(self.seed), True
        while True:
            order = rng.sample(self.names, len(self.names))
            for less in (each for each in self.names if each.startswith("fewer ")):
                more = "more " + less.removeprefix("fewer ")
                if more in order and order.index(more) > order.index(less):
                    one, other = order.index(more), order.index(less)
                    order[one], order[other] = less, more
            yield [self._planned(name, rng) for name in order]
            if is_first and (again := self._again()):
                yield [self._planned(name, rng) for name in rng.sample(again, len(again))]
            is_first = False

    def _again(self) -> list[str]:
        return [name for name in self.names for _ in range(self.repeats.get(name, 1) - 1)]

    @staticmethod
    def _planned(name: str, rng: random.Random) -> Planned:
        return Planned(name, rng.randrange(2**31), round(rng.uniform(0.5, 2.5), 3))
