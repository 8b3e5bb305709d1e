"""The part of cluster.yaml about numbers of processes that follow the load."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from moeray.config.fields import FROM_FILE, Count, CountOrZero, Seconds, SecondsOrZero, Share

Part = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Hour = Annotated[float, Field(ge=0, le=24, allow_inf_nan=False)]


@dataclass(frozen=True, config=FROM_FILE)
class PoolScalingConfig:
    """One pool. It begins with the number that the pool itself says.

    Attributes:
        fewest: processes by day.
        most: processes at any time; 0: the pool is not scaled.
        fewest_at_night: processes at night, see `AutoscalingConfig.night`.
        step_out, step_in: processes that may be started, or stopped, at once; a pool may double, or lose a tenth.
        standby: processes beside those that the load needs, which serve at once when it grows.
        cost_per_hour: of a process, in any currency: where either pool could grow, the cheaper one does.
    """

    fewest: Count = 1
    most: CountOrZero = 0
    fewest_at_night: Count = 1
    step_out: Count = 4
    step_in: Count = 1
    standby: CountOrZero = 0
    cost_per_hour: Share = 0.0


@dataclass(frozen=True, config=FROM_FILE)
class AutoscalingConfig:
    """Shards and groups by service level; on where a pool may have more than one number (`most`).

    Attributes:
        ttft_p95_s: goal: the time to the first token that 95 of 100 requests do not exceed.
        tpot_p95_s: goal: the same of the time between later tokens.
        night: hours of the day, from and to; without it, it is never night.
        utc_offset_h: of the clock that `night` means.
        out_s: at least so long between two decisions to grow.
        in_s: a pool shrinks when fewer have been enough for so long.
        full: share of its places for requests, and of its KV cache, that a shard may use.
        busy: share of the time that a group may compute.
        join_s: what a process takes to serve; a growing load is foreseen so far.
    """

    ttft_p95_s: Seconds = 2.0
    tpot_p95_s: Seconds = 0.1
    attention: PoolScalingConfig = Field(default_factory=PoolScalingConfig)
    experts: PoolScalingConfig = Field(default_factory=PoolScalingConfig)
    night: tuple[Hour, Hour] | None = None
    utc_offset_h: Annotated[float, Field(ge=-14, le=14, allow_inf_nan=False)] = 0.0
    out_s: SecondsOrZero = 15.0
    in_s: SecondsOrZero = 180.0
    join_s: SecondsOrZero = 60.0
    full: Part = 0.8
    busy: Part = 0.7

    @property
    def is_on(self) -> bool:
        return bool(self.attention.most or self.experts.most)

    @model_validator(mode="after")
    def _fit(self) -> Self:
        for name, pool in (("attention", self.attention), ("experts", self.experts)):
            if pool.most and not pool.fewest_at_night <= pool.fewest <= pool.most:
                raise ValueError(
                    f"autoscaling.{name}: fewest_at_night ({pool.fewest_at_night}) <= fewest ({pool.fewest}) <= most "
                    f"({pool.most}) must hold"
                )
        return self
