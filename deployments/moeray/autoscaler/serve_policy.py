"""Ray Serve's application-level autoscaling policy of a moeray cluster.

Serve's controller makes one of these (`autoscaling_policy` of the application) and calls it in each turn of its loop,
some times a second, in its own thread: nothing here waits for anybody.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from time import monotonic, time
from typing import Any

from moeray.autoscaler.observing import Context, observed
from moeray.autoscaler.settings import POOLS, policy_settings
from moeray.autoscaling import Decision, Memory, Wanted, decide
from moeray.config import parse_config

logger = logging.getLogger("ray.serve")

EVERY_S = 1.0
"""Between two decisions; what is asked meanwhile gets the last one."""


class ServePolicy:
    """See module docstring.

    Args:
        config: the mapping of a cluster.yaml.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        checked = parse_config(dict(config))
        self._settings = policy_settings(checked)
        self._offset = timedelta(hours=checked.autoscaling.utc_offset_h)
        self._memory = Memory()
        self._decided_s = float("-inf")
        self._last: dict[str, Wanted] = {}

    def __call__(self, contexts: Mapping[Any, Context]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Deployment -> its number of replicas; Serve keeps no state for this policy."""
        pools = {POOLS[key.name]: (key, context) for key, context in contexts.items() if key.name in POOLS}
        if "attention" not in pools or "ingress" not in pools:
            return {}, {}
        if monotonic() - self._decided_s >= EVERY_S:
            self._decided_s = monotonic()
            self._note(self._decide({pool: context for pool, (_, context) in pools.items()}))
        return {key: self._last[pool].count for pool, (key, _) in pools.items() if pool in self._last}, {}

    def _decide(self, pools: Mapping[str, Context]) -> Decision:
        local = datetime.now(UTC) + self._offset
        seen = observed(
            pools["attention"], pools.get("experts"), pools["ingress"],
            now_s=monotonic(), time_s=time(), hour=local.hour + local.minute / 60,
        )  # fmt: skip
        self._memory, decision = decide(self._settings, self._memory, seen)
        return decision

    def _note(self, decision: Decision) -> None:
        wanted = {"attention": decision.shards}
        if decision.groups is not None:
            wanted["experts"] = decision.groups
        for pool, now in wanted.items():
            before = self._last.get(pool)
            if before is None or before.count != now.count:
                logger.info("autoscaling, %s: %s", pool, now.reason)
        self._last = wanted
