"""`connect`: from addresses to a usable transport, or a typed error."""

from __future__ import annotations

from collections.abc import Sequence

from moeray.mutual_tls import CertificateError, ClusterCertificate
from moeray.placement import Placement
from moeray.transport.all_to_all import AllToAllTransport
from moeray.transport.errors import TransportError
from moeray.transport.handshake import Hello
from moeray.transport.interface import ExpertCompute, Transport
from moeray.transport.links import build_links
from moeray.transport.local import LocalTransport
from moeray.transport.rendezvous import ShardRendezvous
from moeray.transport.rows import row_format
from moeray.transport.spec import TransportSpec, dtype_of


def connect(
    spec: TransportSpec,
    placement: Placement,
    addresses: Sequence[str],
    compute: ExpertCompute | None = None,
    *,
    absent: frozenset[int] = frozenset(),
) -> Transport:
    """Build the transport of this shard under this placement.

    Args:
        addresses: "host:port" of every group's `GroupServer`, in group order; empty for the local backend.
        compute: all experts, for the local backend only.
        absent: groups of the placement to do without; copies elsewhere take their experts' tokens.
    Raises:
        PeerLost: a group cannot be reached.
        HandshakeRefused: a group serves another model, generation, backend or index; names both values.
        TransportError: the arguments do not fit together, or this end cannot be built.
    """
    if spec.backend == "local":
        if compute is None:
            raise TransportError("the local backend needs the experts' computation in this process")
        rows = row_format(spec.dispatch_format, spec.identity.hidden_size, dtype_of(spec.identity))
        return LocalTransport(placement, compute, spec.shard_number, rows)
    _check(spec, placement, addresses)
    present = [group for group in range(placement.num_groups) if group not in absent]
    if not present:
        raise TransportError(f"none of the {placement.num_groups} expert groups is there")
    geometry = spec.geometry
    hello = Hello(
        sender=f"shard {spec.shard}",
        backend=spec.backend,
        group=0,
        generation=placement.generation,
        inline_rows=geometry.inline_rows,
        max_tokens=spec.max_tokens,
        dispatch_format=spec.dispatch_format,
        identity=spec.identity,
    )
    reached = {group: addresses[group] for group in present}
    try:
        certificate = ClusterCertificate.of(spec.tls)
    except CertificateError as error:
        raise TransportError(str(error)) from error
    rendezvous = ShardRendezvous.dial(reached, hello, spec.host, spec.connect_timeout_s, certificate)
    links, failure = build_links(spec, rendezvous)
    if links is None:
        rendezvous.close()
        raise failure or TransportError("no link")
    transport = AllToAllTransport(spec, links, rendezvous, placement)
    del links
    try:
        transport.probe(spec.connect_timeout_s)
    except TransportError:
        transport.close()
        raise
    return transport


def _check(spec: TransportSpec, placement: Placement, addresses: Sequence[str]) -> None:
    if len(addresses) != placement.num_groups:
        raise TransportError(f"{len(addresses)} addresses for a placement over {placement.num_groups} expert groups")
    if placement.num_experts != spec.identity.num_experts or placement.num_layers != spec.identity.num_layers:
        raise TransportError(
            f"the placement maps {placement.num_layers} layers of {placement.num_experts} experts, "
            f"the model has {spec.identity.num_layers} of {spec.identity.num_experts}"
        )
