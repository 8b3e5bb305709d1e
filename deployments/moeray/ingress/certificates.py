"""The front door's certificates: read from their files at the start, and again whenever these change.

A handshake takes the newest that are good; connections that are open stay as they are. Files that do not fit together
(a rotation writes one after the other) change nothing until they do.
"""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from moeray.config import TlsConfig
from moeray.ingress.errors import BadCertificate
from moeray.mutual_tls import why_unusable

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""How old what a handshake takes may be."""
TLS_PEER = "tls_peer"
"""In an HTTP request's `state`: names of the client's certificate."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One good set, in the form that each server wants."""

    http: ssl.SSLContext
    grpc: grpc.ServerCertificateConfiguration


class Certificates:
    """Those of one ingress. Thread-safe: gRPC asks from threads of its own."""

    def __init__(self, config: TlsConfig) -> None:
        """Read the files.

        Raises:
            BadCertificate: a file is missing, is not PEM, or the key is not the certificate's.
        """
        self._config = config
        self._lock = threading.Lock()
        self._seen = self._versions()
        self._loaded = self._load()
        self._looked_at = monotonic()

    def for_http(self) -> ssl.SSLContext:
        """For a server: each handshake gets the newest certificates."""
        context = _context(self._config)

        def newest(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            connection.context = self._newest().http

        context.sni_callback = newest
        return context

    def for_grpc(self) -> grpc.ServerCredentials:
        """For a server: each handshake gets the newest certificates."""
        return grpc.dynamic_ssl_server_credentials(
            self._loaded.grpc,
            lambda: self._newest().grpc,
            require_client_authentication=bool(self._config.client_ca_file),
        )

    def _newest(self) -> _Loaded:
        with self._lock:
            if monotonic() - self._looked_at >= LOOK_S:
                self._looked_at = monotonic()
                self._look()
            return self._loaded

    def _look(self) -> None:
        versions = self._versions()
        if versions == self._seen:
            return
        try:
            self._loaded = self._load()
        except BadCertificate as error:
            logger.error("%s; the certificates from before stay in use", error)
        else:
            logger.info("ingress.tls: the certificates have changed and are in use")
        self._seen = versions

    def _versions(self) -> list[tuple[int, int, int] | None]:
        """What tells that a file was replaced, be it behind a symbolic link."""
        return [_version(path) for path in (self._config.cert_file, self._config.key_file, self._config.client_ca_file)]

    def _load(self) -> _Loaded:
        config = self._config
        key, cert = _read("ingress.tls.key_file", config.key_file), _read("ingress.tls.cert_file", config.cert_file)
        roots = _read("ingress.tls.client_ca_file", config.client_ca_file) if config.client_ca_file else None
        return _Loaded(_context(config), grpc.ssl_server_certificate_configuration([(key, cert)], roots))


class HttpProtocol(HttpToolsProtocol):
    """Tells each request who its connection's client is."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        if tls is not None:
            self.app_state = {**self.app_state, TLS_PEER: names_in(tls.getpeercert() or {})}


def names_in(certificate: dict[str, object]) -> tuple[str, ...]:
    """Names that a checked certificate gives its owner: alternative names, and the subject's common name.

    Args:
        certificate: as `ssl.SSLSocket.getpeercert` gives it; empty without one.
    """
    alternative = [value for _, value in certificate.get("subjectAltName", ())]  # type: ignore[attr-defined]
    subject = [pair for parts in certificate.get("subject", ()) for pair in parts]  # type: ignore[attr-defined]
    return (*alternative, *(value for name, value in subject if name == "commonName"))


def _context(config: TlsConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    key, path = "ingress.tls.cert_file", config.cert_file
    try:
        context.load_cert_chain(config.cert_file, config.key_file)
        if config.client_ca_file:
            key, path = "ingress.tls.client_ca_file", config.client_ca_file
            context.load_verify_locations(config.client_ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
            # A session that is taken up again shows no certificate, whoever may have been struck off meanwhile.
            context.num_tickets, context.minimum_version = 0, ssl.TLSVersion.TLSv1_3
    except (OSError, ssl.SSLError) as error:
        raise BadCertificate(key, path, why_unusable(error)) from error
    return context


def _read(key: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadCertificate(key, path, error.strerror or str(error)) from error


def _version(path: str) -> tuple[int, int, int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
