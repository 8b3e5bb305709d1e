"""What an ingress counts of its requests, as they go."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram

from moeray.telemetry import families as f
from moeray.telemetry.families import MAX_TENANTS, NO_TENANT, OTHER_TENANTS, Family


class TenantLabels:
    """A tenant's label: its name, or the one that all share who came after `most` others."""

    def __init__(self, most: int = MAX_TENANTS) -> None:
        self._most = most
        self._known: set[str] = set()

    def __getitem__(self, tenant: str) -> str:
        if tenant == NO_TENANT or tenant in self._known:
            return tenant
        if len(self._known) >= self._most:
            return OTHER_TENANTS
        self._known.add(tenant)
        return tenant


class RequestMetrics:
    """Counters and histograms of `registry`; each method costs a few microseconds and may be called by any thread.

    Args:
        model: the served model name.
    """

    def __init__(self, model: str = "", registry: CollectorRegistry | None = None) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        self._model, self._tenants = model, TenantLabels()
        self._requests = self._counter(f.REQUESTS)
        self._request_seconds = self._histogram(f.REQUEST_SECONDS)
        self._ttft = self._histogram(f.TTFT_SECONDS).labels(model)
        self._tpot = self._histogram(f.TPOT_SECONDS).labels(model)
        self._queue = self._histogram(f.QUEUE_SECONDS).labels(model)
        tokens = self._counter(f.TOKENS)
        self._tokens = {kind: tokens.labels(model, kind) for kind in ("prompt", "cached", "answer")}
        self._tenant_tokens = self._counter(f.TENANT_TOKENS)
        self._rejections = self._counter(f.QUOTA_REJECTIONS)
        self._replays = self._counter(f.REPLAYS).labels(model)

    def ended(self, *, tenant: str, protocol: str, endpoint: str, code: str, seconds: float) -> None:
        """A request was answered to its end, refused or given up.

        Args:
            tenant: empty where nobody showed who he is.
            endpoint, code: of few values; `code` is HTTP's number or gRPC's name.
        """
        label = self._tenants[tenant]
        self._requests.labels(self._model, label, protocol, endpoint, code).inc()
        self._request_seconds.labels(self._model, label, protocol).observe(seconds)

    def placed(self, waited_s: float, num_prompt: int) -> None:
        """A shard has the request, for the first time."""
        self._queue.observe(waited_s)
        self._tokens["prompt"].inc(num_prompt)

    def answered(self, waited_s: float, num_tokens: int, num_cached: int | None) -> None:
        """Tokens of one answer came; see `ServiceLevel.answered`."""
        self._tokens["answer"].inc(num_tokens)
        if num_cached is None:
            for _ in range(num_tokens):
                self._tpot.observe(waited_s / num_tokens)
        else:
            self._ttft.observe(waited_s)
            self._tokens["cached"].inc(num_cached)

    def replayed(self) -> None:
        self._replays.inc()

    def charged(self, tenant: str, tokens: Mapping[str, int]) -> None:
        """What a tenant's call took, by kind: prompt, cached, answer."""
        label = self._tenants[tenant]
        for kind, count in tokens.items():
            self._tenant_tokens.labels(self._model, label, kind).inc(count)

    def quota_refused(self, tenant: str, limit: str) -> None:
        self._rejections.labels(self._tenants[tenant], limit).inc()

    def _counter(self, family: Family) -> Counter:
        return Counter(family.name, family.help, family.labels, registry=self.registry)

    def _histogram(self, family: Family) -> Histogram:
        return Histogram(family.name, family.help, family.labels, registry=self.registry, buckets=family.buckets)
