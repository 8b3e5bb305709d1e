"""What tenancy refuses, as the errors that HTTP and gRPC answer with."""

from __future__ import annotations

from http import HTTPStatus
from math import ceil

from moeray.tenancy import Forbidden, QuotaExceeded, QuotaStoreDown, Unauthenticated
from moeray.vllm_hooks.admission import Refused

Refusal = Unauthenticated | Forbidden | QuotaExceeded | QuotaStoreDown


def refused(error: Refusal) -> Refused:
    """401, 403, 429 or 503; 429 with a time to try again, unless it would be refused for ever."""
    if isinstance(error, Unauthenticated):
        return Refused(error.reason, HTTPStatus.UNAUTHORIZED)
    if isinstance(error, Forbidden):
        return Refused(str(error), HTTPStatus.FORBIDDEN, parameter=error.field)
    if isinstance(error, QuotaExceeded):
        retry_after_s = None if error.retry_after_s is None else max(1, ceil(error.retry_after_s))
        return Refused(str(error), HTTPStatus.TOO_MANY_REQUESTS, retry_after_s=retry_after_s)
    return Refused(str(error), HTTPStatus.SERVICE_UNAVAILABLE, retry_after_s=1)
