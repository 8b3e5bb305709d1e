"""The Serve replica of an expert group: holds the experts that generations give it, serves every shard that dials in.

It has no request state and may be killed at any instant: whoever takes its number loads what it held.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ray

from moeray.config import ClusterConfig
from moeray.controller.member import ClusterMember
from moeray.controller.settings import ControllerSettings
from moeray.expert_group.generations import GenerationFollower, LoadFailed
from moeray.health import Guard, guard
from moeray.membership import MembershipError, Role, View
from moeray.placement.machine import has_core_for_each

if TYPE_CHECKING:
    from collections.abc import Callable

    from moeray.deepseek_v4.scrubber import Scrubber
    from moeray.expert_group.computation import Computation

logger = logging.getLogger(__name__)

REPORT_S = 0.5
LAST_WORDS_S = 5.0
DRAIN_S = 140.0
"""So long a group that is to stop waits until no shard needs it; less than Serve leaves it (`moeray.app.DRAIN_S`)."""


class ExpertGroup:
    """Serve deployment. Its constructor returns when the port listens; experts come as the generations ask for them.

    Shards dial the port; nothing on the token's way goes through this class.
    """

    async def __init__(self, config: ClusterConfig, model: str, settings: ControllerSettings) -> None:  # type: ignore[misc]
        self._computation: Computation | None = None
        self._follower: GenerationFollower | None = None
        self._following: asyncio.Task[None] | None = None
        self._guard: Guard | None = None
        self._scrubber: Scrubber | None = None
        self._loop = asyncio.get_running_loop()
        self._may_leave = asyncio.Event()
        self._asked = time.monotonic(), 0.0
        self._member = ClusterMember(Role.EXPERT_GROUP, settings)
        await self._member.join()
        self._member.every(REPORT_S, self._report)
        may_poll = False
        if config.pin_cores and not config.experts.num_gpus:
            may_poll = has_core_for_each(config.num_compute_threads)
            await self._member.take_cores(config.experts.num_threads, config.num_threads)
        computation = await asyncio.to_thread(_start, config, model, may_poll, self._on_damage)
        self._computation = computation
        self._follower = GenerationFollower(
            self._member.id, computation.layers, computation.experts, computation.server, self._member
        )
        self._following = asyncio.create_task(self._follow_generations(self._follower))
        self._guard = guard(config.health.hang_s)
        self._scrubber = _scrubber(computation, self._on_damage)
        await self._member.identify(asdict(computation.identity))
        await self._member.ready(computation.address)
        self._member.follow(self._on_view, self._go)

    async def check_health(self) -> None:
        """Serve asks this; a group that hangs is killed by its guard, one that lies is given up by the controller."""

    async def __del__(self) -> None:
        """Serve stops this replica."""
        await self._stop()

    async def _go(self) -> None:
        """This process is told to end, although its number is wanted."""
        try:
            await self._stop()
        finally:
            _exit("it was told to go")

    async def _stop(self) -> None:
        """Leave in order: the others take over first, if they can."""
        if self._computation is not None:
            await self._member.drain()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._may_leave.wait(), DRAIN_S)
        if self._following is not None:
            self._following.cancel()
        await self._member.leave()
        if self._computation is not None:
            await asyncio.to_thread(self._computation.server.stop)
        for watching in (self._scrubber, self._guard):
            if watching is not None:
                await asyncio.to_thread(watching.close)

    async def _on_view(self, view: View) -> None:
        if self._member.id in view.lost:
            _exit("the controller has given it up")
        if self._member.id in view.may_leave:
            self._may_leave.set()
        assert self._follower is not None
        self._follower.see(view)

    async def _follow_generations(self, follower: GenerationFollower) -> None:
        try:
            await follower.run()
        except LoadFailed as error:
            await self._give_up(str(error))

    def _on_damage(self, error: Exception) -> None:
        """Called by the scrubber or a self-test, in its thread: what is held, or what computes with it, is broken."""
        asyncio.run_coroutine_threadsafe(self._give_up(str(error)), self._loop)

    async def _give_up(self, reason: str) -> None:
        """Serve nobody any more, tell why, and end: Serve starts another."""
        if self._computation is not None:
            self._computation.server.serve_generations({})
        with suppress(ray.exceptions.RayError, MembershipError, TimeoutError):
            await asyncio.wait_for(self._member.lost(reason), LAST_WORDS_S)
        _exit(reason)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's autoscaling asks this: in what share of the time since it was asked last experts were computed."""
        if self._computation is None:
            return {}
        now_s, spent_s = time.monotonic(), self._computation.busy.spent_s
        (asked_s, before_s), self._asked = self._asked, (now_s, spent_s)
        return {"busy": min(1.0, (spent_s - before_s) / max(1e-3, now_s - asked_s))}

    async def _report(self) -> dict[str, Any]:
        if self._computation is None or self._follower is None:
            return {"stage": "starting"}
        experts, merged, parts = self._computation.experts, self._computation.merged, self._follower.parts
        tokens, held = experts.tokens(), experts.held
        stage = {"stage": self._follower.stage} if self._follower.stage else {}
        return {
            **stage,
            "experts": {
                "kernel": experts.kernel,
                "num_layers": len(held),
                "num_experts": max(map(len, held.values()), default=0),
                "num_copies": parts[max(parts)].num_copies if parts else 0,
                "generations": {number: part.position for number, part in parts.items()},
                "held": held,
                "bytes": experts.weight_bytes,
                "bytes_read": experts.bytes_read,
                "routed_tokens": int(tokens.sum()),
                "calls": self._computation.busy.calls,
                "calls_us": 1e6 * self._computation.busy.spent_s,
                "calls_per_batch": round(merged.calls_per_batch, 2) if merged else 1.0,
                "tokens_per_layer": {layer: tokens[layer].tolist() for layer in self._computation.layers},
            },
            **self._member.cores(),
        }


def _start(config: ClusterConfig, model: str, may_poll: bool, on_broken: Callable[[Exception], None]) -> Computation:
    from moeray.expert_group.computation import start_computation  # imports torch: seconds

    host = ray.util.get_node_ip_address()
    return start_computation(config, model, host=host, may_poll=may_poll, on_broken=on_broken)


def _scrubber(computation: Computation, on_damage: Callable[[Exception], None]) -> Scrubber:
    from moeray.deepseek_v4.scrubber import Scrubber

    return Scrubber(computation.experts.scrub, on_damage)


def _exit(reason: str) -> None:
    """End this process; Serve starts another."""
    logger.error("expert group in process %d ends: %s", os.getpid(), reason)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(1)
