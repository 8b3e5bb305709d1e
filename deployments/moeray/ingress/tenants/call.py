"""One call of a client, from its credential to its usage record."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moeray.ingress.tenants.refusals import refused
from moeray.tenancy import Forbidden, Principal, QuotaExceeded, QuotaStoreDown, Reservation, UsageRecord
from moeray.vllm_hooks.admission import Need, Place

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput

    from moeray.ingress.tenants.tenants import Tenants
    from moeray.tenancy import Tenant

_CALL: ContextVar[Call | None] = ContextVar("the call that is being handled", default=None)


def current_call() -> Call | None:
    """Whose call this task handles; None: nobody showed who he is."""
    return _CALL.get()


@dataclass(slots=True, eq=False)
class TenantPlace:
    """A request's place, and what it took. A call with several prompts has several.

    Attributes:
        need: with the tenant's priority and cache salt.
        num_answered: tokens of all its sequences so far.
        num_cached: of its prompt, found in the cache; None before it was looked for.
    """

    inner: Place
    call: Call
    need: Need
    num_answered: int = 0
    num_cached: int | None = None
    has_begun: bool = False
    has_left: bool = False

    @property
    def max_unread_s(self) -> float:
        return self.inner.max_unread_s

    @property
    def num_used(self) -> int:
        return self.need.num_prompt + self.num_answered

    async def begin(self) -> None:
        await self.call.begin()

    def answered(self) -> None:
        self.inner.answered()

    def record(self, output: EngineCoreOutput) -> None:
        """Tokens have come for one of its sequences."""
        self.num_answered += len(output.new_token_ids)
        if self.num_cached is None and output.prefill_stats is not None:
            self.num_cached = output.prefill_stats.num_cached_tokens
        self.call.answered(len(output.new_token_ids))

    def leave(self, error: BaseException | None = None) -> None:
        if not self.has_left:
            self.has_left = True
            self.inner.leave(error)
            self.call.left(self, error)


@dataclass(slots=True, eq=False)
class Call:
    """See module docstring. `close` when its answer has been given; it ends with that and its last place.

    Attributes:
        protocol: http, grpc or batch.
        places: those of the requests that it made.
        reservations: what it holds of its tenant's limits; the first is the call's, others are for later requests.
        refusal: the limits as they stood when it was refused, None if it was not.
    """

    tenants: Tenants
    principal: Principal
    protocol: str
    places: list[TenantPlace] = field(default_factory=list)
    reservations: list[Reservation] = field(default_factory=list)
    refusal: QuotaExceeded | None = None
    _started: float = field(default_factory=time.monotonic)
    _begun: float = 0.0
    _first_token: float = 0.0
    _outcome: str = "ok"
    _is_closed: bool = False
    _has_ended: bool = False
    _reserving: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def tenant(self) -> Tenant:
        return self.principal.tenant

    @contextmanager
    def handled(self) -> Iterator[None]:
        """This task handles the call inside the block, and has answered it at its end."""
        _CALL.set(self)
        try:
            yield
        finally:
            _CALL.set(None)  # not a token's reset: an abandoned stream is closed by another task than it began in
            self._is_closed = True
            self._end_if_over()

    def check(self, need: Need) -> None:
        """Raises Refused: the tenant may not have this at all."""
        try:
            self.tenant.check(self.tenants.model, need.num_prompt + need.num_answer)
        except Forbidden as error:
            raise refused(error) from error

    def add(self, place: TenantPlace) -> TenantPlace:
        self.places.append(place)
        return place

    async def begin(self) -> None:
        """Reserve for every place that has none yet.

        Raises:
            Refused: a limit is reached, or nobody can tell.
        """
        async with self._reserving:  # several prompts begin at once; one of them reserves for all
            new = [place for place in self.places if not place.has_begun and not place.has_left]
            if not new:
                return
            num_tokens = sum(place.need.num_charged for place in new)
            try:
                reservation = await self.tenants.quotas.reserve(
                    self.tenant, requests=0 if self.reservations else 1, tokens=num_tokens
                )
            except QuotaExceeded as error:
                self.refusal = error
                self.tenants.metrics.quota_refused(self.tenant.name, error.limit)
                raise refused(error) from error
            except QuotaStoreDown as error:
                raise refused(error) from error
            reservation.used = sum(place.need.num_prompt for place in new)
            self.reservations.append(reservation)
            self._begun = self._begun or time.monotonic()
            for place in new:
                place.has_begun = True

    def answered(self, num_tokens: int) -> None:
        self._first_token = self._first_token or time.monotonic()
        if self.reservations:
            self.reservations[-1].used += num_tokens

    def left(self, place: TenantPlace, error: BaseException | None) -> None:
        """For TenantPlace."""
        if self._outcome == "ok" and (error is not None or not place.has_begun):
            is_gone = error is None or isinstance(error, GeneratorExit | asyncio.CancelledError)
            self._outcome = "aborted" if is_gone else type(error).__name__
        self.tenants.settle_share(place)
        self._end_if_over()

    def rate_limits(self) -> Mapping[str, str]:
        """Headers (metadata) that tell the client where it stands, as OpenAI names them."""
        source = self.refusal or (self.reservations[0] if self.reservations else None)
        if source is None:
            return {}
        return rate_limit_headers(self.tenant, source.remaining, source.reset_s)

    def _end_if_over(self) -> None:
        is_over = self._is_closed and all(place.has_left for place in self.places)
        if is_over and not self._has_ended and self.reservations:
            self._has_ended = True
            self.tenants.end(self, self._usage(), is_free=self._is_free)

    @property
    def _is_free(self) -> bool:
        """The cluster failed before it gave a token."""
        return self._outcome not in ("ok", "aborted") and not self._first_token

    def _usage(self) -> UsageRecord:
        now = time.monotonic()
        begun = [place for place in self.places if place.has_begun]
        return UsageRecord(
            time=time.time(),
            request_id=begun[0].need.request_id,
            tenant=self.tenant.name,
            key_id=self.principal.key_id,
            model=self.tenants.model,
            protocol=self.protocol,
            prompt_tokens=0 if self._is_free else sum(place.need.num_prompt for place in begun),
            completion_tokens=sum(place.num_answered for place in begun),
            cached_tokens=sum(place.num_cached or 0 for place in begun),
            queue_s=round(self._begun - self._started, 6),
            ttft_s=round(self._first_token - self._started, 6) if self._first_token else 0.0,
            total_s=round(now - self._started, 6),
            outcome=self._outcome,
        )


_HEADERS = {"requests_per_minute": "requests", "tokens_per_minute": "tokens"}


def rate_limit_headers(tenant: Tenant, remaining: Mapping[str, int], reset_s: Mapping[str, float]) -> dict[str, str]:
    """x-ratelimit-{limit,remaining,reset}-{requests,tokens} for those limits that the tenant has."""
    headers: dict[str, str] = {}
    for limit, name in _HEADERS.items():
        if limit in remaining:
            headers[f"x-ratelimit-limit-{name}"] = str(getattr(tenant.limits, limit))
            headers[f"x-ratelimit-remaining-{name}"] = str(remaining[limit])
            headers[f"x-ratelimit-reset-{name}"] = f"{reset_s[limit]:.3f}s"
    return headers
