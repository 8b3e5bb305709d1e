"""Admission: which requests are taken, judged by the KV that they may fill and by how long they would wait.

Tokens are counted at their most, prompt + max_tokens for each sequence, from a request's admission to its end. The
waiting time is what was measured: while requests wait, how long it takes from one first token to the next. A request is
judged only against work that goes before it (the same priority or a lower number), so that under overload the least
urgent is refused first; all priorities together get at most OVERALL times what one may have. Pure but for its clock.
Single event loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from math import ceil

from vllm.exceptions import VLLMValidationError

from moeray.attention_shard import link as wire
from moeray.config import IngressConfig
from moeray.vllm_hooks.admission import Need, Overloaded, Place

OVERALL = 2
"""Priorities are the clients' own numbers: whatever they choose, work in hand stays within so many times the bounds."""
MIN_STARTS = 10.0
"""First tokens (decayed) before their pace counts as measured."""
_DECAY = 0.95  # per first token: the pace of about the last twenty
LONGEST_RETRY_S = 60


class Admission:
    """`admit` before a request begins; its place is told of its tokens (`answered`) and of its end (`leave`)."""

    def __init__(self, limits: IngressConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._pace = _Pace(clock)
        self._loads: dict[str, wire.Load] = {}
        self._admitted: set[_Admitted] = set()
        self._waiting: set[_Admitted] = set()

    @property
    def max_unread_s(self) -> float:
        """How long a client may leave its stream unread: as long as one waits for its place."""
        return self._limits.max_wait_s

    def report(self, shard: str, load: wire.Load) -> None:
        """What a linked shard says of itself."""
        self._loads[shard] = load

    def admit(self, need: Need, ready: Collection[str]) -> Place:
        """Take a request in.

        Args:
            ready: the shards that take requests now. While there is none, the last ones seen count.
        Raises:
            VLLMValidationError: no shard's KV cache could hold one of its sequences.
            Overloaded: not now.
        """
        if ready:
            self._loads = {shard: load for shard, load in self._loads.items() if shard in ready}
        self._check_size(need)
        self._check_bounds(need)
        self._check_wait(need)
        admitted = _Admitted(self, need)
        self._admitted.add(admitted)
        if not self._waiting:
            self._pace.begin()
        self._waiting.add(admitted)
        return admitted

    def answered(self, admitted: _Admitted) -> None:
        """For `Place.answered`; only the first tokens mean anything here."""
        if admitted in self._waiting:
            self._waiting.remove(admitted)
            self._pace.start()

    def left(self, admitted: _Admitted) -> None:
        """For `Place.leave`."""
        self._admitted.discard(admitted)
        self._waiting.discard(admitted)

    def describe(self) -> dict[str, float | int | None]:
        """For status, metrics and tests; from any thread, so it counts in copies."""
        admitted, loads = tuple(self._admitted), tuple(self._loads.values())
        return {
            "requests": sum(each.need.num_sequences for each in admitted),
            "waiting": len(self._waiting),
            "tokens": sum(each.need.num_tokens for each in admitted),
            "kv_tokens": sum(load.kv_tokens for load in loads),
            "seconds_per_start": self._pace.seconds,
        }

    def _check_size(self, need: Need) -> None:
        """A context that vLLM's front accepts can still be more than a shard has memory for."""
        largest = max((load.kv_tokens for load in self._loads.values()), default=0)
        each = need.num_prompt + need.num_answer
        if largest and each > largest:
            raise VLLMValidationError(
                f"{need.num_prompt} prompt tokens and max_tokens {need.num_answer} are {each} tokens; "
                f"the KV cache of a shard holds {largest}",
                parameter="max_tokens" if need.num_prompt < largest else "input_tokens",
                value=need.num_answer if need.num_prompt < largest else need.num_prompt,
            )

    def _check_bounds(self, need: Need) -> None:
        """Every request counts for all; those that would go after this one count only for the overall bound."""
        before = [each.need for each in self._admitted if each.need.priority <= need.priority]
        whole = [each.need for each in self._admitted]
        for ahead, times in ((before, 1), (whole, OVERALL)):
            if (
                count := sum(each.num_sequences for each in ahead)
            ) + need.num_sequences > self._limits.max_requests * times:
                raise self._overloaded(
                    need, f"{count} requests are in hand, ingress.max_requests is {self._limits.max_requests}"
                )
            self._check_tokens(need, sum(each.num_tokens for each in ahead), times)

    def _check_tokens(self, need: Need, own_tokens: int, times: int) -> None:
        capacity = sum(load.kv_tokens for load in self._loads.values())
        if not capacity:
            return  # no shard has said what it holds
        admitted = own_tokens + sum(load.others_tokens for load in self._loads.values())
        bound = int(capacity * (1 + self._limits.max_queued_kv)) * times
        if admitted and admitted + need.num_tokens > bound:  # alone, a request is never too much
            raise self._overloaded(
                need,
                f"{admitted} tokens are admitted, {need.num_tokens} asked for; the shards' KV caches hold {capacity} "
                f"and {bound - capacity} may wait (ingress.max_queued_kv)",
            )

    def _check_wait(self, need: Need) -> None:
        if (wait_s := self._expected_wait_s(need)) > self._limits.max_wait_s:
            why = f"the first token would take about {wait_s:.0f} s; ingress.max_wait_s is {self._limits.max_wait_s:g}"
            raise self._overloaded(need, why)

    def _expected_wait_s(self, need: Need) -> float:
        ahead = sum(each.need.priority <= need.priority for each in self._waiting)
        return ahead * (self._pace.seconds or 0.0)

    def _overloaded(self, need: Need, why: str) -> Overloaded:
        """Half of the wait is when there is likely to be room again; more at once would only be refused again."""
        retry_after_s = min(max(ceil(self._expected_wait_s(need) / 2), 1), LONGEST_RETRY_S)
        return Overloaded(f"overloaded: {why}; try again in {retry_after_s} s", retry_after_s)


class _Admitted:
    """One admitted request."""

    __slots__ = ("_admission", "need")

    def __init__(self, admission: Admission, need: Need) -> None:
        self._admission, self.need = admission, need

    @property
    def max_unread_s(self) -> float:
        return self._admission.max_unread_s

    async def begin(self) -> None:
        """There is nothing to wait for."""

    def answered(self) -> None:
        self._admission.answered(self)

    def leave(self, error: BaseException | None = None) -> None:
        self._admission.left(self)


class _Pace:
    """Seconds from one first token to the next while requests wait."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = clock()
        self._waited_s = self._starts = 0.0

    @property
    def seconds(self) -> float | None:
        """None before enough was seen."""
        return self._waited_s / self._starts if self._starts >= MIN_STARTS else None

    def begin(self) -> None:
        """Something waits now, nothing did before."""
        self._since = self._clock()

    def start(self) -> None:
        """A first token came."""
        now = self._clock()
        self._waited_s = _DECAY * self._waited_s + (now - self._since)
        self._starts = _DECAY * self._starts + 1
        self._since = now
