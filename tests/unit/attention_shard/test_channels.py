"""Ingress and shard find each other over gRPC with the cluster's certificate, and keep everybody else out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from certificates import cluster_certificate, overwrite

from moeray.attention_shard import link as wire
from moeray.attention_shard.channels import add_port, dial
from moeray.config import ClusterTlsConfig
from moeray.mutual_tls import ClusterCertificate


@pytest.fixture
def config(tmp_path: Path) -> ClusterTlsConfig:
    return cluster_certificate(tmp_path / "ours")


@asynccontextmanager
async def shard(certificate: ClusterCertificate | None) -> AsyncIterator[str]:
    """The address of one that answers Info with its question."""

    async def info(data: bytes, _: object) -> bytes:
        return data

    server = grpc.aio.server(options=wire.CHANNEL_OPTIONS)
    methods = {"Info": grpc.unary_unary_rpc_method_handler(info)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(wire.SERVICE, methods),))
    port = add_port(server, "127.0.0.1:0", certificate)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def is_let_in(address: str, certificate: ClusterCertificate | None) -> bool:
    async with dial(address, certificate) as channel:
        try:
            return bool(await channel.unary_unary(wire.INFO)(b"x", timeout=5) == b"x")
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return False
            raise


async def test_members_of_the_cluster_alone_are_let_in(config: ClusterTlsConfig, tmp_path: Path) -> None:
    stranger = cluster_certificate(tmp_path / "theirs")
    async with shard(ClusterCertificate(config)) as address:
        assert await is_let_in(address, ClusterCertificate(config))
        assert not await is_let_in(address, None)
        assert not await is_let_in(address, ClusterCertificate(replace(stranger, ca_file=config.ca_file)))
        assert not await is_let_in(address, ClusterCertificate(replace(config, name="another")))


async def test_a_shard_of_another_cluster_is_not_spoken_to(config: ClusterTlsConfig, tmp_path: Path) -> None:
    stranger = cluster_certificate(tmp_path / "theirs")
    async with shard(ClusterCertificate(replace(stranger, ca_file=config.ca_file))) as address:
        assert not await is_let_in(address, ClusterCertificate(config))


async def test_replaced_files_count_at_the_next_connection(config: ClusterTlsConfig, tmp_path: Path) -> None:
    async with shard(ClusterCertificate(config)) as address:
        after = cluster_certificate(tmp_path / "after")
        assert len(list(overwrite(config, after))) == 3
        assert await is_let_in(address, ClusterCertificate(after))
        assert await is_let_in(address, ClusterCertificate(config))


async def test_without_a_certificate_the_port_is_plain() -> None:
    async with shard(None) as address:
        assert await is_let_in(address, None)
