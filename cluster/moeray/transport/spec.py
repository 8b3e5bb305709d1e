"""What a shard brings to its transport, and the sizes that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeray.config import ChannelUsers, ClusterTlsConfig, RowFormatName
from moeray.transport.errors import TransportError
from moeray.transport.handshake import ModelIdentity
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
        patience_s: where every expert has a copy elsewhere, a group is lost when it is so much later than expected.
        host: the address this end listens on and dials from.
        device: where x lives ("cpu", "cuda:0").
        connect_timeout_s: for handshakes and for building the links.
        channel: with whose groups on this node rows go through shared memory instead of the backend (gloo only).
        dispatch_format: how rows travel to the groups, see rows.py.
        reserved: memory on the device for the messages, see `room_for`; None allocates it. Unused by channels.
        tls: encrypts what goes between nodes (gloo only); the groups have it, too.
        spin_s: how long a wait on a channel may poll before it sleeps; 0 where the core is not this shard's alone.
    """

    shard: str
    backend: str
    identity: ModelIdentity
    max_tokens: int
    shard_number: int = 0
    timeout_s: float = 10.0
    patience_s: float = 1.0
    host: str = "127.0.0.1"
    device: str = "cpu"
    connect_timeout_s: float = 30.0
    channel: ChannelUsers = "same_user"
    dispatch_format: RowFormatName = "plain"
    spin_s: float = 0.0
    reserved: Tensor | None = None
    tls: ClusterTlsConfig = field(default_factory=ClusterTlsConfig)

    @property
    def geometry(self) -> Geometry:
        """Sizes of what this shard sends and receives."""
        return geometry_of(self.identity, self.dispatch_format)


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
