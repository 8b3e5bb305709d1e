"""`/metrics` of an ingress: everything to an admin; to another tenant, of all tenants its own numbers only."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder

from moeray.ingress.shard_link import LinkState
from moeray.telemetry import Sample
from moeray.telemetry import families as f

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

    from moeray.ingress.shard_pool import ShardPool

PATH = "/metrics"


def samples_of_pool(model: str, pool: ShardPool) -> Iterator[Sample]:
    """How full an ingress is now; from any thread."""
    admission, links = pool.admission.describe(), pool.describe()
    yield Sample(f.IN_FLIGHT, (model,), len(pool.in_flight))
    yield Sample(f.WAITING, (model,), pool.num_waiting)
    yield Sample(f.ADMITTED_TOKENS, (model,), admission["tokens"] or 0)
    yield Sample(f.KV_CAPACITY, (model,), admission["kv_tokens"] or 0)
    for state, count in Counter([LinkState.READY.value, *(link["state"] for link in links.values())]).items():
        yield Sample(f.SHARDS, (str(state),), count - (state == LinkState.READY.value))


class OnlyOf:
    """What of a registry one tenant may see."""

    def __init__(self, registry: CollectorRegistry, tenant: str) -> None:
        self._registry, self._tenant = registry, tenant

    def collect(self) -> Iterator[Metric]:
        """Samples without a tenant, and those of this one."""
        for metric in self._registry.collect():
            shown = Metric(metric.name, metric.documentation, metric.type, metric.unit)
            shown.samples = [each for each in metric.samples if each.labels.get("tenant", self._tenant) == self._tenant]
            yield shown


def add_metrics(app: FastAPI, registry: CollectorRegistry, sees: Callable[[], str | None]) -> None:
    """Answer PATH from `registry`, which has vLLM's own too, in place of vLLM's route.

    Args:
        sees: the tenant whose numbers alone the one who asks may see; None: all.
    """
    from fastapi import Response as Answer

    async def metrics(request: Request) -> Response:
        tenant = sees()
        shown = registry if tenant is None else OnlyOf(registry, tenant)
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        text = await asyncio.to_thread(encode, shown)  # a scrape of many series takes milliseconds
        return Answer(text, headers={"content-type": content_type})

    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) != PATH]
    app.router.add_route(PATH, metrics, methods=["GET"])
