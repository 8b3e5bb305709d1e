"""`connect`: from addresses to a usable transport, or a typed error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeray.config import ChannelUsers, RowFormatName
from moeray.placement import Placement
from moeray.transport.all_to_all import AllToAllTransport
from moeray.transport.errors import TransportError
from moeray.transport.handshake import Hello, ModelIdentity
from moeray.transport.interface import ExpertCompute, Transport
from moeray.transport.links import build_links
from moeray.transport.local import LocalTransport
from moeray.transport.rendezvous import ShardRendezvous
from moeray.transport.rows import row_format
from moeray.transport.wire import Geometry, inline_rows_for

INLINE_BYTES = 64 * 1024  # per group and layer call; bounds what a decode step sends in vain


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportSpec:
    """What a shard brings to its transport.

    Attributes:
        shard: its name, for the groups' logs.
        shard_number: which of an expert's copies serve it; see `Placement.group_of_expert`.
        backend: gloo, nccl or local.
        identity: of the model it serves.
        max_tokens: most tokens of one layer call.
        timeout_s: a group that has not answered a layer call by then is lost.
        host: the address this end listens on and dials from.
        device: where x lives ("cpu", "cuda:0").
        connect_timeout_s: for handshakes and for building the links.
        channel: with whose groups on this node rows go through shared memory instead of the backend (gloo only).
        dispatch_format: how rows travel to the groups, see rows.py.
        reserved: memory on the device for the messages, see `room_for`; None allocates it. Unused by channels.
        spin_s: how long a wait on a channel may poll before it sleeps; 0 where the core is not this shard's alone.
    """

    shard: str
    backend: str
    identity: ModelIdentity
    max_tokens: int
    shard_number: int = 0
    timeout_s: float = 10.0
    host: str = "127.0.0.1"
    device: str = "cpu"
    connect_timeout_s: float = 30.0
    channel: ChannelUsers = "same_user"
    dispatch_format: RowFormatName = "plain"
    spin_s: float = 0.0
    reserved: Tensor | None = None


def connect(
    spec: TransportSpec, placement: Placement, addresses: Sequence[str], compute: ExpertCompute | None = None
) -> Transport:
    """Build the transport of this shard under this placement.

    Args:
        addresses: "host:port" of every group's `GroupServer`, in group order; empty for the local backend.
        compute: all experts, for the local backend only.
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
    if len(addresses) != placement.num_groups:
        raise TransportError(f"{len(addresses)} addresses for a placement over {placement.num_groups} expert groups")
    if placement.num_experts != spec.identity.num_experts or placement.num_layers != spec.identity.num_layers:
        raise TransportError(
            f"the placement maps {placement.num_layers} layers of {placement.num_experts} experts, "
            f"the model has {spec.identity.num_layers} of {spec.identity.num_experts}"
        )
    geometry = geometry_of(spec.identity, spec.dispatch_format)
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
    rendezvous = ShardRendezvous.dial(addresses, hello, spec.host, spec.connect_timeout_s)
    links, failure = build_links(
        rendezvous,
        placement.num_groups,
        geometry,
        backend=spec.backend,
        users=spec.channel,
        host=spec.host,
        device=torch.device(spec.device),
        max_tokens=spec.max_tokens,
        connect_timeout_s=spec.connect_timeout_s,
        spin_s=spec.spin_s,
        reserved=spec.reserved,
    )
    if links is None:
        rendezvous.close()
        raise failure or TransportError("no link")
    transport = AllToAllTransport(
        links,
        rendezvous,
        placement,
        geometry,
        timeout_s=spec.timeout_s,
        max_tokens=spec.max_tokens,
        shard=spec.shard_number,
    )
    del links
    try:
        transport.probe(spec.connect_timeout_s)
    except TransportError:
        transport.close()
        raise
    return transport


def geometry_of(
    identity: ModelIdentity, dispatch_format: RowFormatName = "plain", inline_rows: int | None = None
) -> Geometry:
    """Sizes on the wire; both ends compute them from the agreed identity.

    Args:
        inline_rows: as the shard says; None for what fits into INLINE_BYTES.
    """
    dtype = dtype_of(identity)
    if inline_rows is None:
        row_bytes = row_format(dispatch_format, identity.hidden_size, dtype).row_bytes
        inline_rows = inline_rows_for(row_bytes, INLINE_BYTES)
    return Geometry(identity.hidden_size, identity.top_k, dtype, inline_rows, dispatch_format)


def dtype_of(identity: ModelIdentity) -> torch.dtype:
    """Rows' dtype.

    Raises:
        TransportError: not a torch dtype.
    """
    dtype = getattr(torch, identity.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise TransportError(f"dtype {identity.dtype!r} of the model is not one of torch")
    return dtype
