"""Times of a cluster that decodes, and the `Efficiency` that explains them.

Found by coordinate descent over the logarithms of the numbers: every prediction is that of `step_time`, so what is
calibrated is what plans. Two of them cannot be told apart by one model: `step_us` stays 0, and a step's fixed cost is
in `layer_us`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from moeray.planning.efficiency import Efficiency
from moeray.planning.formats import Formats
from moeray.planning.hardware import Hardware
from moeray.planning.shape import ModelShape
from moeray.planning.step import Machines, StepTime, Work, step_time
from moeray.planning.topology import Topology

START = Efficiency(
    attention_flops=0.1, attention_bandwidth=1.0, expert_flops=0.1, expert_bandwidth=1.0, link=1.0, layer_us=300.0,
    expert_us=30.0, hop_us=50.0, token_us=2.0, message_us=10.0, step_us=0.0, split_us=0.0, imbalance=1.0, latency=1.0,
    interference=0.1,
)  # fmt: skip
OWN = ("layer_us", "attention_flops")
EXPERTS = ("expert_us", "expert_flops", "expert_bandwidth")
HOP = ("hop_us", "token_us")
SPLIT_US = 300.0
"""Where the search for it begins, if experts were inside somewhere, too."""
BESIDE = ("interference",)
"""Found where there were more processes than cores."""
STEPS = (4.0, 2.0, 1.3, 1.1, 1.03, 1.01)
"""Factors by which a number is changed, the largest first."""
ROUNDS = 40


@dataclass(frozen=True, slots=True)
class Measured:
    """One batch of one topology in the steady state; microseconds.

    Attributes:
        tokens: of a step of one shard.
        context: of each.
        step: from one step to the next.
        call: of one layer call at the shard, from dispatch to the sum; 0 where experts are inside.
        shared: of that, what was computed meanwhile.
        expert: of one call of one group; 0 where experts are inside.
    """

    topology: Topology
    tokens: float
    context: int
    step: float
    call: float = 0.0
    shared: float = 0.0
    expert: float = 0.0


@dataclass(frozen=True, slots=True)
class Compared:
    """A prediction beside what was measured; `error` is of the step."""

    measured: Measured
    predicted: StepTime
    is_fitted: bool

    @property
    def error(self) -> float:
        return self.predicted.total / self.measured.step - 1


@dataclass(frozen=True, slots=True)
class Setting:
    """What was measured on."""

    shape: ModelShape
    formats: Formats
    attention: Hardware
    experts: Hardware
    shared_cores: int = 0

    def predict(self, efficiency: Efficiency, measured: Measured) -> StepTime:
        """Whole steps: nothing was cut."""
        machines = Machines(self.attention, self.experts, efficiency, self.shared_cores)
        work = Work(measured.tokens, measured.context)
        return step_time(self.shape, self.formats, measured.topology, machines, work, cuts=(1,))


def calibrate(setting: Setting, found: Sequence[Measured]) -> Efficiency:
    """The numbers under which predictions are nearest to what was measured, in squares of relative errors.

    Raises:
        ValueError: less than two batches with experts apart.
    """
    split = [each for each in found if each.call]
    if len({each.tokens for each in split}) < 2:
        raise ValueError("at least two batches of a topology with expert groups are needed")
    layers = setting.shape.moe_layers

    def own(efficiency: Efficiency, each: Measured) -> float:
        predicted = setting.predict(efficiency, each)
        mine = predicted.attention + predicted.shared + predicted.head + predicted.fixed
        return mine / (each.step - layers * (each.call - each.shared)) - 1

    def experts(efficiency: Efficiency, each: Measured) -> float:
        return setting.predict(efficiency, each).experts / layers / each.expert - 1

    def whole(efficiency: Efficiency, each: Measured) -> float:
        return setting.predict(efficiency, each).total / each.step - 1

    alone = [each for each in split if each.topology.devices <= 2] or split
    efficiency = _fitted(START, OWN, own, alone)
    efficiency = _fitted(efficiency, EXPERTS, experts, [each for each in alone if each.expert])
    efficiency = _fitted(efficiency, HOP, whole, alone)
    if inside := [each for each in found if not each.call]:
        efficiency = _fitted(efficiency, ("layer_us",), whole, inside)
        efficiency = _fitted(replace(efficiency, split_us=SPLIT_US), ("split_us",), whole, alone)
    beside = [each for each in split if each.topology.devices > max(2, setting.shared_cores)]
    return _fitted(efficiency, BESIDE, whole, beside) if beside and setting.shared_cores else efficiency


def _fitted(
    start: Efficiency,
    names: Sequence[str],
    error: Callable[[Efficiency, Measured], float],
    found: Sequence[Measured],
) -> Efficiency:
    def loss(values: Mapping[str, float]) -> float:
        efficiency = replace(start, **values)
        return sum(error(efficiency, each) ** 2 for each in found)

    values = {name: float(asdict(start)[name]) for name in names}
    best = loss(values)
    for factor in STEPS:
        for _ in range(ROUNDS):
            before = best
            for name in names:
                for tried in (values[name] * factor, values[name] / factor):
                    if (now := loss(values | {name: tried})) < best:
                        values, best = values | {name: tried}, now
            if best == before:
                break
    return replace(start, **values)


def compare(
    setting: Setting, efficiency: Efficiency, found: Sequence[Measured], fitted: Sequence[Measured] = ()
) -> list[Compared]:
    """Each beside its prediction; `fitted`: those that `efficiency` was found by."""
    return [Compared(each, setting.predict(efficiency, each), each in fitted) for each in found]
