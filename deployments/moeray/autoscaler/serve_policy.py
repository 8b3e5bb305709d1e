"""Ray Serve's application-level autoscaling policy of a moeray cluster.

Serve's controller makes one of these (`autoscaling_policy` of the application) and calls it in each turn of its loop,
some times a second, in its own thread: nothing here waits for anybody.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from time import monotonic, time
from typing import Any

from moeray.autoscaler.observing import Context, observed
from moeray.autoscaler.settings import POOLS, PUSH_S, policy_settings
from moeray.autoscaling import Decision, Memory, Wanted, decide
from moeray.config import parse_config
from moeray.membership import MembershipError, Role

logger = logging.getLogger("ray.serve")

STALE_PUSHES = 3
"""Numbers that a replica has not renewed for so many of Serve's intervals are not believed."""
TELL_S = 5.0
EVERY_S = 1.0
"""Between two decisions; what is asked meanwhile gets the last one."""


def hold(context: Any) -> tuple[int, dict[str, Any]]:
    """A deployment's own policy, for an application that has none: the number stays."""
    return context.target_num_replicas, {}


class ServePolicy:
    """See module docstring.

    Args:
        config: the mapping of a cluster.yaml.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        checked = parse_config(dict(config))
        self._settings = replace(policy_settings(checked), stale_s=STALE_PUSHES * PUSH_S + EVERY_S)
        self._offset = timedelta(hours=checked.autoscaling.utc_offset_h)
        self._memory = Memory()
        self._decided_s = float("-inf")
        self._last: dict[str, Wanted] = {}
        self._telling = ThreadPoolExecutor(1, "moeray-autoscaler")  # Serve's loop must not wait for our controller
        self._told: Future[None] | None = None

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
        changed = {pool for pool, now in wanted.items() if self._last.get(pool) != now}
        self._last = wanted
        if changed and (self._told is None or self._told.done()):
            self._told = self._telling.submit(_tell, wanted)


def _tell(wanted: Mapping[str, Wanted]) -> None:
    """Our controller: how many groups to wait for, and what `moeray status` shows."""
    import ray

    from moeray.controller.actor import controller

    try:
        actor = controller()
        if "experts" in wanted:
            ray.get(actor.scale.remote(Role.EXPERT_GROUP, wanted["experts"].count), timeout=TELL_S)
        reasons = {pool: asdict(each) for pool, each in wanted.items()}
        ray.get(actor.note_scaling.remote(reasons), timeout=TELL_S)
    except (ray.exceptions.RayError, ValueError, MembershipError) as error:
        logger.warning("autoscaling: the controller was not told (%s)", type(error).__name__)
