"""One ingress: HTTP and gRPC servers over vLLM's front over the shard pool, on one event loop. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeray.config import ClusterTlsConfig, ExpertsConfig, IngressConfig, KvCacheConfig, TlsConfig
from moeray.ingress.arrivals import Arrivals
from moeray.ingress.ports import bind
from moeray.ingress.shard_link import SILENCE_S
from moeray.mutual_tls import ClusterCertificate
from moeray.telemetry import RequestMetrics, SampleCollector

if TYPE_CHECKING:
    import grpc
    from fastapi import FastAPI
    from grpc_health.v1 import health
    from prometheus_client import CollectorRegistry

    from moeray.ingress.certificates import Certificates
    from moeray.ingress.http_server import HttpServer
    from moeray.ingress.shard_pool import ShardPool
    from moeray.ingress.tenants.tenants import Tenants
    from moeray.vllm_hooks.engine_core import RequestPool
    from moeray.vllm_hooks.front import Front

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IngressSettings:
    """What one ingress needs.

    Attributes:
        name: id of this ingress, in log lines of shards.
        front: keyword arguments of `moeray.vllm_hooks.engine_args.front_engine_args`.
        http_port, grpc_port: 0 takes a free port.
        shares_ports: other ingresses of this cluster may listen on the same ports of this node.
        silence_s: a shard that gives no sign of life for so long is lost.
        stall_s: a request that waited for experts as long when its shard is lost, fails (`experts.wait_s`).
        limits: the bounds of what is admitted, of batches and of the drain are read from it, nothing else.
        tls: of both ports.
        cluster_tls: of the links to the shards.
        kv_cache: what the shards share.
        tenants: opens those whose requests alone are served; None serves everybody.
    """

    name: str
    front: dict[str, Any]
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 50051
    shares_ports: bool = False
    silence_s: float = SILENCE_S
    stall_s: float = ExpertsConfig.wait_s
    limits: IngressConfig = field(default_factory=IngressConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    cluster_tls: ClusterTlsConfig = field(default_factory=ClusterTlsConfig)
    kv_cache: KvCacheConfig = field(default_factory=KvCacheConfig)
    tenants: Callable[[], Awaitable[Tenants]] | None = None


class IngressServer:
    """`start`, then `set_shards` as often as membership changes, then `stop`.

    Args:
        registry: gets this ingress' metrics; read by `/metrics` and, in other threads, by whoever else has it.
    """

    def __init__(self, settings: IngressSettings, registry: CollectorRegistry | None = None) -> None:
        self.settings = settings
        self._model = str(settings.front["model_name"])
        self._metrics = RequestMetrics(self._model, registry)
        self.http_port = self.grpc_port = 0
        self._front: Front | None = None
        self._pool: ShardPool | None = None
        self._arrivals = Arrivals(self._metrics)
        self._http: HttpServer | None = None
        self._grpc: grpc.aio.Server | None = None
        self._health: health.aio.HealthServicer | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._health_task: asyncio.Task[None] | None = None
        self._certificates: Certificates | None = None
        self._batches_task: asyncio.Task[None] | None = None
        self._tenants: Tenants | None = None
        self._tenants_task: asyncio.Task[None] | None = None
        self._unknown_tenants = ""

    async def start(self, before_serving: Callable[[], Awaitable[None]] | None = None) -> None:
        """Bind both ports, build the front, serve. Ready when it returns; without a shard, requests get 503.

        Args:
            before_serving: awaited when shards can be set and nobody is served yet.
        Raises:
            PortInUse: names the port and its configuration key.
            BadCertificate: names the file and its configuration key.
            ConfigError, RegistryUnavailable: the tenants, or a file of `cluster_tls`, cannot be read.
        """
        settings = self.settings
        if settings.tls.is_on:
            from moeray.ingress.certificates import Certificates

            self._certificates = Certificates(settings.tls)
        if settings.tenants is not None:
            self._tenants = await settings.tenants()
            self._tenants.metrics = self._metrics
        # First of all: a taken port must not cost the seconds that the front takes.
        http_socket = bind(settings.host, settings.http_port, "ingress.http_port", shared=settings.shares_ports)
        grpc_socket = bind(settings.host, settings.grpc_port, "ingress.grpc_port", shared=settings.shares_ports)
        try:
            await self._start_front()
            if before_serving is not None:
                await before_serving()
            await self._start_http(http_socket)
            await self._start_grpc(grpc_socket)
        except BaseException:
            http_socket.close()
            raise
        finally:
            grpc_socket.close()
        logger.info("ingress %s serves HTTP on %d and gRPC on %d", settings.name, self.http_port, self.grpc_port)

    @property
    def is_serving(self) -> bool:
        """Whether a request would find a shard now."""
        return self._pool is not None and not self._arrivals.is_leaving and self._pool.is_serving

    async def set_shards(self, shards: Mapping[str, str]) -> None:
        """The attention shards that exist now: name -> host:port of the relay."""
        assert self._pool is not None, "start() first"
        await self._pool.set_shards(shards)

    def hold(self, reason: str) -> None:
        """Refuse new requests (503) with this reason, whatever the shards say; an empty one ends it."""
        assert self._pool is not None, "start() first"
        self._pool.hold(self._unknown_tenants or reason)

    def describe(self) -> dict[str, Any]:
        """Ports, the pool's view of each shard, and what is admitted."""
        shards = self._pool.describe() if self._pool is not None else {}
        admission = self._pool.admission.describe() if self._pool is not None else {}
        ports = {"http_port": self.http_port, "grpc_port": self.grpc_port}
        return {"name": self.settings.name, **ports, "shards": shards, "admission": admission}

    @property
    def level(self) -> dict[str, float]:
        """What clients ask for, and how long they wait: see `ServiceLevel.report`."""
        return self._pool.level.report() if self._pool is not None else {}

    @property
    def num_requests(self) -> int:
        return len(self._pool.in_flight) if self._pool is not None else 0

    async def stop(self, drain_s: float | None = None) -> None:
        """Drain (`moeray.ingress.stopping`), then end; idempotent.

        Args:
            drain_s: what streams have to end by themselves; None is `ingress.drain_s`.
        """
        if self._stopping is None:
            drain_s = self.settings.limits.drain_s if drain_s is None else drain_s
            self._stopping = asyncio.create_task(self._stop(drain_s), name="stop")
        await asyncio.shield(self._stopping)

    async def _stop(self, drain_s: float) -> None:
        from moeray.ingress.stopping import drain

        for task in (self._health_task, self._batches_task):
            if task is not None:
                task.cancel()
        if self._pool is not None:
            await drain(
                self._arrivals, self._pool, drain_s, http=self._http, grpc_server=self._grpc, health=self._health
            )
        if self._front is not None:
            self._front.llm.shutdown()
        if self._tenants_task is not None:  # until here: it keeps alive what streams have reserved
            self._tenants_task.cancel()
        if self._tenants is not None:
            await self._tenants.close()
        self._http = self._grpc = self._health = self._pool = self._front = self._tenants = None

    async def _start_front(self) -> None:
        from moeray.attention_shard import link as wire
        from moeray.vllm_hooks.front import build_front, front_config, front_dialect, handshake
        from moeray.vllm_hooks.heavy_imports import uncollected

        with uncollected():
            engine_args, vllm_config = await asyncio.to_thread(front_config, self.settings.front)
            from moeray.ingress.shard_pool import ShardPool

            vllm, model = handshake(vllm_config)
            hello = wire.Hello(wire.PROTOCOL_VERSION, vllm, model, f"ingress {self.settings.name}")
            self._pool = ShardPool(
                hello, self.settings.limits, silence_s=self.settings.silence_s, stall_s=self.settings.stall_s,
                metrics=self._metrics, on_begun=self._tenants.begun if self._tenants is not None else None,
                certificate=ClusterCertificate.of(self.settings.cluster_tls), kv_cache=self.settings.kv_cache,
            )  # fmt: skip
            pool: RequestPool = self._pool
            if self._tenants is not None:
                from moeray.ingress.tenants.tenant_pool import TenantPool

                pool = TenantPool(pool, self._tenants)
            dialect = front_dialect(self.settings.front, engine_args)
            self._front = await build_front(pool, engine_args, vllm_config, dialect=dialect)
        if self._tenants is not None:
            from moeray.ingress.tenants.model_list import show_only_own

            show_only_own(self._front.openai.models)
            self._tenants_task = asyncio.create_task(self._tenants.run(), name="tenants")
            self._tenants_task.add_done_callback(self._tenants_unknown)

    def _tenants_unknown(self, task: asyncio.Task[None]) -> None:
        """Who may ask is not known any more: nobody may."""
        if not task.cancelled():
            logger.critical("the tenants cannot be kept up to date", exc_info=task.exception())
            self._unknown_tenants = "this ingress cannot tell any more who may ask"
            self.hold(self._unknown_tenants)

    async def _start_http(self, listener: socket.socket) -> None:
        from moeray.ingress.http_server import add_probes, start_http
        from moeray.ingress.metrics import add_metrics, samples_of_pool

        assert self._front is not None and self._pool is not None
        app = self._front.openai.app
        add_probes(app, self._pool, self._arrivals, lambda: self._unknown_tenants)
        self._metrics.registry.register(SampleCollector(partial(samples_of_pool, self._model, self._pool)))
        add_metrics(app, self._metrics.registry, self._sees)
        if self.settings.limits.batches.directory:
            self._batches_task = self._start_batches(app)
        door: Callable[[Any], Any] | None = None
        if self._tenants is not None:
            from moeray.ingress.tenants.http_door import HttpDoor

            door = partial(HttpDoor, tenants=self._tenants)
        self.http_port = listener.getsockname()[1]
        self._http = await start_http(app, listener, self._arrivals, self._certificates, self.settings.limits, door)

    def _sees(self) -> str | None:
        """The tenant that asks, if it may not see the others' numbers; "" if nobody knows who asks."""
        if self._tenants is None:
            return None
        from moeray.ingress.tenants.call import current_call

        call = current_call()
        return "" if call is None else None if call.tenant.is_admin else call.tenant.name

    def _start_batches(self, app: FastAPI) -> asyncio.Task[None]:
        """Serve the batch API and run what is there already."""
        from moeray.ingress.batches.api import asks, batch_routes
        from moeray.ingress.batches.runner import BatchRunner
        from moeray.ingress.batches.store import BatchStore

        limits = self.settings.limits.batches
        store = BatchStore(Path(limits.directory).expanduser())
        as_owner = (
            None if (tenants := self._tenants) is None else lambda owner: tenants.call_of(owner, "batch").handled()
        )
        runner = BatchRunner(store, asks(app, as_owner), self.settings.limits)
        app.include_router(batch_routes(store, limits, runner.wake))
        return asyncio.create_task(runner.run(), name="batches")

    async def _start_grpc(self, reserved: socket.socket) -> None:
        from moeray.ingress.grpc_arrivals import GrpcArrivals
        from moeray.ingress.grpc_server import SERVICE, keep_health, start_grpc

        assert self._front is not None and self._pool is not None
        host, port = reserved.getsockname()[:2]
        reserved.close()
        doors: list[grpc.aio.ServerInterceptor] = [GrpcArrivals(SERVICE, self._arrivals)]
        if self._tenants is not None:
            from moeray.ingress.tenants.grpc_door import GrpcDoor

            doors.append(GrpcDoor(self._tenants))
        self._grpc, self.grpc_port, self._health = await start_grpc(
            self._front.openai, host, port, shared=self.settings.shares_ports, certificates=self._certificates,
            limits=self.settings.limits, doors=doors,
        )  # fmt: skip
        self._health_task = asyncio.create_task(keep_health(self._health, self._pool))
