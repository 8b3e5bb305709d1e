"""A block store (`moeray.kv_cache`) as one of vLLM's secondary tiers.

All methods run in the scheduler and return at once; the store's own work is done by threads. Which blocks a request may
have is decided before (`kv_connector.py`): a lookup only reads the request's `Plan`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.kv_offload.base import Locality, LookupResult, Medium, RequestOffloadingContext
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from moeray.config import KvCacheConfig
from moeray.kv_cache import Breaker, StoreFailed, StoreKind, TransferCost, open_store
from moeray.vllm_hooks.kv_jobs import Load, Plan, TierCounts
from moeray.vllm_hooks.kv_settings import namespace

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec, ReqContext

logger = logging.getLogger(__name__)

MAX_QUEUED_SHARE = 0.5
"""Stores that wait may hold so much of the staging region; more are dropped, so that fetches find room. A step's
blocks that are more than that alone are kept where nothing else waits: else they would never be."""
BATCH_BLOCKS = 16
"""Blocks of one call of a store: between calls a job that has been given up ends."""
ASK, LOAD, STORE, IN_TIME = "ask", "load", "store", "in time"
"""Kinds of calls, as the breaker counts them."""


class StoreTier(SecondaryTierManager):  # type: ignore[misc, unused-ignore]
    """See module docstring. vLLM makes one of each subclass that the connector's configuration names.

    Attributes:
        kind: of store.
        cost: what fetching costs, learned from every fetch.
        counts: what was done.
        num_rows: of the staging region, a block each.
    """

    medium = Medium.CPU
    kind: ClassVar[StoreKind]

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        kv_cache: Mapping[str, Any],
        content: Mapping[str, Any],
        backpressure_detector: Any = None,
    ) -> None:
        """Arguments as of `kv_settings.transfer_config`.

        Raises:
            StoreFailed: the store cannot be used at all.
        """
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        block_bytes: int = self.block_size_bytes
        name = namespace(offloading_spec.config, block_bytes, content)
        self.store = open_store(self.kind, KvCacheConfig(**kv_cache), name, block_bytes)
        self.cost, self.breaker, self.counts = TransferCost(), Breaker(), TierCounts()
        self.last_fetch = monotonic()
        self._region = primary_kv_view.cast("B")
        self.num_rows = primary_kv_view.shape[0] if primary_kv_view.shape else 0
        self._loading = ThreadPoolExecutor(1, f"kv-{self.kind}-load")
        self._storing = ThreadPoolExecutor(1, f"kv-{self.kind}-store")
        self._loads: dict[int, Load] = {}
        self._stores: dict[int, tuple[Future[int], int]] = {}
        self._failed_at_once: list[int] = []
        self._is_asked = False

    # ---- what the connector asks

    @property
    def jobs(self) -> list[Future[Any]]:
        """Of the threads, that have not been reported."""
        stores: list[Future[Any]] = [future for future, _ in self._stores.values()]
        return [*stores, *(load.future for load in self._loads.values() if load.future)]

    def has(self, names: Sequence[bytes]) -> list[bool]:
        """Which blocks are there; none while the store is not used. Takes a round trip: not for the scheduler."""
        if not self.breaker.allows():
            return [False] * len(names)
        self._is_asked = True
        try:
            found = self.store.has(names)
        except StoreFailed as error:
            self._failed(error, ASK)
            return [False] * len(names)
        finally:
            self._is_asked = False
        self.breaker.succeeded(ASK)
        return found

    def kept_waiting(self, seconds: float) -> None:
        """A prompt gave up waiting to hear what the stores have: this one's fault if it is being asked."""
        if self._is_asked:
            self._failed(StoreFailed(f"KV store {self.store.where}: no answer within {seconds:g} s"), IN_TIME)

    def answered_in_time(self) -> None:
        if self.breaker.is_closed:
            self.breaker.succeeded(IN_TIME)

    def measure(self, names: Sequence[bytes]) -> None:
        """Fetch these blocks into nowhere, later: what it costs must be known even while nothing is fetched."""
        self.last_fetch = monotonic()
        self._loading.submit(self._measure, list(names))

    # ---- vLLM's interface

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: Any, req_context: ReqContext) -> LookupResult:
        plan = req_context.get_state(Plan)
        if plan is not None and key in plan.names.get(self.kind, ()) and monotonic() < plan.deadline:
            return LookupResult.HIT
        return LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        names, rows = list[bytes](job_metadata.keys), [int(row) for row in job_metadata.chunk_ids]
        waiting = sum(blocks for _, blocks in self._stores.values())
        is_full = waiting and waiting + len(names) > MAX_QUEUED_SHARE * self.num_rows
        if is_full or not self.breaker.allows():  # the breaker last: what it lets through must have a verdict
            self.counts.dropped_blocks += len(names)
            self._failed_at_once.append(job_metadata.job_id)
            return
        self._stores[job_metadata.job_id] = self._storing.submit(self._store, names, rows), len(names)

    def submit_load(self, job_metadata: TransferJob) -> None:
        plan = job_metadata.req_context.get_state(Plan)
        rows = [int(row) for row in job_metadata.chunk_ids]
        deadline = monotonic() if plan is None else plan.deadline
        load = Load(job_metadata.job_id, list(job_metadata.keys), rows, deadline, plan, monotonic())
        self._loads[load.job_id] = load
        load.future = self._loading.submit(self._load, load)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        for job_id in self._failed_at_once:
            yield JobResult(job_id, False)
        self._failed_at_once = []
        for job_id, (future, _) in list(self._stores.items()):
            if future.done():
                del self._stores[job_id]
                self._check(future, STORE)
                yield JobResult(job_id, future.exception() is None)
        for load in list(self._loads.values()):
            if load.future is not None and (load.future.done() or monotonic() > load.deadline):
                del self._loads[load.job_id]
                yield self._ended(load)

    def has_pending_work(self) -> bool:
        return bool(self._loads or self._stores or self._failed_at_once)

    def touch(self, keys: Collection[Any], req_context: ReqContext) -> None:
        """Nothing: a block is touched when it is fetched."""

    def drain_jobs(self) -> None:
        wait(self.jobs)

    def shutdown(self) -> None:
        self._loading.shutdown(cancel_futures=True)
        self._storing.shutdown(cancel_futures=True)
        self._region.release()
        self.store.close()

    # ---- in the threads

    def _row(self, row: int) -> memoryview:
        return self._region[row * self.block_size_bytes : (row + 1) * self.block_size_bytes]

    def _store(self, names: list[bytes], rows: list[int]) -> int:
        """Rows are pinned by vLLM until the job is reported, so a job that began is never reported before its end."""
        kept = 0
        for first in range(0, len(names), BATCH_BLOCKS):
            part = slice(first, first + BATCH_BLOCKS)
            try:
                kept += self.store.store(names[part], [self._row(row) for row in rows[part]])
            except StoreFailed as error:
                self.counts.dropped_blocks += len(names) - first
                self._failed(error, STORE)
                raise
        self.breaker.succeeded(STORE)
        self.counts.stored_blocks += kept
        return kept

    def _load(self, load: Load) -> None:
        for first in range(0, len(load.names), BATCH_BLOCKS):
            part = slice(first, first + BATCH_BLOCKS)
            names, rows = load.names[part], load.rows[part]
            try:
                for name, row, block in zip(names, rows, self.store.load(names), strict=True):
                    with load.lock:
                        if load.given_up:
                            self._observe(first + len(names), load.started)  # or it would be tried again and again
                            return
                        if block is not None:
                            self._row(row)[:] = block
                            load.loaded.append(name)
            except StoreFailed as error:
                self._failed(error, LOAD)
                return
        self.breaker.succeeded(LOAD)
        self._observe(len(load.loaded), load.started)
        if load.loaded:
            self._storing.submit(self.store.touch, load.loaded)  # the fetch has ended: nobody waits for this

    def _observe(self, num_blocks: int, started: float) -> None:
        """What fetching so many blocks cost; of none there is nothing to learn."""
        if num_blocks:
            self.cost.observe(num_blocks * self.block_size_bytes, monotonic() - started)

    def _measure(self, names: list[bytes]) -> None:
        started = monotonic()
        try:
            found = sum(block is not None for block in self.store.load(names))
        except StoreFailed as error:
            self._failed(error, LOAD)
            return
        self.breaker.succeeded(LOAD)
        self._observe(found, started)

    # ---- what came of it

    def _ended(self, load: Load) -> JobResult:
        """A fetch that is done, or that has taken too long: then nothing is written by it any more."""
        assert load.future is not None
        with load.lock:
            load.given_up = not load.future.done()
            loaded: tuple[Any, ...] = tuple(load.loaded)
        self.last_fetch = monotonic()
        if not load.given_up:
            self._check(load.future, LOAD)
        else:
            load.future.cancel()  # if it waits for another: it would only be in the way
            self.counts.given_up += 1
            self.breaker.failed(f"a fetch of {len(load.names)} blocks took longer than computing them", LOAD)
        self.counts.fetched_blocks += len(loaded)
        self.counts.fetched_bytes += len(loaded) * self.block_size_bytes
        missing = set(load.names).difference(loaded)
        self.counts.missing_blocks += len(missing)
        if load.plan is not None:
            load.plan.names[self.kind] -= missing
        return JobResult(
            load.job_id,
            not missing,
            loaded or None,
            monotonic() - load.started,
            len(loaded) * self.block_size_bytes,
        )

    def _check(self, future: Future[Any], kind: str) -> None:
        """What no store should raise must not be silent, nor repeated for ever."""
        error = future.exception()
        if error is not None and not isinstance(error, StoreFailed):
            logger.error("KV store %s: %r", self.kind, error, exc_info=error)
            self._failed(error, kind)

    def _failed(self, error: BaseException, kind: str) -> None:
        self.counts.failures += 1
        if self.breaker.failed(str(error), kind):
            logger.warning("KV store %s is not used for now: %s", self.kind, error)


class NodeTier(StoreTier):
    """This node's memory, shared by its shards."""

    kind, locality = "node", Locality.LOCAL


class RedisTier(StoreTier):
    """A Redis that all nodes share."""

    kind, locality = "redis", Locality.REMOTE
