"""All topologies in one table: what each can do within the goals, what it costs, and which one to take.

Each is filled with as many requests as memory and goals allow. In the steady state a shard with `batch` requests
computes prompts for a share `prefill` of its time and decodes for the rest, so that

    requests/s = batch / (output x step + batch x prompt's time)
    TPOT       = step / (1 - prefill)
    TTFT       = half a step + prompt's time, and its wait for other prompts (M/D/1)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moeray.planning.memory import STEP_TOKENS, RoleMemory, group_memory, kv_bytes, shard_memory
from moeray.planning.spec import Task
from moeray.planning.step import Machines, StepTime, Work, step_time
from moeray.planning.topology import KindName, Topology

MOST_REQUESTS = 1024
"""Of one shard."""
FINE = 1.15
"""Batches are tried in such steps."""
TIE = 0.03
"""Within so much of the cheapest, the simpler of two topologies is taken."""
SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Per million tokens, in the currency of the price; `mean` of all tokens, prompts' and answers'."""

    mean: float
    input: float
    cached_input: float
    output: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """One topology at the batch that makes its tokens cheapest within the goals.

    Attributes:
        replicas: of the topology, for the workload's rate; 1 if it has none.
        batch: requests beside each other in one shard (split, data) or in the engine (tensor).
        requests_per_s, output_per_s: of one replica, the latter in tokens per device.
        why_not: it cannot be taken: the goal that it misses, or memory.
    """

    topology: Topology
    replicas: int = 0
    batch: int = 0
    step: StepTime | None = None
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    prefill: float = 0.0
    requests_per_s: float = 0.0
    output_per_s: float = 0.0
    cost: Cost | None = None
    memory: tuple[RoleMemory, ...] = ()
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Attributes:
    candidates: those that can be taken, cheapest first, then the others.
    best: the one to take; None: there is none.
    verdict: in plain sentences.
    """

    candidates: tuple[Candidate, ...]
    best: Candidate | None
    verdict: str


def plan(task: Task) -> Plan:
    """See module docstring. What moeray serves is recommended, plain expert parallelism where it is as cheap."""
    found = [evaluate(task, each) for each in topologies(task)]
    taken = sorted((each for each in found if each.cost is not None), key=_cheapness)
    candidates = (*taken, *(each for each in found if each.cost is None))
    servable = [each for each in taken if each.topology.kind != "data"]
    best = _simplest(servable) if servable else None
    return Plan(candidates, best, verdict(task, candidates, best))


def topologies(task: Task) -> Iterator[Topology]:
    """Plain expert parallelism on 1, 2, 4, ... devices, and shards beside groups, in all ratios of such numbers.

    `data` is not served by moeray (`experts.num_groups: 0` is one engine, and its attention tensor parallel): it is in
    the table because it is what splitting must be compared with.
    """
    shape, can_join = task.shape, task.attention.name != "CPU"  # vLLM's CPU kernels know no expert parallelism
    for ranks in _sizes(task.most):
        if ranks == 1 or (can_join and ranks <= min(a.heads for a in shape.attention)):
            yield Topology("tensor", ranks)
        if can_join and 1 < ranks <= shape.experts:
            yield Topology("data", ranks)
    for groups in _sizes(min(task.most - 1, shape.experts)):
        for shards in _sizes(task.most - groups):
            yield Topology("split", shards, groups)


def _sizes(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, ..."""
    size = 1
    while size <= most:
        yield size
        if size >= 2 and size * 3 // 2 <= most:
            yield size * 3 // 2
        size *= 2


def evaluate(task: Task, topology: Topology) -> Candidate:
    """The batch whose tokens are cheapest among those within the goals and in memory."""
    memory = _memory(task, topology)
    for role in memory:
        if role.requests < 0:
            return Candidate(topology, memory=memory, why_not=f"{role.role}: weights do not fit")
    most = memory[0].requests
    if most < 1:
        return Candidate(topology, memory=memory, why_not="KV of one request does not fit")
    timed = _Timed(task, topology)
    within = best = None
    for batch in _batches(min(most, MOST_REQUESTS)):
        within = timed.at(batch)
        if within.why_not:
            break
        if best is None or _price(within) < _price(best):
            best = within
    return replace(best or within or Candidate(topology), memory=memory)


def _batches(most: int) -> Iterator[int]:
    batch = 1
    while batch < most:
        yield batch
        batch = max(batch + 1, int(batch * FINE))
    yield most


def _price(candidate: Candidate) -> float:
    return candidate.cost.mean if candidate.cost else float("inf")


def _cheapness(candidate: Candidate) -> tuple[float, int]:
    return (_price(candidate), candidate.topology.devices)


def _simplest(candidates: list[Candidate]) -> Candidate:
    """Plain expert parallelism if it is as cheap as the cheapest, or nearly."""
    cheapest = candidates[0]
    plain = [
        each for each in candidates if each.topology.kind == "tensor" and _price(each) <= _price(cheapest) * (1 + TIE)
    ]
    return plain[0] if plain else cheapest


def _memory(task: Task, topology: Topology) -> tuple[RoleMemory, ...]:
    shard = shard_memory(task.shape, task.formats, task.attention, topology, task.context)
    if topology.kind != "split":
        return (shard,)
    return (shard, group_memory(task.shape, task.formats, task.experts, topology))


class _Timed:
    """One topology's times; the prompt's do not depend on the batch."""

    def __init__(self, task: Task, topology: Topology) -> None:
        self._task, self._topology = task, topology
        self._machines = Machines(task.attention, task.experts, task.efficiency, task.shared_cores)
        computed = max(1.0, task.workload.prompt * (1 - task.workload.cached))
        chunk = min(computed, STEP_TOKENS)
        self._computed = computed
        self._prompt_s = computed / chunk * self._step(Work(chunk, task.workload.prompt // 2, True)).total / 1e6

    def _step(self, work: Work) -> StepTime:
        return step_time(self._task.shape, self._task.formats, self._topology, self._machines, work)

    def at(self, batch: int) -> Candidate:
        """With so many requests in each shard; `why_not` names the goal that is missed."""
        task, topology = self._task, self._topology
        output, prompt_s = task.workload.output, self._prompt_s
        step = self._step(Work(batch, task.context))
        step_s = step.total / 1e6
        engines = 1 if topology.kind == "tensor" else topology.attention
        each_per_s = batch / (output * step_s + batch * prompt_s)
        prefill = each_per_s * prompt_s
        tpot_s = step_s / (1 - prefill)
        ttft_s = step_s / 2 + prompt_s * (1 + prefill / (2 * (1 - prefill)))
        per_s = each_per_s * engines
        found = Candidate(
            topology, _replicas(task, per_s), batch, step, ttft_s, tpot_s, prefill, per_s,
            per_s * output / topology.devices, self._cost(_used(task, per_s), prefill),
        )  # fmt: skip
        goals = task.goals
        if tpot_s > goals.tpot_s:
            return replace(found, cost=None, why_not=f"TPOT {1e3 * tpot_s:.0f} ms > {1e3 * goals.tpot_s:.0f}")
        if ttft_s > goals.ttft_s:
            return replace(found, cost=None, why_not=f"TTFT {ttft_s:.2f} s > {goals.ttft_s:g}")
        return found

    def _cost(self, per_s: float, prefill: float) -> Cost:
        """Time of the devices by what it was spent on; a cached token's is that of fetching its KV from the host."""
        task, workload = self._task, self._task.workload
        price = self._topology.attention * task.attention.price
        price += self._topology.groups * task.experts.price
        a_request = price / SECONDS / per_s
        computed = self._computed
        whole = a_request / (workload.prompt + workload.output)
        return Cost(
            mean=1e6 * whole,
            input=1e6 * a_request * prefill / computed,
            cached_input=1e6 * task.attention.price / SECONDS * fetch_s(task),
            output=1e6 * a_request * (1 - prefill) / workload.output,
        )


def fetch_s(task: Task) -> float:
    """Of one cached token's KV, at the far link's bandwidth, at which a shared cache is read."""
    per_token = kv_bytes(task.shape, task.formats, task.context) / max(1, task.context)
    return per_token / (task.attention.far * task.efficiency.link)


def _replicas(task: Task, per_s: float) -> int:
    rate = task.workload.rate
    return 1 if rate is None else max(1, -int(-rate // per_s))


def _used(task: Task, per_s: float) -> float:
    """Requests/s that one of the replicas gets: whoever has room for more pays for it."""
    rate = task.workload.rate
    return per_s if rate is None else min(per_s, rate / _replicas(task, per_s))


def verdict(task: Task, candidates: tuple[Candidate, ...], best: Candidate | None) -> str:
    """Who wins, by how much, and why."""
    if best is None:
        reasons = sorted({each.why_not for each in candidates if each.why_not}, key=len)
        return f"Nothing up to {task.most} devices serves this: " + "; ".join(reasons[:3]) + "."
    split, joined = _first(candidates, "split"), (_first(candidates, "tensor"), _first(candidates, "data"))
    plain = min((each for each in joined if each is not None), key=_price, default=None)
    if split is None or plain is None:
        only = "Only plain expert parallelism" if split is None else "Only attention and experts apart"
        return f"{only} meets the goals in memory: take {best.topology.name}."
    ratio = _price(plain) / _price(split)
    if ratio > 1 + TIE:
        text = (
            f"Split: {split.topology.name} is {100 * (ratio - 1):.0f} % cheaper per token than the best plain expert "
        )
        return text + f"parallelism ({plain.topology.name}); its steps are bound by {_bound(split)}."
    text = f"Plain expert parallelism wins: {plain.topology.name} costs {100 * ratio:.0f} % of the best split "
    text += f"({split.topology.name}), whose steps are bound by {_bound(split)}: {_why_plain(split)}."
    if plain.topology.kind == "data":
        text += " moeray does not serve attention in data parallel below expert parallelism (vLLM and SGLang do); "
        text += f"of what it serves, take {best.topology.name}, {_price(best) / _price(plain):.2f} x the cost."
    return text


def _first(candidates: tuple[Candidate, ...], kind: KindName) -> Candidate | None:
    return next((each for each in candidates if each.topology.kind == kind and each.cost is not None), None)


def _bound(candidate: Candidate) -> str:
    return candidate.step.bound if candidate.step else "memory"


def _why_plain(split: Candidate) -> str:
    """The dead zone of a split, in words."""
    if split.step is None:
        return "it does not fit"
    if split.step.hop > max(split.step.attention, split.step.experts):
        return "the way to the experts takes longer than either side computes, which nothing hides"
    idle = "groups" if split.step.attention + split.step.shared > split.step.experts else "shards"
    return f"{idle} wait while the others compute, and the devices that wait cost as much"
