"""What the shard process asks of its EngineCore by `collective_rpc` (vLLM's `worker_extension_cls`).

The names start with `moeray_` because vLLM mixes this class into its own worker.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache
from time import monotonic
from typing import Any

import torch

from moeray.deepseek_v4 import Checkpoint, CheckpointError, RoutedExperts
from moeray.engram import PatientRows
from moeray.health import guard
from moeray.placement import Placement
from moeray.transport import ModelIdentity, Transport, TransportSpec, connect
from moeray.vllm_hooks import continued_requests, micro_batch_choice
from moeray.vllm_hooks.engram_layer import EngramLayer
from moeray.vllm_hooks.executor import step_counts, step_limit
from moeray.vllm_hooks.hop import Connect, OnWaiting, hop
from moeray.vllm_hooks.kv_settings import CONNECTOR
from moeray.vllm_hooks.loader import last_report
from moeray.vllm_hooks.micro_batches import hop_report, second_hop
from moeray.vllm_hooks.route import Route
from moeray.vllm_hooks.route_feed import RouteFeed
from moeray.vllm_hooks.settings import ShardSettings, shard_settings
from moeray.vllm_hooks.warm_up import compile_logprobs

continued_requests.install()


class WorkerExtension:
    """Mixed into vLLM's worker; holds no state of its own."""

    vllm_config: Any
    model_runner: Any

    def moeray_guard(self, hang_s: float, step_s: float) -> None:
        """Have this process killed when it hangs; call it once, when all is loaded.

        Args:
            hang_s: it may give no sign of life for so long.
            step_s: one step may take so long, without what it waits for experts.
        Raises:
            OSError: no further process can be started.
        """
        guard(hang_s)
        step_limit.start(step_s)

    def moeray_warm_up(self) -> None:
        """Compile what vLLM would compile in a step: see `warm_up`."""
        compile_logprobs(self.vllm_config.model_config.get_vocab_size(), self.model_runner.device)

    def moeray_follow_routes(self, address: str) -> None:
        """Take routes from the shard process from now on, in a thread beside the steps.

        Args:
            address: abstract AF_UNIX name of its listener, see `RouteFeed`.
        Raises:
            OSError: nobody listens there.
        """
        rows = getattr(self.model_runner.get_model(), "engram_rows", None)
        served = rows if isinstance(rows, PatientRows) else None
        feed = RouteFeed(
            address,
            lambda: [hop, second_hop] if micro_batch_choice.wants_halves() else [hop],
            served.move if served is not None else lambda _: None,
        )
        _set_up_hops(self.vllm_config, feed)
        if served is not None:
            served.on_waiting = _on_waiting(feed)

    def moeray_connect(self, placement: dict[str, Any], addresses: list[str]) -> int:
        """Move to this route between two steps, for an engine without a feed (in its caller's own process).

        Args:
            placement: `Placement.to_json()`.
            addresses: one per expert group, in group order; ignored by the local backend.
        Returns:
            The generation now in use.
        Raises:
            TransportError: a group cannot be reached or refuses.
        """
        _set_up_hops(self.vllm_config, None)
        route = Route(Placement.from_json(placement), tuple(addresses), tuple(addresses))
        hop.follow(route)
        self.moeray_choose_micro_batches()
        return route.generation

    def moeray_choose_micro_batches(self) -> None:
        """Once the first route is taken, before the first request: see `micro_batch_choice.prepare`.

        Raises:
            TransportError: a group was lost, or refused the second connection.
        """
        if hop.route is not None:
            micro_batch_choice.prepare(self.model_runner, _settings(self.vllm_config).micro_batches, hop.route)

    def moeray_tensors(self) -> dict[str, Any]:
        """Every parameter and buffer of the shard, what was read from disk and what is mapped.

        Returns:
            {"parameters": {name: {"shape": [...], "dtype": str, "bytes": int}}, "parameter_bytes": int,
             "read": [names], "skipped": [names], "bytes_read": int, "checkpoint_bytes": int, "mapped_bytes": int,
             "local_expert_bytes": int (0 but for the local backend),
             "identity": `ModelIdentity` of what was loaded; empty where experts are not ours}
            Where vLLM reads the checkpoint itself, nothing is known of the disk: empty lists and zeros.
        """
        settings = shard_settings(self.vllm_config)
        model = self.model_runner.get_model()
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        parameters = {
            name: {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "bytes": tensor.nbytes,
            }
            for name, tensor in tensors.items()
        }
        report = last_report()
        local = _local_experts(settings, self.vllm_config)
        return {
            "parameters": parameters,
            "parameter_bytes": sum(each["bytes"] for each in parameters.values()),
            "read": list(report.names) if report else [],
            "skipped": list(report.skipped) if report else [],
            "bytes_read": report.bytes_read if report else 0,
            "checkpoint_bytes": report.bytes_total if report else 0,
            "mapped_bytes": sum(each.table.mapped_bytes for each in model.modules() if isinstance(each, EngramLayer)),
            "identity": asdict(_identity(Checkpoint.open(settings.checkpoint), self.vllm_config)) if settings else {},
            "local_expert_bytes": local.weight_bytes if local is not None else 0,
        }

    def moeray_hop(self) -> dict[str, Any]:
        """Costs of the hop since the last connect: see `HopCosts`, plus `generation`, `stages` and `micro_batches`.

        `steps` and `step_tokens` count those that computed something, `steps_us` is the time in them, `at_us` now by a
        clock of this process; 0 where vLLM's workers are processes of their own.
        """
        steps = {"steps": step_counts.steps, "step_tokens": step_counts.tokens, "steps_us": 1e6 * step_limit.spent_s}
        return {**hop_report(), **steps, "at_us": 1e6 * monotonic()}

    def moeray_kv_cache(self) -> dict[str, Any]:
        """What the KV tier did since the engine began: see `KvTierConnector.report`; empty without one.

        Where vLLM's workers are processes of their own, the scheduler is in none of them: empty, too.
        """
        transfer = self.vllm_config.kv_transfer_config
        if transfer is None or transfer.kv_connector != CONNECTOR:
            return {}
        from moeray.vllm_hooks.kv_connector import scheduler_connectors  # imports vLLM's offloading, where it is used

        return scheduler_connectors[0].report() if scheduler_connectors else {}


def _on_waiting(feed: RouteFeed | None) -> OnWaiting:
    def on_waiting(waits: bool) -> None:
        step_limit.is_excused = waits  # `wait_s` is its limit
        if feed is not None:
            feed.waiting(waits)

    return on_waiting


def _set_up_hops(vllm_config: Any, feed: RouteFeed | None) -> None:
    settings = _settings(vllm_config)
    second = replace(settings, shard=f"{settings.shard} (second half)")
    for each, own in ((hop, settings), (second_hop, second)):
        accuse = feed.accuse if feed is not None else None
        each.set_up(_connector(own, vllm_config), accuse, settings.wait_s, _on_waiting(feed))


def _settings(vllm_config: Any) -> ShardSettings:
    settings = shard_settings(vllm_config)
    if settings is None:
        raise RuntimeError("this engine was started without moeray's settings (additional_config['moeray'])")
    return settings


def _connector(settings: ShardSettings, vllm_config: Any) -> Connect:
    """How this shard's hop connects."""
    spec = TransportSpec(
        shard=settings.shard,
        shard_number=settings.number,
        backend=settings.backend,
        identity=_identity(Checkpoint.open(settings.checkpoint), vllm_config),
        max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        timeout_s=settings.timeout_s,
        patience_s=settings.patience_s,
        host=settings.host,
        channel=settings.channel,
        dispatch_format=settings.dispatch_format,
        spin_s=settings.spin_s,
        tls=settings.tls,
        device=str(vllm_config.device_config.device),
    )

    def connector(route: Route, absent: frozenset[int], in_a_hurry: bool) -> Transport:
        timeout_s = min(spec.connect_timeout_s, 2 * spec.patience_s) if in_a_hurry else spec.connect_timeout_s
        now = replace(spec, reserved=hop.reserved, connect_timeout_s=timeout_s)
        experts = _local_experts(settings, vllm_config)
        return connect(now, route.placement, route.addresses, experts, absent=absent)

    return connector


def _identity(checkpoint: Checkpoint, vllm_config: Any) -> ModelIdentity:
    """Of what this shard has loaded, whatever lies in the directory by now."""
    shape = checkpoint.shape
    return ModelIdentity(
        fingerprint=_loaded_fingerprint(),
        hidden_size=shape.hidden_size,
        num_experts=shape.num_experts,
        num_layers=shape.num_layers,
        top_k=shape.top_k,
        dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
    )


def _loaded_fingerprint() -> str:
    report = last_report()
    if report is None:
        raise RuntimeError("this engine has loaded no checkpoint with moeray's loader")
    return report.fingerprint


def _local_experts(settings: ShardSettings | None, vllm_config: Any) -> RoutedExperts | None:
    """All experts, in the shard itself, for the local backend; None otherwise."""
    if settings is None or settings.backend != "local":
        return None
    return _all_experts(settings, vllm_config.model_config.dtype)


@cache
def _all_experts(settings: ShardSettings, dtype: torch.dtype) -> RoutedExperts:
    """For the local backend only: read once, kept for later generations."""
    checkpoint = Checkpoint.open(settings.checkpoint)
    everything = dict.fromkeys(checkpoint.shape.moe_layers, range(checkpoint.shape.num_experts))
    experts = RoutedExperts.load(checkpoint, everything, dtype=dtype)
    if checkpoint.fingerprint() != _loaded_fingerprint():
        raise CheckpointError(
            settings.checkpoint, "was replaced after the shard had loaded it", "start the shard again"
        )
    return experts
