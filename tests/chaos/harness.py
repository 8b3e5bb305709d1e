"""A cluster, load on it, and one fault after the other: each begins when the cluster has recovered."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters import Cluster, cluster

from chaos.asks import catalogue
from chaos.faults import FAULTS, CannotInject, Context, Planned, Schedule
from chaos.load import Load, reference, what_is_wrong
from chaos.report import Event, Findings, attribute
from chaos.watching import Counts, Watcher, is_whole, signs
from moeray.cli.connection import ray_connection
from moeray.tiny import checkpoint_path

WHOLE = Counts(shards=2, groups=3, ingresses=2)
RECOVERY_S = 150.0
"""An attention shard starts in half a minute when two cores serve meanwhile."""
HANG_S = 3.0
UNNOTICED_S = 2 * HANG_S
"""What no account shows after so long has done no lasting harm."""
SHM = "256m"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        seconds: faults are injected for so long; the last one may recover afterwards.
        every: of the catalogue's asks, each so-many-th is used.
    """

    seconds: float
    seed: int
    schedule: Schedule
    num_clients: int = 6
    every: int = 1
    whole: Counts = WHOLE


def configuration(whole: Counts) -> dict[str, Any]:
    """cluster.yaml: every expert in two groups, what hangs is killed after HANG_S, the rest as it comes."""
    config = json.loads((checkpoint_path() / "config.json").read_text())
    return {
        "attention": {"num_shards": whole.shards},
        "experts": {"num_groups": whole.groups, "num_redundant": config["n_routed_experts"], "min_copies": 2},
        "health": {"hang_s": HANG_S},
        "ingress": {"num_replicas": whole.ingresses},
    }


def run(plan: Plan, say: Say = print) -> Findings:
    """Everything; raises only if there is no cluster to begin with."""
    golden = json.loads((checkpoint_path() / "golden.json").read_text())
    asks = [ask for number, ask in enumerate(catalogue(golden, plan.seed)) if ask.flows or number % plan.every == 0]
    with cluster(configuration(plan.whole), up_prefix=own_shm()) as running, connected(running) as watcher:
        say(f"cluster is up after {running.up_seconds:.0f} s; {len(asks)} asks, seed {plan.seed}")
        wait_until_whole(watcher, plan.whole)
        right = reference(asks, running.endpoints, plan.num_clients)
        say("fault-free answers are known")
        context = Context(running, watcher, random.Random(plan.seed), checkpoint_path(), plan.whole, shm_of(running))
        load = Load(asks, running.endpoints, plan.num_clients, plan.seed)
        load.start()
        try:
            time.sleep(3)
            events = inject_all(plan, context, say)
            time.sleep(2)
        finally:
            load.stop()
        failures, quiet_stall_s = attribute(events, load.outcomes, lambda outcome: what_is_wrong(outcome, right))
        return Findings(plan.seed, events, len(load.outcomes), failures, quiet_stall_s)


def inject_all(plan: Plan, context: Context, say: Say) -> list[Event]:
    """One fault after the other until the time is used up, or one that the cluster does not get over."""
    events: list[Event] = []
    ends = time.monotonic() + plan.seconds
    for planned in plan.schedule:
        if time.monotonic() >= ends:
            break
        event = inject(planned, context)
        say(_told(event))
        events.append(event)
        if event.recovered_s is None and not event.skipped:
            say(f"not whole within {RECOVERY_S:g} s: {summary(context.watcher.state)}")
            break
    return events


def inject(planned: Planned, context: Context) -> Event:
    """One fault, watched until the cluster is whole again."""
    time.sleep(planned.pause_s)
    event, watcher = Event(planned.name, planned.seed), context.watcher
    context.rng = random.Random(planned.seed)
    before = signs(watcher.state)
    event.began = event.ended = time.monotonic()
    noticed: list[float] = []

    def notice(now: float, state: dict[str, Any]) -> None:
        if not noticed and signs(state) != before:
            noticed.append(now)

    forget = watcher.listen(notice)
    try:
        harm = FAULTS[planned.name](context)
        event.what, event.cuts_clients = harm.what, harm.cuts_clients
        event.began = event.injected = harm.began or event.began
        # A state from before the harm has done its work would look whole.
        watcher.wait(lambda _: bool(noticed), RECOVERY_S if harm.beyond_repair else UNNOTICED_S)
        if watcher.wait(lambda state: is_whole(state, context.whole, harm.beyond_repair), RECOVERY_S):
            event.recovered_s = time.monotonic() - event.began
    except (CannotInject, OSError) as error:
        event.skipped = str(error)
    finally:
        forget()
        if noticed:
            event.noticed_s = max(0.0, noticed[0] - event.began)
        event.ended = time.monotonic()
    return event


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
