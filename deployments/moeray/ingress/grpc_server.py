"""The gRPC side: the service, standard health and reflection on grpc.aio."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from moeray.config import IngressConfig
from moeray.ingress.errors import PortInUse
from moeray.ingress.grpc_requests import MessageBudget, ReadableRequests
from moeray.ingress.grpc_service import InferenceService
from moeray.v1 import inference_pb2 as pb
from moeray.v1.inference_pb2_grpc import add_InferenceServicer_to_server

if TYPE_CHECKING:
    from moeray.ingress.certificates import Certificates
    from moeray.ingress.shard_pool import ShardPool
    from moeray.vllm_hooks.openai_app import OpenAIApp

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
HEALTH_POLL_S = 0.2

KEEPALIVE_S = 30.0
"""A client that has not been heard for so long is asked for a sign of life, and given a third of it to answer."""
MIN_CLIENT_PING_S = 5.0
"""Clients may ask as often; gRPC's own limit is five minutes, after which it cuts those that ask every ten seconds."""

MAX_STREAMS = 1024
"""Calls that one connection has open; a client's library lets more wait."""

HANDSHAKE_S = 10
IDLE_S = 600
AGE_S = 3600
"""A connection that is so old is told to open another one (GOAWAY); its calls go on."""


def _options(limits: IngressConfig, shared: bool, keepalive_s: float) -> tuple[tuple[str, int], ...]:
    every_ms, answer_ms = round(keepalive_s * 1000), round(keepalive_s * 1000 / 3)
    return (
        ("grpc.so_reuseport", int(shared)),
        ("grpc.max_receive_message_length", limits.max_body_bytes),
        ("grpc.max_send_message_length", -1),
        # Messages that arrive compressed are refused: a few bytes would become gigabytes before anybody counts them.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.max_metadata_size", limits.max_header_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_header_bytes),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_S * 1000),
        ("grpc.max_connection_idle_ms", IDLE_S * 1000),
        ("grpc.max_connection_age_ms", AGE_S * 1000),
        ("grpc.keepalive_time_ms", every_ms),
        ("grpc.keepalive_timeout_ms", answer_ms),
        ("grpc.http2.ping_timeout_ms", answer_ms),  # the one that counts: keepalive's own only where it is longer
        ("grpc.http2.max_pings_without_data", 0),  # a stream may wait for its first token for long
        ("grpc.keepalive_permit_without_calls", 1),
        # Of what is received, whatever its name says; who pings more often loses the connection.
        ("grpc.http2.min_ping_interval_without_data_ms", round(MIN_CLIENT_PING_S * 1000)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", round(MIN_CLIENT_PING_S * 1000)),
        ("grpc.http2.max_ping_strikes", 2),
    )


async def start_grpc(
    openai: OpenAIApp,
    host: str,
    port: int,
    *,
    shared: bool = False,
    certificates: Certificates | None = None,
    limits: IngressConfig | None = None,
    doors: Sequence[grpc.aio.ServerInterceptor] = (),
    keepalive_s: float = KEEPALIVE_S,
) -> tuple[grpc.aio.Server, int, health.aio.HealthServicer]:
    """Serve; NOT_SERVING until `keep_health` says otherwise.

    Args:
        shared: see `ports.bind`. Without it a second server on the port is an error, not a coin toss.
        certificates: TLS with these; None serves h2c.
        limits: bounds of messages, metadata and connections.
        doors: what every call passes first.
    Raises:
        PortInUse: ingress.grpc_port.
    """
    limits = limits or IngressConfig()
    # Twice what is admitted: admission's refusal tells more than the server's.
    server = grpc.aio.server(
        interceptors=(*doors, ReadableRequests(MessageBudget(limits.max_bodies_bytes))),
        options=_options(limits, shared, keepalive_s),
        maximum_concurrent_rpcs=2 * limits.max_requests,
    )
    add_InferenceServicer_to_server(InferenceService(openai), server)
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    await _set(servicer, ready=False)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if certificates is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, certificates.for_grpc())
    except RuntimeError as error:
        raise PortInUse("ingress.grpc_port", host, port, str(error)) from error
    await server.start()
    return server, bound, servicer


async def keep_health(servicer: health.aio.HealthServicer, pool: ShardPool) -> None:
    """Follow the pool until cancelled."""
    was = False
    while True:
        if (ready := pool.is_serving) is not was:
            await _set(servicer, ready)
            was = ready
        await asyncio.sleep(HEALTH_POLL_S)


async def _set(servicer: health.aio.HealthServicer, ready: bool) -> None:
    status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
    for name in ("", SERVICE):
        await servicer.set(name, status)
