"""Which cores a compute process runs on: one compute thread per core, near one memory, nobody's threads on another's.

Processes come one by one, in any order and on any node, so each takes its cores from what those before it on the same
machine left (`take_cores`). Machines are told apart by their running kernel, not by their Ray node: several containers
of one machine then do not all begin at core 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice


@dataclass(frozen=True, slots=True, order=True)
class Cpu:
    """One logical CPU.

    Attributes:
        number: the kernel's.
        core: number of the first logical CPU of its physical core: equal for SMT siblings.
        numa_node: where its near memory is.
    """

    number: int
    core: int
    numa_node: int = 0


@dataclass(frozen=True, slots=True)
class Machine:
    """What a process may use of its machine.

    Attributes:
        id: equal for all processes under one running kernel.
        cpus: those it may run on (its cpuset).
        quota: CPU time its control group may use, in CPUs; None is no limit.
    """

    id: str
    cpus: tuple[Cpu, ...]
    quota: float | None = None

    @property
    def num_usable(self) -> int:
        """Compute threads that can run at full speed at once: physical cores, or less by quota."""
        cores = len({cpu.core for cpu in self.cpus})
        return cores if self.quota is None else min(cores, max(1, int(self.quota)))


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one process asks for.

    Attributes:
        name: for people, such as `attention shard 0`.
        kind: processes of one kind wait for the same moments, so they share a core last.
        node: of Ray; its processes share one quota.
        num_threads: compute threads.
        has_relay: it has a part beside its compute threads that works while they do.
        cluster_threads: compute threads and relays of the whole cluster. A relay gets a core of its own only where
            all of them would fit; later processes must not find their cores taken by it.
    """

    name: str
    kind: str
    node: str
    num_threads: int
    has_relay: bool = False
    cluster_threads: int = 0


@dataclass(frozen=True, slots=True)
class CoreShare:
    """The cores of one process.

    Attributes:
        cpus: of its compute threads, one each while there are enough.
        relay: CPU of its relay; the first of `cpus` where it has none of its own.
    """

    name: str
    kind: str
    node: str
    machine: str
    num_threads: int
    cpus: tuple[Cpu, ...]
    relay: Cpu

    @property
    def cores(self) -> list[int]:
        return [cpu.number for cpu in self.cpus]

    @property
    def numa_node(self) -> int | None:
        """That of all its compute threads; None if they are on several."""
        nodes = {cpu.numa_node for cpu in self.cpus}
        return nodes.pop() if len(nodes) == 1 else None

    def threads(self) -> Iterator[Cpu]:
        """The CPU of each compute thread."""
        return islice(cycle(self.cpus), self.num_threads)


class _Load:
    """What the processes of one machine have put on its CPUs."""

    def __init__(self, shares: Sequence[CoreShare]) -> None:
        self._cpus: Counter[int] = Counter()
        self._cores: Counter[int] = Counter()
        self._kinds: Counter[tuple[int, str]] = Counter()
        self._numa_nodes: Counter[int] = Counter()
        for share in shares:
            for cpu in (*share.threads(), *([share.relay] if share.relay not in share.cpus else [])):
                self.add(cpu, share.kind)

    def add(self, cpu: Cpu, kind: str) -> None:
        self._cpus[cpu.number] += 1
        self._cores[cpu.core] += 1
        self._kinds[cpu.core, kind] += 1
        self._numa_nodes[cpu.numa_node] += 1

    def is_idle(self, cpu: Cpu) -> bool:
        return not self._cores[cpu.core]

    def order(self, cpu: Cpu, kind: str) -> tuple[int, ...]:
        """The least is taken first: an idle CPU, of an idle core, one without the same kind, the first."""
        return self._cpus[cpu.number], self._cores[cpu.core], self._kinds[cpu.core, kind], cpu.number

    def cost(self, cpus: Sequence[Cpu]) -> tuple[int, ...]:
        """The least is the best choice: shares CPUs least, then cores, then the memory of a NUMA node."""
        cores = Counter(cpu.core for cpu in cpus)
        return (
            sum(self._cpus[cpu.number] for cpu in cpus),
            sum(self._cores[cpu.core] for cpu in cpus) + sum(cores.values()) - len(cores),
            sum(self._numa_nodes[node] for node in {cpu.numa_node for cpu in cpus}),
            min(cpu.number for cpu in cpus),
        )


def take_cores(machine: Machine, wanted: Wanted, others: Iterable[CoreShare]) -> CoreShare:
    """Cores for one more process, beside those that live.

    All of them on one NUMA node if any has enough, the one where they share least. Once all CPUs are in use, or as
    many as the quota of this node allows, cores are shared.

    Args:
        others: shares of the living processes, of any machine.
    """
    here = [share for share in others if share.machine == machine.id]
    used = {cpu for share in here if share.node == wanted.node for cpu in (*share.cpus, share.relay)}
    num_new = len(machine.cpus) if machine.quota is None else max(1, int(machine.quota)) - len(used)
    numa_nodes = [[cpu for cpu in machine.cpus if cpu.numa_node == node] for node in _numa_nodes(machine)]
    choices = [_choose(cpus, wanted, here, used, num_new) for cpus in numa_nodes]
    whole = [choice for choice in choices if len(choice) == wanted.num_threads]
    # Fewer CPUs than threads is the last resort; the quota yields where all used ones lie outside of its cpuset.
    some = _choose(machine.cpus, wanted, here, used, num_new) or _choose(machine.cpus, wanted, here, used, 1)
    chosen = min(whole or [some], key=_Load(here).cost)
    share = CoreShare(
        name=wanted.name, kind=wanted.kind, node=wanted.node, machine=machine.id,
        num_threads=wanted.num_threads, cpus=tuple(sorted(chosen)), relay=chosen[0],
    )  # fmt: skip
    within_quota = len(used.union(chosen)) < len(used) + num_new
    if wanted.has_relay and within_quota and wanted.cluster_threads <= machine.num_usable:
        return replace(share, relay=_relay(machine, share, [*here, share]))
    return share


def _numa_nodes(machine: Machine) -> list[int]:
    return sorted({cpu.numa_node for cpu in machine.cpus})


def _choose(cpus: Sequence[Cpu], wanted: Wanted, here: Sequence[CoreShare], used: set[Cpu], num_new: int) -> list[Cpu]:
    """One CPU for each thread, at most `num_new` that are not `used`; fewer if there are not so many."""
    load = _Load(here)
    chosen: list[Cpu] = []
    for _ in range(wanted.num_threads):
        num_left = num_new - len(set(chosen) - used)
        candidates = [cpu for cpu in cpus if cpu not in chosen and (num_left > 0 or cpu in used)]
        if not candidates:
            break
        chosen.append(min(candidates, key=lambda cpu: load.order(cpu, wanted.kind)))
        load.add(chosen[-1], wanted.kind)
    return chosen


def _relay(machine: Machine, share: CoreShare, here: Sequence[CoreShare]) -> Cpu:
    """An idle core near the compute threads; else the first of them."""
    load = _Load(here)
    idle = [cpu for cpu in machine.cpus if load.is_idle(cpu)]
    return min(idle, key=lambda cpu: (cpu.numa_node != share.cpus[0].numa_node, cpu.number), default=share.relay)


def crowded(shares: Iterable[CoreShare]) -> list[str]:
    """One line for each machine where compute threads share physical cores: who, where, and what to change."""
    machines: dict[str, list[CoreShare]] = {}
    for share in shares:
        machines.setdefault(share.machine, []).append(share)
    return [text for here in machines.values() if (text := _crowding(here))]


def _crowding(here: Sequence[CoreShare]) -> str:
    cores: dict[int, list[str]] = {}
    for share in here:
        for cpu in share.threads():
            cores.setdefault(cpu.core, []).append(share.name)
    shared = {core: names for core, names in sorted(cores.items()) if len(names) > 1}
    if not shared:
        return ""
    nodes = ", ".join(sorted({share.node[:8] for share in here}))
    num_threads = sum(share.num_threads for share in here)
    who = "; ".join(f"core {core}: {', '.join(names)}" for core, names in shared.items())
    return (
        f"node {nodes}: {num_threads} compute threads share {len(cores)} cores, so they wait for each other ({who}); "
        "lower attention.num_shards, experts.num_groups or their num_threads, or give this node more cores"
    )
