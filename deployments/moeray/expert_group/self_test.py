"""After a call that failed: can this group still compute, or was it the call?

Only the group itself can tell where no other one holds its experts. It computes rows of its own with each expert of
that layer; a device that is broken, or weights that give NaN, fail at that, too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import torch

from moeray.transport import ExpertCompute, ModelIdentity

logger = logging.getLogger(__name__)

OUT_OF_MEMORY_TRIES, OUT_OF_MEMORY_S = 3, 1.0
"""Calls of several shards may take a device's memory together; that passes."""

Held = Callable[[], dict[int, tuple[int, ...]]]


class SelfTest:
    """Of one group. Thread-safe; calls that fail while a test runs start no other."""

    def __init__(
        self, compute: ExpertCompute, held: Held, identity: ModelIdentity, device: torch.device,
        on_broken: Callable[[Exception], None],
    ) -> None:  # fmt: skip
        """Nothing is computed yet.

        Args:
            compute: the experts'.
            held: layer -> the experts that are there now.
            on_broken: called in a thread of its own, each time the test fails.
        """
        self._compute, self._held, self._identity, self._device = compute, held, identity, device
        self._on_broken = on_broken
        self._running = threading.Lock()

    def after_failure(self, layer: int) -> None:
        """A call of this layer failed: test it, in a thread beside the calls."""
        if self._running.acquire(blocking=False):
            threading.Thread(target=self._run, args=(layer,), name="moeray-self-test", daemon=True).start()

    def _run(self, layer: int) -> None:
        experts: tuple[int, ...] = ()
        try:
            experts = self._held().get(layer, ())
            for tries_left in range(OUT_OF_MEMORY_TRIES - 1, -1, -1):
                try:
                    self._test(layer, experts)
                    break
                except torch.OutOfMemoryError:
                    if not tries_left:
                        raise
                time.sleep(OUT_OF_MEMORY_S)
        except Exception as error:  # noqa: BLE001 whatever it is, a call would meet it, too
            if self._held().get(layer, ()) == experts:  # else they were released meanwhile
                logger.error("layer %d: the group fails at rows of its own: %s", layer, error)
                self._on_broken(error)
        else:
            logger.warning("layer %d: a call failed, rows of the group's own do not", layer)
        finally:
            self._running.release()

    def _test(self, layer: int, experts: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(layer)
        x_TD = torch.randn(len(experts), self._identity.hidden_size, generator=generator)
        x_TD = x_TD.to(device=self._device, dtype=getattr(torch, self._identity.dtype))
        ids_TK = torch.full((len(experts), self._identity.top_k), -1, dtype=torch.int32)
        ids_TK[:, 0] = torch.tensor(experts, dtype=torch.int32)
        self._compute(layer, x_TD, ids_TK.to(self._device))
