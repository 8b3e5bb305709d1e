"""Both ends of a shard's gRPC connection, plain or with the cluster's certificate."""

from __future__ import annotations

import logging

import grpc

from moeray.attention_shard import link as wire
from moeray.mutual_tls import CertificateError, ClusterCertificate

logger = logging.getLogger(__name__)


def dial(address: str, certificate: ClusterCertificate | None) -> grpc.aio.Channel:
    """A channel to a shard; nothing is sent yet. With a certificate, to none but a shard of this cluster.

    Args:
        address: "host:port".
    Raises:
        CertificateError: a file of `cluster_tls` cannot be read.
    """
    if certificate is None:
        return grpc.aio.insecure_channel(address, options=wire.CHANNEL_OPTIONS)
    key, cert, authority = certificate.pem()
    credentials = grpc.ssl_channel_credentials(authority, key, cert)
    # Certificates bear the cluster's name, whatever the address.
    options = (*wire.CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", certificate.name))
    return grpc.aio.secure_channel(address, credentials, options=options)


def add_port(server: grpc.aio.Server, address: str, certificate: ClusterCertificate | None) -> int:
    """Let a shard's server listen; with a certificate, for processes of this cluster only. Returns the port.

    Raises:
        RuntimeError: the address is taken.
    """
    if certificate is None:
        return int(server.add_insecure_port(address))
    return int(server.add_secure_port(address, _renewed(certificate)))


def _renewed(certificate: ClusterCertificate) -> grpc.ServerCredentials:
    """Each handshake reads the files as they are then."""

    def read() -> grpc.ServerCertificateConfiguration:
        key, cert, authority = certificate.pem()
        return grpc.ssl_server_certificate_configuration([(key, cert)], authority)

    def newest() -> grpc.ServerCertificateConfiguration | None:
        try:
            return read()
        except CertificateError as error:
            logger.error("%s; the certificate from before stays in use", error)
            return None

    return grpc.dynamic_ssl_server_credentials(read(), newest, require_client_authentication=True)
