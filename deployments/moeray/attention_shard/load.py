"""What a shard says of its load to whoever decides how many shards there are."""

from __future__ import annotations

from moeray.attention_shard.link import ShardInfo


class LoadSince:
    """Turns what a shard counts since its start into shares of the time since it was asked last."""

    def __init__(self) -> None:
        self._waited_us = self._steps_us = self._expert_wait = 0.0

    def of(self, info: ShardInfo) -> dict[str, float]:
        """The numbers of `moeray.autoscaling.ShardLoad`.

        `expert_wait` is of the steps since the last call; where there were none, it is what it was.
        """
        waited_us = info.hop.get("dispatch_us", 0.0) + info.hop.get("combine_us", 0.0)
        steps_us = info.hop.get("steps_us", 0.0)
        if (passed_us := steps_us - self._steps_us) > 0:
            self._expert_wait = min(1.0, max(0.0, waited_us - self._waited_us) / passed_us)
        self._waited_us, self._steps_us = waited_us, steps_us
        return {
            "running": info.num_running,
            "waiting": info.num_waiting,
            "max_running": info.max_running,
            "kv_use": info.kv_use,
            "expert_wait": self._expert_wait,
        }
