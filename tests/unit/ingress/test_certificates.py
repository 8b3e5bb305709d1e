"""Real handshakes over loopback: HTTPS by uvicorn, gRPC by grpc.aio."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from certificates import Authority, Signed
from fastapi import FastAPI, Request

from moeray.config import ConfigError, TlsConfig, parse_config
from moeray.ingress import certificates
from moeray.ingress.arrivals import Arrivals
from moeray.ingress.certificates import TLS_PEER, Certificates
from moeray.ingress.errors import BadCertificate
from moeray.ingress.http_server import start_http

METHOD = "/test.Names/Mine"


@dataclass
class Ports:
    http: int
    grpc: int


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture(autouse=True)
def _look_at_every_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "LOOK_S", 0.0)


def config_of(signed: Signed, client_ca: Path | None = None) -> TlsConfig:
    return TlsConfig(str(signed.cert), str(signed.key), str(client_ca or ""))


@asynccontextmanager
async def serving(config: TlsConfig) -> AsyncIterator[Ports]:
    """Both servers; each tells a client the names in its certificate."""
    known = Certificates(config)
    app = FastAPI()

    @app.get("/")
    async def names(request: Request) -> list[str]:
        return list(getattr(request.state, TLS_PEER, ()))

    async def mine(_: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        return b",".join(context.auth_context().get("x509_subject_alternative_name", ()))

    listener = socket.create_server(("127.0.0.1", 0))
    server = await start_http(app, listener, Arrivals(), known)
    rpc = grpc.aio.server()
    service, method = METHOD.strip("/").split("/")
    handlers = {method: grpc.unary_unary_rpc_method_handler(mine)}
    rpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = rpc.add_secure_port("127.0.0.1:0", known.for_grpc())
    await rpc.start()
    try:
        yield Ports(listener.getsockname()[1], port)
    finally:
        await rpc.stop(0)
        await server.end(0.0)


async def over_https(port: int, ca: Path, client: Signed | None = None) -> list[str]:
    context = ssl.create_default_context(cafile=ca)
    if client is not None:
        context.load_cert_chain(client.cert, client.key)
    async with httpx.AsyncClient(verify=context, trust_env=False) as session:
        answer: list[str] = (await session.get(f"https://127.0.0.1:{port}/")).json()
    return answer


async def over_grpc(port: int, ca: Path, client: Signed | None = None) -> list[str]:
    pair = (client.key.read_bytes(), client.cert.read_bytes()) if client is not None else (None, None)
    credentials = grpc.ssl_channel_credentials(await asyncio.to_thread(ca.read_bytes), *pair)
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
        answer: bytes = await channel.unary_unary(METHOD)(b"", timeout=60)
    return answer.decode().split(",") if answer else []


REFUSED = (httpx.TransportError, ssl.SSLError, grpc.aio.AioRpcError)


async def test_both_ports_speak_tls(authority: Authority) -> None:
    async with serving(config_of(authority.sign("localhost"))) as ports:
        assert await over_https(ports.http, authority.file) == []
        assert await over_grpc(ports.grpc, authority.file) == []


async def test_with_a_client_ca_a_client_is_known_by_its_certificate_and_refused_without(
    authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "stranger").sign("team-a")
    async with serving(config_of(authority.sign("localhost"), authority.file)) as ports:
        known = authority.sign("team-a")
        for ask, port in ((over_https, ports.http), (over_grpc, ports.grpc)):
            assert "team-a" in await ask(port, authority.file, known)
            for unknown in (None, stranger):
                with pytest.raises(REFUSED):
                    await ask(port, authority.file, unknown)


async def test_new_files_are_used_without_a_restart_and_broken_ones_change_nothing(
    authority: Authority, tmp_path: Path
) -> None:
    folder = tmp_path / "mounted"
    folder.mkdir()
    signed, new = authority.sign("localhost", into=folder), Authority(tmp_path / "new", "new authority")
    async with serving(config_of(signed)) as ports:
        await both(ports, authority.file)
        signed.cert.write_text("not a certificate")
        await both(ports, authority.file)
        new.sign("localhost", into=folder)
        await both(ports, new.file)
        with pytest.raises(REFUSED):
            await both(ports, authority.file)


async def test_a_mounted_secret_is_replaced_behind_a_symbolic_link(authority: Authority, tmp_path: Path) -> None:
    old, new = Authority(tmp_path / "old-ca", "old"), Authority(tmp_path / "new-ca", "new")
    for name, by in (("v1", old), ("v2", new)):
        (tmp_path / name).mkdir()
        by.sign("localhost", into=tmp_path / name)
    link = tmp_path / "data"
    link.symlink_to(tmp_path / "v1")
    async with serving(config_of(Signed(link / "tls.crt", link / "tls.key"))) as ports:
        await both(ports, old.file)
        (tmp_path / "swap").symlink_to(tmp_path / "v2")
        (tmp_path / "swap").rename(link)
        await both(ports, new.file)


async def test_an_authority_that_is_replaced_is_believed_no_more(authority: Authority, tmp_path: Path) -> None:
    leaving, coming = Authority(tmp_path / "a", "leaving"), Authority(tmp_path / "b", "coming")
    bundle = tmp_path / "clients.pem"
    shutil.copy(leaving.file, bundle)
    async with serving(config_of(authority.sign("localhost"), bundle)) as ports:
        await both(ports, authority.file, leaving.sign("team"))
        shutil.copy(coming.file, bundle)
        await both(ports, authority.file, coming.sign("team"))
        for ask, port in ((over_https, ports.http), (over_grpc, ports.grpc)):
            with pytest.raises(REFUSED):
                await ask(port, authority.file, leaving.sign("team"))


async def test_no_session_outlives_the_authority_of_its_client(authority: Authority, tmp_path: Path) -> None:
    leaving, coming = Authority(tmp_path / "a", "leaving"), Authority(tmp_path / "b", "coming")
    bundle = tmp_path / "clients.pem"
    shutil.copy(leaving.file, bundle)
    client = leaving.sign("team")
    context = ssl.create_default_context(cafile=authority.file)
    context.load_cert_chain(client.cert, client.key)

    def ask(port: int, session: ssl.SSLSession | None = None) -> tuple[bytes, ssl.SSLSession | None]:
        with (
            socket.create_connection(("127.0.0.1", port), 30) as plain,
            context.wrap_socket(plain, server_hostname="localhost", session=session) as connection,
        ):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            if not (answer := connection.recv(1 << 16)):
                raise ssl.SSLError("hung up")
            return answer, connection.session

    async with serving(config_of(authority.sign("localhost"), bundle)) as ports:
        answer, session = await asyncio.to_thread(ask, ports.http)
        assert answer.startswith(b"HTTP/1.1 200")
        shutil.copy(coming.file, bundle)
        with pytest.raises(REFUSED):
            await asyncio.to_thread(ask, ports.http, session)
        context.maximum_version = ssl.TLSVersion.TLSv1_2  # it has sessions without tickets, too
        with pytest.raises(REFUSED):
            await asyncio.to_thread(ask, ports.http)


async def both(ports: Ports, ca: Path, client: Signed | None = None) -> None:
    await asyncio.gather(over_https(ports.http, ca, client), over_grpc(ports.grpc, ca, client))


def test_files_that_cannot_be_used_are_named_with_their_key(authority: Authority, tmp_path: Path) -> None:
    signed, other, garbage = authority.sign("localhost"), authority.sign("other"), tmp_path / "garbage"
    garbage.write_text("garbage")
    for config, key in [
        (TlsConfig(str(tmp_path / "none"), str(signed.key)), "cert_file"),
        (TlsConfig(str(signed.cert), str(tmp_path / "none")), "key_file"),
        (TlsConfig(str(signed.cert), str(other.key)), "cert_file.*key_file is not its key"),
        (TlsConfig(str(signed.cert), str(signed.key), str(garbage)), "client_ca_file"),
    ]:
        with pytest.raises(BadCertificate, match=rf"ingress\.tls\.{key}"):
            Certificates(config)


@pytest.mark.parametrize("tls", [{"cert_file": "c"}, {"key_file": "k"}, {"client_ca_file": "a"}])
def test_half_a_configuration_is_refused(tls: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"ingress\.tls"):
        parse_config({"ingress": {"tls": tls}})
