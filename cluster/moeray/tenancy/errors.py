"""What a client, an operator or the front gets when tenancy refuses or cannot tell."""

from __future__ import annotations

from collections.abc import Mapping

from moeray.config import ConfigError


class RosterError(ConfigError):
    """A file or record of tenants is wrong: one line per wrong field, each naming it."""


class RegistryUnavailable(RuntimeError):
    """The place where tenants are kept does not answer."""


class Unauthenticated(Exception):
    """No valid credential. `reason`, for the client, never tells whether a key id exists. 401 / UNAUTHENTICATED."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Forbidden(Exception):
    """The tenant may not have what `field` of its request asks for. 403 / PERMISSION_DENIED."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


class QuotaExceeded(Exception):
    """A limit of the tenant is reached; nothing was taken. 429 / RESOURCE_EXHAUSTED.

    Attributes:
        limit: name of the limit, as in `Limits`.
        retry_after_s: when the same request would pass if nothing else came; None: never, it is above the limit itself.
        remaining: what is left of each limit that the tenant has, by name.
        reset_s: when each of them would be whole again, by name.
    """

    def __init__(
        self, limit: str, retry_after_s: float | None, remaining: Mapping[str, int], reset_s: Mapping[str, float]
    ) -> None:
        when = "it asks for more than the limit itself" if retry_after_s is None else f"again in {retry_after_s:.1f} s"
        super().__init__(f"{limit} is reached ({remaining.get(limit, 0)} left): {when}")
        self.limit, self.retry_after_s, self.remaining, self.reset_s = limit, retry_after_s, remaining, reset_s


class QuotaStoreDown(Exception):
    """The quotas' store does not answer, and the cluster refuses rather than serve uncounted. 503 / UNAVAILABLE."""
