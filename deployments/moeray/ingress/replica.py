"""The Serve replica of an ingress: the server on this node's ports, kept up to date with the shards that exist."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from moeray.config import ClusterConfig
from moeray.controller.member import ClusterMember
from moeray.controller.settings import ControllerSettings
from moeray.deepseek_v4.source import locate
from moeray.health import guard
from moeray.ingress.server import IngressServer, IngressSettings
from moeray.ingress.tenants.opening import open_tenants
from moeray.ingress.tenants.tenants import Tenants
from moeray.membership import Role, View
from moeray.vllm_hooks.served_model import describe_model, experts_in

LINK_S = 30.0


class Ingress:
    """Serve deployment; bound last, so that Serve deploys the pools it is given too."""

    async def __init__(self, config: ClusterConfig, model: str, settings: ControllerSettings, *pools: Any) -> None:  # type: ignore[misc]
        self._pools = pools  # never called: a handle of each pool is what makes Serve deploy it with this application
        self._member = ClusterMember(Role.INGRESS, settings)
        index = await self._member.join()
        await self._member.report({"stage": "importing vLLM"})
        directory = locate(model)
        ingress = config.ingress
        self._server = IngressServer(
            IngressSettings(
                name=f"ingress-{index}",
                host=ingress.host,
                http_port=ingress.http_port,
                grpc_port=ingress.grpc_port,
                shares_ports=ingress.num_replicas > 1,
                silence_s=config.health.hang_s,
                stall_s=config.experts.wait_s,
                limits=ingress,
                tls=ingress.tls,
                cluster_tls=config.cluster_tls,
                kv_cache=config.kv_cache,
                tenants=_tenants_of(config, settings.model, f"ingress-{index}"),
                front={
                    "model": str(directory),
                    "model_name": settings.model,
                    "engine_args": config.attention.engine_args,
                    "experts_in": experts_in(config, describe_model(directory)),
                },
            ),
            self._member.registry,
        )
        await self._server.start(self._link)
        self._watched = guard(config.health.hang_s)
        http, grpc = (f"{ingress.host}:{port}" for port in (self._server.http_port, self._server.grpc_port))
        scheme = "https" if ingress.tls.is_on else "http"
        await self._member.report({"endpoints": {"http": f"{scheme}://{http}", "grpc": grpc}})
        await self._member.ready(http)

    async def __call__(self) -> dict[str, Any]:
        """What this ingress knows of its shards (Serve wants an ingress deployment to be callable)."""
        return self._server.describe()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's autoscaling asks this; see `moeray.autoscaler.observing`."""
        return self._server.level

    async def check_health(self) -> None:
        """Serve asks this; the server ends only with the replica, so answering is enough."""

    async def __del__(self) -> None:
        await self._stop()

    async def _stop(self) -> None:
        telling = asyncio.create_task(self._member.drain())  # for `moeray status`; the streams do not wait for it
        try:
            await self._server.stop()
        finally:
            telling.cancel()
            await self._member.leave()

    async def _go(self) -> None:
        """This process is told to end, although it is wanted: Serve starts another."""
        try:
            await self._stop()
        finally:
            os._exit(0)

    async def _link(self) -> None:
        """Find the shards. Beside another ingress this one serves only when it has one, if that does not take for ever:
        the kernel gives it a share of the new connections from then on.
        """
        self._member.follow(self._on_view, self._go)
        deadline = time.monotonic() + LINK_S
        while self._server.settings.shares_ports and not self._server.is_serving and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    async def _on_view(self, view: View) -> None:
        self._server.hold(_why_not(view))
        await self._server.set_shards(view.shards)


def _tenants_of(config: ClusterConfig, model: str, ingress: str) -> Callable[[], Awaitable[Tenants]] | None:
    """What opens the tenants; None where nobody is asked who he is."""
    return partial(open_tenants, config, model, ingress) if config.tenants.needs_credential else None


def _why_not(view: View) -> str:
    """Why no request can be served, however long it waits; empty if one can.

    A lost expert group is no reason: shards use other copies, or wait for its successor.
    """
    if view.mismatches and not (view.generation and view.is_covered):
        return f"not all processes serve the same model: {'; '.join(view.mismatches.values())}"
    return "" if view.generation else "the expert groups are still starting"
