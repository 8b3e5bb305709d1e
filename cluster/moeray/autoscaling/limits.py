"""What a person decides about scaling."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Goals:
    """The service level: 95th percentiles of the time to the first token and between later ones, seconds."""

    ttft_p95_s: float = 2.0
    tpot_p95_s: float = 0.1


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one pool.

    Attributes:
        fewest: processes by day.
        fewest_at_night: at night, see `PolicySettings.night`.
        most: processes at any time.
        step_out: processes that may be started at once; or as many as there are, if that is more.
        step_in: processes that may be stopped at once; or a tenth of what there is, if that is more.
        standby: processes beside those that the load needs: they serve at once when it grows, others must start first.
        cost: of a process, per hour, in any currency: where either pool could grow, the cheaper one does.
    """

    fewest: int = 1
    most: int = 1
    fewest_at_night: int = 1
    step_out: int = 4
    step_in: int = 1
    cost: float = 0.0
    standby: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.fewest_at_night <= self.fewest <= self.most:
            raise ValueError(
                f"1 <= fewest_at_night ({self.fewest_at_night}) <= fewest ({self.fewest}) <= most ({self.most})"
            )
        if min(self.step_out, self.step_in) < 1 or min(self.cost, self.standby) < 0:
            raise ValueError("steps are at least 1, cost and standby are not negative")


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """See `policy.decide`.

    Attributes:
        night: hours of the day from, to; may go over midnight; None: it is never night.
        full: share of its requests' places and KV that a shard may use.
        busy: share of the time that a group may compute.
        margin: below a load that was too much, this share is left free.
        most_times: a pool grows to no more than so many times its number for a goal that is missed.
        hysteresis: a pool shrinks if it would be enough for so much more than there is.
        out_s: between two decisions to grow.
        in_s: for so long fewer must have been enough, and nothing changed, before a pool shrinks.
        join_s: what a process takes to serve: so far ahead a growing load is foreseen.
        stale_s: older numbers are not believed.
        bound: share of a step's time that is waited for experts, from which on groups are what lacks; within `tie` of
            it either.
    """

    goals: Goals = field(default_factory=Goals)
    shards: Limits = field(default_factory=Limits)
    groups: Limits | None = None
    night: tuple[float, float] | None = None
    full: float = 0.8
    busy: float = 0.7
    margin: float = 0.1
    most_times: float = 1.5
    hysteresis: float = 0.15
    out_s: float = 15.0
    in_s: float = 180.0
    join_s: float = 60.0
    stale_s: float = 10.0
    bound: float = 0.5
    tie: float = 0.1

    def is_night(self, hour: float) -> bool:
        """Whether the lower number holds."""
        if self.night is None:
            return False
        begin, end = self.night
        return begin <= hour < end if begin <= end else hour >= begin or hour < end
