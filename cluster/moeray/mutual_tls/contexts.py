"""What `ssl` and gRPC need of one cluster certificate."""

from __future__ import annotations

import logging
import socket
import ssl
from contextlib import suppress
from pathlib import Path

from moeray.config import ClusterTlsConfig, ConfigError

logger = logging.getLogger(__name__)


class CertificateError(ConfigError):
    """A file of `cluster_tls` cannot be used; the message names the key, the file and why."""


class ClusterCertificate:
    """This process' certificate, its key, and the authority that all others' must be signed by. Thread-safe."""

    def __init__(self, config: ClusterTlsConfig) -> None:
        """Read the files once, so that what is wrong with them is known at the start.

        Raises:
            CertificateError: a file is missing, is not PEM, or the key is not the certificate's.
        """
        self._config = config
        self._context(ssl.PROTOCOL_TLS_CLIENT)
        self._server = self._context(ssl.PROTOCOL_TLS_SERVER)
        self._server.sni_callback = self._renew

    @classmethod
    def of(cls, config: ClusterTlsConfig | None) -> ClusterCertificate | None:
        """None where the cluster has none. Raises as the constructor."""
        return cls(config) if config is not None and config.is_on else None

    @property
    def name(self) -> str:
        """What every certificate of the cluster bears."""
        return self._config.name

    def for_server(self) -> ssl.SSLContext:
        """For any number of connections; each handshake takes the files as they are then."""
        return self._server

    def accepting(self, connection: socket.socket) -> ssl.SSLSocket:
        """A connection that was accepted, before its handshake (`do_handshake`).

        Raises:
            OSError: the peer is gone already.
        """
        return self._server.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)

    def dialled(self, connection: socket.socket) -> ssl.SSLSocket:
        """A connection that this end has opened, after its handshake, within the connection's timeout.

        Raises (the connection is closed then):
            OSError: the handshake failed (ssl.SSLError: the other end is not of this cluster) or took too long.
            CertificateError: see above.
        """
        try:
            return self._context(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(connection, server_hostname=self.name)
        except BaseException:
            connection.close()
            raise

    def pem(self) -> tuple[bytes, bytes, bytes]:
        """Contents of key, certificate and authority, as gRPC takes them.

        Raises:
            CertificateError: see above.
        """
        config = self._config
        key, cert = _read("key_file", config.key_file), _read("cert_file", config.cert_file)
        return key, cert, _read("ca_file", config.ca_file)

    def _renew(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        try:
            connection.context = self._context(ssl.PROTOCOL_TLS_SERVER)
        except CertificateError as error:  # a rotation writes one file after the other
            logger.error("%s; the certificate from before stays in use", error)

    def _context(self, protocol: ssl._SSLMethod) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        if protocol is ssl.PROTOCOL_TLS_SERVER:
            # A ticket would be something to read on a connection whose end is told by its becoming readable.
            context.num_tickets = 0
        config, key = self._config, "cert_file"
        try:
            context.load_cert_chain(config.cert_file, config.key_file)
            key = "ca_file"
            context.load_verify_locations(config.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise CertificateError(f"cluster_tls.{key} {getattr(config, key)}: {why_unusable(error)}") from error
        return context


def hang_up(connection: socket.socket) -> None:
    """End a connection, encrypted or not, while another thread may be sending on it."""
    with suppress(OSError):  # it ended by itself
        # Not SSLSocket's own: that first makes the connection a plain one.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def why_unusable(error: OSError) -> str:
    """What is wrong with a certificate's files, by the error of `load_cert_chain`."""
    if isinstance(error, ssl.SSLError):
        mismatch = error.reason == "KEY_VALUES_MISMATCH"
        return "key_file is not its key" if mismatch else f"not a PEM file of this kind ({error.reason or error})"
    return error.strerror or str(error)


def _read(key: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CertificateError(f"cluster_tls.{key} {path}: {error.strerror or error}") from error
