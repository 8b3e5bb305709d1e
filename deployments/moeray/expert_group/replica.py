"""The Serve replica of an expert group: loads its slice, serves every shard that dials in, holds no request state."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ray

from moeray.config import ClusterConfig
from moeray.controller.member import ClusterMember
from moeray.controller.settings import ControllerSettings
from moeray.membership import Role, View
from moeray.placement.machine import has_core_for_each

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from moeray.deepseek_v4 import Checkpoint, RoutedExperts
    from moeray.deepseek_v4.experts import Progress
    from moeray.transport import GroupServer, MergedCompute, ModelIdentity
    from moeray.vllm_hooks.kernel_experts import KernelExperts

REPORT_S = 0.5


class ExpertGroup:
    """Serve deployment. Its constructor returns when the weights are loaded and the port listens.

    Shards dial the port; nothing on the token's way goes through this class. It may be killed at any instant: whoever
    takes its number next loads the same slice.
    """

    async def __init__(self, config: ClusterConfig, model: str, settings: ControllerSettings) -> None:  # type: ignore[misc]
        self._stage = "starting"
        self._experts: RoutedExperts | KernelExperts | None = None
        self._server: GroupServer | None = None
        self._merged: MergedCompute | None = None
        self._address = ""
        self._num_copies = 0
        self._may_poll = False
        self._member = ClusterMember(Role.EXPERT_GROUP, settings)
        self._group = await self._member.join()
        self._member.every(REPORT_S, self._report)
        if config.pin_cores and not config.experts.num_gpus:
            self._may_poll = has_core_for_each(config.num_compute_threads)
            await self._member.take_cores(config.experts.num_threads, config.num_threads)
        identity = await asyncio.to_thread(self._load, config, model, settings)
        await self._member.identify(asdict(identity))
        await self._member.ready(self._address)
        self._member.follow(self._on_view)

    async def check_health(self) -> None:
        """Serve asks this; a group that answers can serve (a shard finds a hung one by its timeout)."""

    async def __del__(self) -> None:
        await self._member.leave()
        if self._server is not None:
            await asyncio.to_thread(self._server.stop)

    def _load(self, config: ClusterConfig, model: str, settings: ControllerSettings) -> ModelIdentity:
        """Read this group's experts and listen. Blocks; the imports alone take seconds."""
        on_gpu = config.experts.num_gpus > 0
        import torch

        from moeray.deepseek_v4 import Checkpoint, RoutedExperts
        from moeray.deepseek_v4.source import locate
        from moeray.transport import GroupServer, MergedCompute, ModelIdentity

        torch.set_num_threads(config.experts.num_threads)
        checkpoint = Checkpoint.open(locate(model))
        shape = checkpoint.shape
        placement = settings.placement(generation=0)
        held = {layer: placement.experts_of_group(self._group, layer) for layer in shape.moe_layers}
        self._num_copies = len(placement.copies_in_group(self._group, shape.moe_layers[0]))
        device = torch.device("cuda" if on_gpu else "cpu")
        self._experts = _load_experts(checkpoint, held, self._on_progress, device)
        identity = ModelIdentity(
            fingerprint=checkpoint.fingerprint(), hidden_size=shape.hidden_size, top_k=shape.top_k,
            num_experts=shape.num_experts, num_layers=shape.num_layers, dtype=shape.dtype,
        )  # fmt: skip
        if isinstance(self._experts, RoutedExperts) and self._experts.batch_invariant:
            self._merged = MergedCompute(self._experts)
        self._server = GroupServer(
            self._merged or self._experts, identity, group=self._group, generation=0,
            host=ray.util.get_node_ip_address(), backend=config.transport.backend, device=str(device),
            channel=config.transport.channel, may_poll=self._may_poll,
        )  # fmt: skip
        self._address = self._server.start()
        return identity

    def _on_progress(self, bytes_read: int, bytes_total: int) -> None:
        self._stage = f"loading experts: {bytes_read / 2**20:.0f} of {bytes_total / 2**20:.0f} MiB"

    async def _on_view(self, view: View) -> None:
        if self._server is not None and self._address in view.group_addresses:
            self._member.generation = view.generation
            self._server.set_generation(view.generation)

    async def _report(self) -> dict[str, Any]:
        if self._experts is None or not self._address:
            return {"stage": self._stage}
        tokens = self._experts.tokens()
        held = self._experts.held
        return {
            "experts": {
                "kernel": self._experts.kernel,
                "num_layers": len(held),
                "num_experts": len(next(iter(held.values()))),
                "num_copies": self._num_copies,
                "held": held,
                "bytes": self._experts.bytes_read,
                "routed_tokens": int(tokens.sum()),
                "calls_per_batch": round(self._merged.calls_per_batch, 2) if self._merged else 1.0,
                "tokens_per_layer": {layer: tokens[layer].tolist() for layer in held},
            },
            **self._member.cores(),
        }


def _load_experts(
    checkpoint: Checkpoint, held: Mapping[int, Sequence[int]], on_progress: Progress, device: torch.device
) -> RoutedExperts | KernelExperts:
    """On CPU the values in plain products, on a GPU the stored weights on vLLM's kernels; neither is a fallback."""
    if device.type == "cpu":
        from moeray.deepseek_v4 import RoutedExperts

        return RoutedExperts.load(checkpoint, held, on_progress)
    from moeray.vllm_hooks.kernel_experts import KernelExperts

    return KernelExperts.load(checkpoint, held, on_progress, device=device)
