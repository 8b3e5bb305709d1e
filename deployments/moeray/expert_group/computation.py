"""A group's computation and its listener, with nothing loaded yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moeray.config import ClusterConfig
from moeray.deepseek_v4 import Checkpoint, RoutedExperts
from moeray.deepseek_v4.source import locate
from moeray.expert_group.self_test import SelfTest
from moeray.transport import BusyCompute, GroupServer, MergedCompute, ModelIdentity

if TYPE_CHECKING:
    from moeray.vllm_hooks.kernel_experts import KernelExperts


@dataclass(frozen=True, slots=True)
class Computation:
    """What one group computes with.

    Attributes:
        layers: that have routed experts.
        busy: the experts, and how long they compute.
        merged: between server and experts, where calls may be computed together.
        address: "host:port" that `server` listens on.
    """

    identity: ModelIdentity
    layers: tuple[int, ...]
    experts: RoutedExperts | KernelExperts
    busy: BusyCompute
    merged: MergedCompute | None
    server: GroupServer
    address: str


def start_computation(
    config: ClusterConfig, model: str, *, host: str, may_poll: bool, on_broken: Callable[[Exception], None]
) -> Computation:
    """Open the checkpoint, and listen on `host`; every shard is refused until generations are served. Blocks.

    Args:
        on_broken: called by a thread when the group fails at rows of its own; see `SelfTest`.
    Raises:
        CheckpointError: the checkpoint cannot be served.
        OSError: nothing can be bound there.
        CertificateError: a file of `cluster_tls` cannot be used.
    """
    torch.set_num_threads(config.experts.num_threads)
    checkpoint = Checkpoint.open(locate(model))
    shape = checkpoint.shape
    device = torch.device("cuda" if config.experts.num_gpus > 0 else "cpu")
    experts = _no_experts(checkpoint, device)
    identity = ModelIdentity(
        fingerprint=checkpoint.fingerprint(), hidden_size=shape.hidden_size, top_k=shape.top_k,
        num_experts=shape.num_experts, num_layers=shape.num_layers, dtype=shape.dtype,
    )  # fmt: skip
    busy = BusyCompute(experts)
    merged = MergedCompute(busy) if isinstance(experts, RoutedExperts) and experts.batch_invariant else None
    test = SelfTest(experts, lambda: experts.held, identity, device, on_broken)
    server = GroupServer(
        merged or busy, identity, host=host, backend=config.transport.backend, device=str(device),
        channel=config.transport.channel, may_poll=may_poll, tls=config.cluster_tls, on_failure=test.after_failure,
    )  # fmt: skip
    return Computation(identity, tuple(shape.moe_layers), experts, busy, merged, server, server.start())


def _no_experts(checkpoint: Checkpoint, device: torch.device) -> RoutedExperts | KernelExperts:
    """On CPU the values in plain products, on a GPU the stored weights on vLLM's kernels; neither is a fallback."""
    if device.type == "cpu":
        return RoutedExperts(checkpoint)
    from moeray.vllm_hooks.kernel_experts import KernelExperts

    return KernelExperts(checkpoint, device=device)
