"""The cluster's own numbers, shown by every ingress: the controller has no port that Prometheus could know beforehand.

It may run on any node, and another one after it was lost. Whoever adds up what several ingresses show counts these once
(`max`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import ray

from moeray.telemetry import Sample

ASK_S = 1.0
OLD_S = 10.0
"""Numbers of a controller that has not answered for so long are not shown."""


class ControllerMirror:
    """`run` asks; `samples` may be called by any thread."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller
        self._seen: tuple[float, list[Sample]] = (float("-inf"), [])

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with contextlib.suppress(ray.exceptions.RayError):  # it is being started again; what is old is not shown
                self._seen = time.monotonic(), await self._controller.samples.remote()
            await asyncio.sleep(ASK_S)

    def samples(self) -> Iterator[Sample]:
        """The last answer, while it is not old."""
        at, samples = self._seen
        if time.monotonic() - at < OLD_S:
            yield from samples
