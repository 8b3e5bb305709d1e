"""vLLM's OffloadingConnector, asked to fetch only what is worth fetching.

For each request that is scheduled first: what do the stores have of its prompt (`Prefixes`, in a thread), what would it
cost to fetch or to compute (`choose`), and vLLM's own lookup is told how far it may go (`max_load_tokens`). What a step
costs is learned from the steps themselves.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from time import monotonic
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_offload.base import LookupResult

from moeray.kv_cache import Choice, GroupKeys, PrefillCost, Prefixes, choose, probe
from moeray.vllm_hooks.kv_jobs import Plan
from moeray.vllm_hooks.kv_tiers import StoreTier

logger = logging.getLogger(__name__)

AT_ONCE_S = 0.002
"""The scheduler itself waits so long: most stores have answered by then, and nobody waits for another step."""
PROBE_S = 0.25
"""A prompt waits so long at most to hear what the stores have; then it is computed."""
LEAST_FETCH_S = 0.05
"""A fetch is given up after what computing would have taken, but not before this: small times are predicted poorly."""
MEASURE_S = 30.0
"""A store that has what prompts need, and is found too slow, is tried again after so long."""
MEASURE_BLOCKS = 16
SETTLED_S = 1.0
"""What was decided for a prompt that waits for room on the device holds so long: asking anew would delay every step."""
REST_S = 0.001


@dataclass(slots=True)
class _Prompt:
    """A request between its arrival at the scheduler and its blocks on the device.

    Attributes:
        settled: monotonic; when vLLM was told what can be fetched. None: not yet.
        junction: how long the longest beginning is that somebody else's prompt had, too.
    """

    probing: Future[Prefixes]
    deadline: float
    chosen: Choice | None = None
    junction: int = 0
    settled: float | None = None


class KvTierConnector(OffloadingConnector):  # type: ignore[misc, unused-ignore]
    """See module docstring."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if role != KVConnectorRole.SCHEDULER:
            return
        self.cost = PrefillCost()
        self.reasons: Counter[str] = Counter()
        self.fetched_tokens = 0
        self._step_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        tiers = vllm_config.kv_transfer_config.kv_connector_extra_config["secondary_tiers"]
        self._told: dict[str, Any] = tiers[0]["kv_cache"]
        self._probing = ThreadPoolExecutor(1, "kv-probe")
        self._prompts: dict[str, _Prompt] = {}
        self._steps: deque[tuple[float, list[tuple[int, int]]]] = deque()
        self._last_end = 0.0
        self._keep_windows_of_answers()
        scheduler_connectors.append(self)

    @property
    def tiers(self) -> list[StoreTier]:
        tiers: list[StoreTier] = self._manager.secondary_tiers
        return tiers

    @property
    def _manager(self) -> Any:
        """vLLM's TieringOffloadingManager, which `KvTierSpec` makes."""
        return self.scheduler.manager

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """As vLLM's: None is "ask again", which it is until stores have answered and blocks have come."""
        if request.skip_reading_prefix_cache or not self.tiers:
            return super().get_num_new_matched_tokens(request, num_computed_tokens)
        status = self.scheduler._req_status[request.request_id]
        prompt = self._prompts.get(request.request_id)
        if prompt is None or (prompt.settled is not None and monotonic() > prompt.settled + SETTLED_S):
            is_first = all(question.done() for question in self._questions())
            prompt = self._begin(request, status, num_computed_tokens)
            if is_first:  # one thread asks: behind another prompt's question there is nothing to hear at once
                wait([prompt.probing], AT_ONCE_S)
        if prompt.chosen is None:
            if not prompt.probing.done() and monotonic() < prompt.deadline:
                return None, False
            self._choose(request, status, prompt, num_computed_tokens)
        # Somebody's prompt began like this one. If no window was left there, this one leaves it for all that come.
        request.shared_prefix_boundary = max(request.shared_prefix_boundary, prompt.junction)
        found = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if found[0] is not None and prompt.settled is None:
            prompt.settled = monotonic()
        return found

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        prompt = self._prompts.pop(request.request_id, None)
        if prompt is not None and prompt.chosen is not None:
            self.reasons[prompt.chosen.reason] += 1
            self.fetched_tokens += num_external_tokens
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._prompts.pop(request.request_id, None)
        return super().request_finished(request, block_ids)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._prompts.pop(request.request_id, None)
        return super().request_finished_all_groups(request, block_ids)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        spans = [(request.num_computed_tokens, request.req_id) for request in scheduler_output.scheduled_new_reqs]
        cached = scheduler_output.scheduled_cached_reqs
        spans.extend(zip(cached.num_computed_tokens, cached.req_ids, strict=True))
        sizes = scheduler_output.num_scheduled_tokens
        if sizes:
            self._steps.append((monotonic(), [(start, start + sizes[name]) for start, name in spans if name in sizes]))
        else:
            self._rest()
        return super().build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        if self._steps:  # where vLLM schedules ahead, a step begins when the one before it ends
            started, spans = self._steps.popleft()
            now, began = monotonic(), max(started, self._last_end)
            self._last_end = now
            if any(end - start > 1 for start, end in spans):
                self.cost.observe(spans, now - began)
        super().update_connector_output(connector_output)

    def report(self) -> dict[str, Any]:
        """Since the engine began.

        Returns:
            {"choices": {reason: prompts}, "fetched_tokens": n, "kv_cache": as configured,
             "stores": {name: {`TierCounts`, "in_use": bool, "reason": why not, "where", "namespace", "block_bytes"}}}
        """
        stores = {
            tier.kind: asdict(tier.counts)
            | {"in_use": tier.breaker.is_closed, "reason": tier.breaker.reason}
            | {"where": tier.store.where, "namespace": tier.store.namespace, "block_bytes": tier.block_size_bytes}
            for tier in self.tiers
        }
        return {
            "choices": dict(self.reasons),
            "fetched_tokens": self.fetched_tokens,
            "stores": stores,
            "kv_cache": self._told,
        }

    def shutdown(self) -> None:
        if self.connector_scheduler is not None:
            self._probing.shutdown(cancel_futures=True)
            if self in scheduler_connectors:
                scheduler_connectors.remove(self)
        super().shutdown()

    def _keep_windows_of_answers(self) -> None:
        """The next turn of a chat begins with this turn's answer: windows are kept at every boundary that it reaches.

        vLLM keeps them before the end of the prompt and at one junction.
        """
        scheduler: Any = self.scheduler
        align, mask = scheduler.config.alignment_tokens, scheduler._reachable_store_block_mask

        def with_answers(*, reachable_boundaries: tuple[int, ...], **chunks: Any) -> list[bool] | None:
            if reachable_boundaries and align:  # the first is the last token of the prompt
                end = chunks["end_chunk_idx"] * chunks["group_config"].tokens_per_chunk
                after = range((reachable_boundaries[0] // align + 1) * align, end + 2 * align, align)
                reachable_boundaries = (*reachable_boundaries, *after)
            found: list[bool] | None = mask(reachable_boundaries=reachable_boundaries, **chunks)
            return found

        scheduler._reachable_store_block_mask = with_answers

    def _rest(self) -> None:
        """Nothing can be computed before a thread is done: leave it the interpreter, which an idle loop would hold."""
        threads = [*self._questions(), *(job for tier in self.tiers for job in tier.jobs)]
        wait(threads, REST_S, FIRST_COMPLETED)

    def _questions(self) -> list[Future[Any]]:
        """To the stores, of prompts about which nothing was decided yet."""
        return [prompt.probing for prompt in self._prompts.values() if prompt.chosen is None]

    def _begin(self, request: Any, status: Any, num_computed: int) -> _Prompt:
        status.update_offload_keys()
        groups = [
            GroupKeys(
                list(state.offload_keys),
                config.tokens_per_chunk,
                None if config.sliding_window_size_in_chunks is None else partial(_window, config),
            )
            for config, state in zip(self.scheduler.config.kv_group_configs, status.group_states, strict=True)
        ]
        primary = self._manager.primary_tier
        here = {
            key
            for group in groups
            for key in group.keys
            if primary.lookup(key, status.req_context) is not LookupResult.MISS
        }
        ask = partial(
            probe, groups, num_computed, request.num_tokens, here.__contains__,
            {tier.kind: tier.has for tier in self.tiers}, self._block_bytes, self.tiers[0].num_rows,
        )  # fmt: skip
        prompt = _Prompt(self._probing.submit(ask), monotonic() + PROBE_S)
        self._prompts[request.request_id] = prompt
        return prompt

    @property
    def _block_bytes(self) -> int:
        return self.tiers[0].block_size_bytes if self.tiers else 0

    def _choose(self, request: Any, status: Any, prompt: _Prompt, num_computed: int) -> None:
        """Decide once, and tell vLLM's lookup: how far, and what of each store."""
        if not prompt.probing.done() or (error := prompt.probing.exception()) is not None:
            if prompt.probing.done():
                logger.error("the stores of KV blocks could not be asked: %r", error)
            else:
                prompt.probing.cancel()
                for tier in self.tiers:
                    tier.kept_waiting(PROBE_S)
            prompt.chosen = Choice(None, None, None, "unanswered")
            status.max_load_tokens = 0
            return
        prefixes = prompt.probing.result()
        for tier in self.tiers:
            tier.answered_in_time()
        compute_s = partial(self.cost.predict, step_tokens=self._step_tokens)
        costs: dict[str, Callable[[int], float | None]] = {tier.kind: tier.cost.predict for tier in self.tiers}
        prompt.chosen = choice = choose(prefixes.options, num_computed, compute_s, costs)
        prompt.junction = prefixes.longest_full
        if choice.option is None:
            status.max_load_tokens = 0
            self._measure(prefixes, choice)
            return
        # vLLM takes one token off: the last of a prompt is always computed.
        status.max_load_tokens = choice.option.tokens - num_computed + 1
        patience = max(LEAST_FETCH_S, choice.compute_s or 0.0)
        status.req_context.set_state(Plan(prefixes.names, monotonic() + patience))
        logger.debug("%s: fetch %s: %s", request.request_id, choice.option, choice.reason)

    def _measure(self, prefixes: Prefixes, choice: Choice) -> None:
        """Fetch a little beside the computing, where a store was turned down that has not been tried for long."""
        if choice.reason not in ("slower", "unmeasured"):
            return
        for tier in self.tiers:
            names = prefixes.names.get(tier.kind)
            if names and (not tier.cost.num_observed or monotonic() - tier.last_fetch > MEASURE_S):
                tier.measure(sorted(names)[:MEASURE_BLOCKS])


def _window(config: Any, end: int) -> int:
    """Chunks of a group (vLLM's GroupOffloadConfig) that a prefix needs before its end."""
    window: int = config.load_window_size_in_chunks(end)
    return window


scheduler_connectors: list[KvTierConnector] = []
"""Of this process' engine, for its reports."""
