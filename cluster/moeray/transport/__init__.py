"""How dispatch and combine move bytes between an attention shard and the expert groups."""

from moeray.transport.busy import BusyCompute
from moeray.transport.connection import connect
from moeray.transport.errors import (
    ExpertsMissing,
    GroupFailed,
    HandshakeRefused,
    PeerLost,
    StaleGeneration,
    TransportError,
)
from moeray.transport.handshake import ModelIdentity
from moeray.transport.interface import DispatchHandle, ExpertCompute, Transport
from moeray.transport.local import LocalTransport
from moeray.transport.merging import MergedCompute
from moeray.transport.server import GroupServer
from moeray.transport.spec import TransportSpec
from moeray.transport.timings import HopTimings

__all__ = [
    "BusyCompute",
    "DispatchHandle",
    "ExpertCompute",
    "ExpertsMissing",
    "GroupFailed",
    "GroupServer",
    "HandshakeRefused",
    "HopTimings",
    "LocalTransport",
    "MergedCompute",
    "ModelIdentity",
    "PeerLost",
    "StaleGeneration",
    "Transport",
    "TransportError",
    "TransportSpec",
    "connect",
]
