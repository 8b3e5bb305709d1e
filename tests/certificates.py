"""Certificates for tests: an authority that signs names."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from moeray.config import ClusterTlsConfig

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Signed:
    """PEM files of one owner."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates; `file` is its own."""

    def __init__(self, folder: Path, name: str = "test authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.file = folder / f"{name.replace(' ', '-')}.pem"
        self.file.write_bytes(_pem(self._certificate(self._name, self._key.public_key(), is_authority=True)))

    def sign(self, name: str, *, into: Path | None = None) -> Signed:
        """A certificate of this name, good for it and for 127.0.0.1.

        Args:
            into: where to write it, over what is there.
        """
        folder = into or self._folder
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        signed = Signed(folder / "tls.crt", folder / "tls.key") if into else Signed(
            folder / f"{name}.crt", folder / f"{name}.key"
        )  # fmt: skip
        signed.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        signed.cert.write_bytes(_pem(self._certificate(subject, key.public_key(), name=name)))
        return signed

    def _certificate(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, name: str = "", is_authority: bool = False
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder(self._name, subject, key, x509.random_serial_number(), now - DAY, now + DAY)
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        )  # fmt: skip
        if name:
            address = ipaddress.ip_address("127.0.0.1")
            names = x509.SubjectAlternativeName([x509.DNSName(name), x509.IPAddress(address)])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def cluster_certificate(folder: Path, name: str = "moeray") -> ClusterTlsConfig:
    """`cluster_tls` of a cluster with an authority of its own."""
    authority = Authority(folder, "cluster authority")
    own = authority.sign(name)
    return ClusterTlsConfig(str(own.cert), str(own.key), str(authority.file), name)


def overwrite(config: ClusterTlsConfig, renewed: ClusterTlsConfig) -> Iterator[str]:
    """Put what `renewed` has into the files of `config`, one after the other; gives the key of each before it does."""
    for key in ("key_file", "cert_file", "ca_file"):
        yield key
        Path(getattr(config, key)).write_bytes(Path(getattr(renewed, key)).read_bytes())
