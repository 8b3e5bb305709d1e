"""From what the controller says to what this group holds and serves; knows neither Ray nor where weights come from.

A group begins with nothing. Each view names generations: one in force, perhaps one proposed, older ones that shards
still use. The group holds the experts that it has in any of these, and serves exactly these. What a new one needs is
read while the others are served; what none needs any more is released.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from moeray.membership import View
from moeray.placement import Placement

logger = logging.getLogger(__name__)

ExpertsPerLayer = Mapping[int, Collection[int]]
RETRY_S = 0.5
"""After the controller did not answer."""
MAX_RETRY_S = 30.0
MAX_ATTEMPTS = 4
"""To load, while nothing is served; whoever serves something goes on trying."""
NICENESS = 10
"""More than the rest of the process, of a thread that loads while calls are served. Measured on one core that serving
keeps two thirds busy: with it a call's p95 stays what it is without loading (2 ms), without it becomes 6 ms. With 19 a
third busy process on that core all but stops the loading (2 MB/s), and with it calls, which need Python's lock that the
loader holds (0.7 s)."""


class LoadFailed(RuntimeError):
    """This group cannot load its experts, and serves none: the reason."""


class _Superseded(Exception):
    """A newer view wants something else."""


class Member(Protocol):
    """What is asked of the controller; see `moeray.controller.member.ClusterMember`."""

    async def placement(self, generation: int) -> dict[str, Any] | None: ...
    async def prepared(self, generation: int) -> None: ...


class Experts(Protocol):
    """Weights that come and go; see `moeray.deepseek_v4.RoutedExperts`."""

    @property
    def held(self) -> dict[int, tuple[int, ...]]: ...
    def hold(self, experts_per_layer: ExpertsPerLayer, on_progress: Callable[[int, int], None]) -> None: ...
    def release(self, experts_per_layer: ExpertsPerLayer) -> None: ...


class Server(Protocol):
    """See `moeray.transport.GroupServer`."""

    def serve_generations(self, positions: Mapping[int, int]) -> None: ...


@dataclass(frozen=True, slots=True)
class Part:
    """What this group is in one generation.

    Attributes:
        position: its number there.
        experts: model layer -> logical experts.
        num_copies: of the experts of the first layer, those that a group before it holds too.
    """

    position: int
    experts: Mapping[int, tuple[int, ...]]
    num_copies: int


def part_of(placement: Placement, position: int, layers: Sequence[int]) -> Part:
    """Of one placement; `layers` are those that have routed experts."""
    return Part(
        position=position,
        experts={layer: placement.experts_of_group(position, layer) for layer in layers},
        num_copies=len(placement.copies_in_group(position, layers[0])),
    )


def generations_of(view: View, id: str) -> dict[int, int]:
    """Generations that the view says this group is part of, and its position in each."""
    named = ((view.generation, view.groups), (view.proposed, view.proposed_groups))
    return {number: groups.index(id) for number, groups in named if number and id in groups}


def wanted_generations(view: View, id: str, known: Collection[int], in_force: int) -> frozenset[int]:
    """The generations whose experts this group must hold now.

    Args:
        known: those that it was asked for before. One that is older than the view's and newer than what every shard
            has left behind may be used still; one that is neither was withdrawn.
        in_force: the newest that was in force in any view. A controller that lost its memory shows an older one, and
            ends nothing until it has a newer one.
    """
    if view.generation >= in_force:
        known = [number for number in known if view.oldest <= number <= view.generation]
    return frozenset({*generations_of(view, id), *known})


def union(parts: Collection[Part]) -> dict[int, tuple[int, ...]]:
    """Model layer -> experts that any of these needs, ascending."""
    layers = sorted({layer for part in parts for layer in part.experts})
    return {
        layer: tuple(sorted({expert for part in parts for expert in part.experts.get(layer, ())})) for layer in layers
    }


class GenerationFollower:
    """Brings weights and server to what the newest view asks for.

    Attributes:
        stage: for people: what is being loaded, or why it cannot be; empty when there is nothing to do.
        parts: generation -> what this group serves there.
    """

    def __init__(self, id: str, layers: Sequence[int], experts: Experts, server: Server, member: Member) -> None:
        self.stage = ""
        self.parts: Mapping[int, Part] = {}
        self._id, self._layers = id, layers
        self._experts, self._server, self._member = experts, server, member
        self._view: View | None = None
        self._changed = asyncio.Event()
        self._in_force = 0
        self._target: frozenset[int] = frozenset()
        self._superseded = threading.Event()
        self._said = (0, 0)  # which life of the controller was told that which generation is prepared
        self._failures = 0

    def see(self, view: View) -> None:
        """Go for this view from now on."""
        self._view = view
        if self._wanted(view) != self._target:
            self._superseded.set()
        self._changed.set()

    async def run(self) -> None:
        """Follow for ever.

        Raises:
            LoadFailed: nothing is served, and trying again does not help.
        """
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                with suppress(_Superseded):
                    await self._follow_newest()
        finally:
            self._superseded.set()  # a thread may be loading

    async def _follow_newest(self) -> None:
        assert self._view is not None
        try:
            await self._bring_to(self._view)
            self._failures, self.stage = 0, ""
        except _Superseded:
            raise
        except Exception as error:  # whatever it was, what is served goes on, and a later attempt may succeed
            self._failures += 1
            self.stage = f"cannot load experts: {error}"
            logger.exception("expert group %s: attempt %d", self._id, self._failures)
            if not self.parts and self._failures >= MAX_ATTEMPTS:
                raise LoadFailed(str(error)) from error
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(MAX_RETRY_S, RETRY_S * 2**self._failures))
            self._changed.set()

    def _wanted(self, view: View) -> frozenset[int]:
        return wanted_generations(view, self._id, self.parts, self._in_force)

    async def _bring_to(self, view: View) -> None:
        self._superseded.clear()
        self._target = self._wanted(view)
        self._in_force = max(self._in_force, view.generation)
        self._serve({number: part for number, part in self.parts.items() if number in self._target})
        parts = dict(self.parts)
        for number, position in generations_of(view, self._id).items():
            if number not in parts:
                placement = await self._member.placement(number)
                if placement is not None:  # else it was withdrawn, which a later view tells
                    parts[number] = part_of(Placement.from_json(placement), position, self._layers)
        await self._load(union(parts.values()))
        self._serve(parts)
        if view.proposed in parts and self._said != (view.epoch, view.proposed):
            await self._member.prepared(view.proposed)
            self._said = (view.epoch, view.proposed)

    def _serve(self, parts: Mapping[int, Part]) -> None:
        if parts != self.parts:
            self.parts = parts
            self._server.serve_generations({number: part.position for number, part in parts.items()})

    async def _load(self, wanted: ExpertsPerLayer) -> None:
        """Hold exactly these.

        Raises:
            _Superseded: a newer view wants others; what was read until then is held.
        """
        held = self._experts.held
        if held == {layer: experts for layer, experts in wanted.items() if experts}:
            return

        def load() -> None:
            self._experts.release(wanted)
            self._experts.hold(wanted, self._on_progress)

        pool = ThreadPoolExecutor(1, "moeray-load", initializer=_be_nice if self.parts else _be_counted)
        try:
            await asyncio.get_running_loop().run_in_executor(pool, load)
        finally:
            pool.shutdown(wait=False)
        self.stage = ""

    def _on_progress(self, bytes_read: int, bytes_total: int) -> None:
        self.stage = f"loading experts: {bytes_read / 2**20:.0f} of {bytes_total / 2**20:.0f} MiB"
        if self._superseded.is_set():
            raise _Superseded


def _be_counted() -> None:
    """OpenMP counts threads per thread: without this call torch's operations here would use as many as there are
    cores, not what the process has set.
    """
    import torch

    torch.get_num_threads()


def _be_nice() -> None:
    """Let threads that serve go first, for as long as this thread lives."""
    _be_counted()
    thread = threading.get_native_id()
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)
