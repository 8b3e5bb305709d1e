"""A tenant: an internal team, what it may use, how it is known. Plain immutable values, checked when they are read."""

from __future__ import annotations

from dataclasses import field
from datetime import datetime
from typing import Annotated

from pydantic import AwareDatetime, ConfigDict, Field
from pydantic.dataclasses import dataclass

from moeray.tenancy.errors import Forbidden

_FROM_FILE = ConfigDict(extra="forbid")
MAX_COUNT = 2**52
"""Sums of counts stay exact in Lua's double precision numbers."""

TenantName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
KeyId = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
LimitCount = Annotated[int, Field(strict=True, ge=0, le=MAX_COUNT)]
Text = Annotated[str, Field(min_length=1, max_length=1024)]
PriorityClass = Annotated[int, Field(strict=True, ge=-1000, le=1000)]
Weight = Annotated[float, Field(ge=0.001, le=1000, allow_inf_nan=False)]


@dataclass(frozen=True, config=_FROM_FILE)
class Limits:
    """Of one tenant, over all ingresses; 0 is no limit.

    Attributes:
        requests_per_minute: in any 60 s.
        tokens_per_minute: prompt and answer, in any 60 s, counted at the time of admission.
        concurrent_requests: admitted and not ended.
        tokens_per_month: prompt and answer, per calendar month in UTC, of the requests admitted in it.
        max_context: prompt and answer of one request.
    """

    requests_per_minute: LimitCount = 0
    tokens_per_minute: LimitCount = 0
    concurrent_requests: LimitCount = 0
    tokens_per_month: LimitCount = 0
    max_context: LimitCount = 0

    @property
    def needs_counting(self) -> bool:
        """Whether any of them is more than a comparison."""
        return bool(
            self.requests_per_minute or self.tokens_per_minute or self.concurrent_requests or self.tokens_per_month
        )


@dataclass(frozen=True, config=_FROM_FILE)
class Identities:
    """What else than a key names the tenant.

    Attributes:
        mtls: common names and subject alternative names of client certificates.
        jwt: values of the token's tenant claim.
    """

    mtls: tuple[Text, ...] = ()
    jwt: tuple[Text, ...] = ()


@dataclass(frozen=True, config=_FROM_FILE)
class KeyRecord:
    """A key without its secret.

    Attributes:
        sha256: of the secret, in hex.
        expires: refused from then on; None is never.
        revoked: refused since.
    """

    id: KeyId
    sha256: Digest
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None

    def state(self, now: datetime) -> str:
        """active, expired or revoked."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "active"


@dataclass(frozen=True, config=_FROM_FILE)
class Tenant:
    """See module docstring.

    Attributes:
        models: served model names that it may ask for; empty: all.
        priority: class, in vLLM's sense: lower goes first.
        weight: its share inside its class while others wait too.
        is_admin: whether it may see what other tenants ask for (`/metrics`).
        shares_cache: whether its prefixes may be found in the cache by, and in those of, other tenants that share.
    """

    name: TenantName
    models: tuple[Text, ...] = ()
    limits: Limits = field(default_factory=Limits)
    priority: PriorityClass = 0
    weight: Weight = 1.0
    shares_cache: Annotated[bool, Field(strict=True)] = False
    is_admin: Annotated[bool, Field(strict=True)] = False
    identities: Identities = field(default_factory=Identities)
    keys: tuple[KeyRecord, ...] = ()

    def may_use(self, model: str) -> bool:
        return not self.models or model in self.models

    def check(self, model: str, num_context_tokens: int) -> None:
        """Whether one request is within what needs no counting.

        Args:
            num_context_tokens: prompt and the longest answer.
        Raises:
            Forbidden: names `model` or `max_tokens`.
        """
        if not self.may_use(model):
            raise Forbidden("model", f"tenant {self.name} may not use {model}")
        limit = self.limits.max_context
        if limit and num_context_tokens > limit:
            raise Forbidden(
                "max_tokens",
                f"prompt and answer may take {limit} tokens for tenant {self.name}, not {num_context_tokens}",
            )
