"""A cluster, load on it, and one fault after the other: each begins when what it harms is whole."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from clusters import Cluster, cluster, is_running
from redis_server import RedisServer, missing

from chaos.asks import catalogue
from chaos.faults import FAULTS, SCALE_S, CannotInject, Context, Harm, LacksMeans, Planned, Schedule
from chaos.load import REQUEST_PREFIX, WATCHED_PREFIX, Load, reference, reprefill_s, what_is_wrong
from chaos.report import STALL_S, Event, Findings, attribute, first_chunk_s, long_gaps
from chaos.watching import PERIOD_S, Counts, OwnPauses, Watcher, is_whole, signs
from moeray.cli.connection import ray_connection
from moeray.tiny import checkpoint_path

WHOLE = Counts(shards=2, groups=3, ingresses=2)
RECOVERY_S = 150.0
"""An attention shard starts in half a minute when two cores serve meanwhile."""
HANG_S = 3.0
UNNOTICED_S = 2 * HANG_S
"""What no account shows after so long has done no lasting harm."""
SHM = "256m"
LOGS = Path("/tmp/ray/session_latest/logs")
"""Of the Ray that was started last: another one on this machine moves the link."""
MOVED = re.compile(rf"({REQUEST_PREFIX}(?:watched-)?\d+)\S* goes on on ")
MAX_AGAIN = 6
"""A run does not last for ever because no stream is where it strikes."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        seconds: faults are injected for so long; the last ones may recover afterwards.
        every_kind: and until each fault of the schedule was injected, as often as it is repeated.
        overlap: a fault begins as soon as the pools that it harms are whole, while others may be under repair.
        alone: faults that no other overlaps all the same.
        must_move: faults that are injected again where no watched stream had to go on elsewhere.
        logs: where the logs of the cluster's processes are kept.
        every: of the catalogue's asks, each so-many-th is used.
    """

    seconds: float
    seed: int
    schedule: Schedule
    num_clients: int = 4
    every: int = 1
    whole: Counts = WHOLE
    every_kind: bool = False
    overlap: bool = False
    alone: frozenset[str] = frozenset()
    must_move: frozenset[str] = frozenset()
    logs: Path | None = None


def configuration(whole: Counts, redis: RedisServer | None) -> dict[str, Any]:
    """cluster.yaml: every expert in two groups, what hangs is killed after HANG_S, state in Redis if there is one."""
    config = json.loads((checkpoint_path() / "config.json").read_text())
    return {
        "attention": {"num_shards": whole.shards},
        "experts": {"num_groups": whole.groups, "num_redundant": config["n_routed_experts"], "min_copies": 2},
        "health": {"hang_s": HANG_S},
        "ingress": {"num_replicas": whole.ingresses},
        "redis": {"url": redis.url if redis is not None else ""},
    }


def run(plan: Plan, say: Say = print) -> Findings:
    """Everything; raises only if there is no cluster to begin with."""
    golden = json.loads((checkpoint_path() / "golden.json").read_text())
    asks = [ask for number, ask in enumerate(catalogue(golden, plan.seed)) if ask.flows or number % plan.every == 0]
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(own_redis())
        running = stack.enter_context(cluster(configuration(plan.whole, redis), up_prefix=own_shm()))
        watcher = stack.enter_context(connected(running))
        say(f"cluster is up after {running.up_seconds:.0f} s; {len(asks)} asks, seed {plan.seed}")
        wait_until_whole(watcher, plan.whole)
        right = reference(asks, running.endpoints, plan.num_clients)
        again_s = reprefill_s(asks, running.endpoints)
        say("fault-free answers are known")
        load = Load(asks, running.endpoints, plan.num_clients, plan.seed)
        context = Context(
            running, watcher, random.Random(plan.seed), checkpoint_path(), plan.whole, shm_of(running), redis,
            load.have_all_begun_since, logs=LOGS.resolve(),
        )  # fmt: skip
        pauses = OwnPauses()
        pauses.start()
        load.start()
        try:
            time.sleep(3)
            events = inject_all(plan, context, say)
            time.sleep(2)
        finally:
            load.stop()
            pauses.stop()
            if plan.logs is not None:
                shutil.copytree(context.logs, plan.logs, dirs_exist_ok=True)
        usual_s = first_chunk_s(right.values())
        failures, quiet_stall_s = attribute(
            events, load.outcomes, lambda outcome: what_is_wrong(outcome, right),
            first_chunk_s=usual_s,
        )  # fmt: skip
        return Findings(
            plan.seed, events, len(load.outcomes), failures, quiet_stall_s, again_s, usual_s,
            long_gaps(load.outcomes, usual_s), pauses.found,
        )  # fmt: skip


def moved_requests(logs: Path) -> Counter[str]:
    """Requests of the load that an ingress says went on on another shard, and how often."""
    found: Counter[str] = Counter()
    for file in logs.glob("worker-*.err"):
        found.update(MOVED.findall(file.read_text(errors="replace")))
    return found


def inject_all(plan: Plan, context: Context, say: Say) -> list[Event]:
    """One fault after the other until the time is used up, or one that the cluster does not get over."""
    faults: list[Injected] = []
    rounds, ends, again = Rounds(plan.schedule), time.monotonic() + plan.seconds, Again(plan.must_move)
    while time.monotonic() < ends or (
        plan.every_kind and (rounds.completed < plan.schedule.num_rounds or again.is_owed(faults))
    ):
        under_repair = [each for each in faults if not each.is_over.is_set()]
        planned = None
        if not any(each.event.name in plan.alone and not each.is_far for each in faults[-1:]) and (
            plan.overlap or not under_repair
        ):
            busy = frozenset[str]().union(*(each.pools for each in under_repair))
            owed = None if under_repair else again.take(faults)
            planned = owed or rounds.take(busy, plan.alone if under_repair else ())
        if planned is not None:
            time.sleep(planned.pause_s)
            faults.append(inject(planned, context, say))
        elif any(each.is_overdue() for each in under_repair):
            break
        else:
            time.sleep(PERIOD_S)
    for each in faults:
        if not each.is_over.wait(max(0.0, each.overdue_at - time.monotonic())):
            each.give_up()
            say(f"not whole within {RECOVERY_S:g} s: {summary(context.watcher.state)}")
    return [each.event for each in faults]


class Rounds:
    """What is next: every fault of a schedule's round, before any of the next one."""

    def __init__(self, schedule: Schedule) -> None:
        self._rounds = schedule.rounds()
        self._round = next(self._rounds)
        self.completed = 0

    def take(self, busy: frozenset[str], without: Collection[str] = ()) -> Planned | None:
        """The first of this round that harms no busy pool and is not among `without`, if any."""
        for planned in self._round:
            if planned.name not in without and not FAULTS[planned.name].pools & busy:
                self._round.remove(planned)
                if not self._round:
                    self._round = next(self._rounds)
                    self.completed += 1
                return planned
        return None


class Again:
    """Faults of some kinds that struck where no watched stream was: one more of each, MAX_AGAIN in all."""

    def __init__(self, kinds: Collection[str]) -> None:
        self._kinds = kinds
        self._left = MAX_AGAIN

    def is_owed(self, faults: Sequence[Injected]) -> bool:
        """Whether the last fault is such a one, or may still turn out to be."""
        if not faults or not self._left:
            return False
        event, over = faults[-1].event, faults[-1].is_over.is_set()
        moved = any(each.startswith(WATCHED_PREFIX) for each in event.moved_ids)
        return event.name in self._kinds and not event.skipped and not (over and moved)

    def take(self, faults: Sequence[Injected]) -> Planned | None:
        """Of the last fault's kind, if that is over and has missed; whom it strikes is drawn anew."""
        if not self.is_owed(faults) or not faults[-1].is_over.is_set():
            return None
        self._left -= 1
        return replace(faults[-1].planned, seed=faults[-1].planned.seed + 1)


class Injected:
    """One fault from its injection until the pools that it harmed are whole again, watched by the watcher's thread.

    Attributes:
        pools: which it harms.
        harm: None until it is done.
        overdue_at: when the cluster is given up.
    """

    def __init__(self, planned: Planned, context: Context, say: Say) -> None:
        self.planned = planned
        self.event = Event(planned.name, planned.seed)
        self.pools = FAULTS[planned.name].pools
        self.harm: Harm | None = None
        self.is_over = threading.Event()
        self._context, self._say = context, say
        self._before = signs(context.watcher.state)
        self.event.began = time.monotonic()
        self.overdue_at = self.event.began + SCALE_S + RECOVERY_S
        self._moved_before = moved_requests(context.logs)
        self._noticed: float | None = None
        self._forget = context.watcher.listen(self._look)

    def done(self, harm: Harm) -> None:
        event = self.event
        event.what, event.cuts_clients = harm.what, harm.cuts_clients
        event.began = event.injected = harm.began or event.began
        self.overdue_at = time.monotonic() + RECOVERY_S
        self.harm = harm

    @property
    def is_far(self) -> bool:
        """Whether a stall that begins now is no longer its own."""
        return self.is_over.is_set() and (bool(self.event.skipped) or time.monotonic() > self.event.injected + STALL_S)

    def is_overdue(self) -> bool:
        return time.monotonic() > self.overdue_at

    def give_up(self, why_skipped: str = "") -> None:
        """It was not injected, or the cluster did not get over it."""
        self.event.skipped = why_skipped
        self._end(time.monotonic())

    def _look(self, now: float, state: dict[str, Any]) -> None:
        if self._noticed is None and signs(state) != self._before:
            self._noticed = now
        harm, context = self.harm, self._context
        if harm is None:
            return
        if self.event.victims_gone is None and not any(is_running(pid) for pid in harm.beyond_repair):
            self.event.victims_gone = now
        # A state from before the harm has done its work would look whole.
        has_worked = self._noticed is not None or (not harm.beyond_repair and now - self.event.began > UNNOTICED_S)
        if has_worked and not harm.is_broken and is_whole(state, context.whole, harm.beyond_repair, self.pools):
            self.event.recovered_s = now - self.event.began
            self._end(now)

    def _end(self, now: float) -> None:
        self._forget()
        event = self.event
        if self._noticed is not None:
            event.noticed_s = max(0.0, self._noticed - event.began)
        event.ended = now
        event.moved_ids = sorted(moved_requests(self._context.logs) - self._moved_before)
        self._say(_told(event))
        self.is_over.set()


def inject(planned: Planned, context: Context, say: Say) -> Injected:
    """Returns when the harm is done, not when it is repaired."""
    context.rng, context.harmed = random.Random(planned.seed), set()
    fault = Injected(planned, context, say)
    try:
        fault.done(FAULTS[planned.name].inject(context))
    except (CannotInject, OSError, psutil.Error) as error:
        fault.event.lacks_means = isinstance(error, LacksMeans)
        fault.give_up(str(error) or type(error).__name__)
    return fault


def wait_until_whole(watcher: Watcher, whole: Counts) -> None:
    if not watcher.wait(lambda state: is_whole(state, whole), RECOVERY_S):
        raise RuntimeError(f"the cluster never was whole: {summary(watcher.state)}")


def summary(state: dict[str, Any]) -> str:
    """Who is there in which state, in one line."""
    members = [
        f"{p['role']} {p.get('index', '')} {p['state']} {p.get('reason', '')}" for p in state.get("processes", ())
    ]
    of_it = ", ".join(f"{key} {state.get(key)}" for key in ("is_complete", "oldest_generation", "proposed"))
    return f"generation {state.get('generation')} ({of_it}): {'; '.join(each.strip() for each in members)}"


@contextlib.contextmanager
def connected(running: Cluster) -> Iterator[Watcher]:
    """This process asks the controller itself: a `moeray status` each time would take the cores that are measured."""
    os.environ["MOERAY_STATE_DIR"] = running.env["MOERAY_STATE_DIR"]
    with ray_connection():
        watcher = Watcher()
        watcher.start()
        try:
            yield watcher
        finally:
            watcher.stop()


@contextlib.contextmanager
def own_redis() -> Iterator[RedisServer | None]:
    """A server, or None where there is none."""
    if missing() is not None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="moeray-redis-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.kill()


def own_shm() -> list[str]:
    """A command that gives what it starts a small /dev/shm of its own, or nothing where that is not allowed."""
    mount = f'mount -t tmpfs -o size={SHM} tmpfs /dev/shm && exec "$@"'
    prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh"]
    tried = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    return prefix if tried.returncode == 0 else []


def shm_of(running: Cluster) -> Path | None:
    """The cluster's /dev/shm, if it is not this process'."""
    state = json.loads((Path(running.env["MOERAY_STATE_DIR"]) / "cluster.json").read_text())
    theirs = Path(f"/proc/{state['supervisor_pid']}/root/dev/shm")
    return theirs if theirs.stat().st_dev != Path("/dev/shm").stat().st_dev else None


def _told(event: Event) -> str:
    if event.skipped:
        return f"{event.name}: not injected: {event.skipped}"
    noticed = "-" if event.noticed_s is None else f"{event.noticed_s:.2f} s"
    whole = "never" if event.recovered_s is None else f"{event.recovered_s:.1f} s"
    return f"{event.name} (seed {event.seed}): {event.what}; noticed {noticed}, whole {whole}"
