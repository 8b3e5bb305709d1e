"""TLS between the cluster's own processes: each end shows a certificate that the cluster's authority has signed.

The authority signs for this cluster and nobody else: who has a certificate of it is part of the cluster. Certificates
bear one name, `cluster_tls.name`, wherever the process runs; addresses are not checked. Files are read at every
handshake, so a certificate is renewed by replacing its files; open connections stay as they are.
"""

from moeray.mutual_tls.contexts import CertificateError, ClusterCertificate, hang_up, why_unusable

__all__ = ["CertificateError", "ClusterCertificate", "hang_up", "why_unusable"]
