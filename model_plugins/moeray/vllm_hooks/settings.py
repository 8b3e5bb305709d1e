"""What a shard's EngineCore must know, carried by vLLM's `additional_config` and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moeray.config import ChannelUsers, ClusterTlsConfig, EngramConfig, MicroBatches, RowFormatName

ADDITIONAL_CONFIG_KEY = "moeray"
SPIN_S = 200e-6
"""How long a shard with cores of its own polls for its groups' answers: a few times what waking it up would cost."""
BACKENDS = ("gloo", "nccl", "local")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSettings:
    """Settings of one attention shard.

    Attributes:
        backend: transport backend; `local` loads all experts into the shard (the oracle).
        checkpoint: directory of the model's files.
        shard: name of the shard, as it appears in errors and in the groups' logs.
        number: the shard's; chooses among the redundant copies of an expert.
        timeout_s: an expert group that has not answered a layer call by then is lost.
        patience_s: see `TransportSpec`.
        wait_s: how long a layer call waits for experts of which no copy is there.
        channel, dispatch_format: see `TransportSpec`.
        host: address this shard's end of the transport binds and connects from.
        spin_s: see `TransportSpec`.
        micro_batches: which steps are computed in two halves, see `AttentionConfig`.
        engram: where the rows of Engram tables lie.
        tls: see `TransportSpec`.
    """

    backend: str
    checkpoint: Path
    shard: str = "shard"
    number: int = 0
    timeout_s: float = 10.0
    patience_s: float = 1.0
    wait_s: float = 120.0
    channel: ChannelUsers = "same_user"
    dispatch_format: RowFormatName = "plain"
    host: str = "127.0.0.1"
    spin_s: float = 0.0
    micro_batches: MicroBatches = "never"
    engram: EngramConfig = field(default_factory=EngramConfig)
    tls: ClusterTlsConfig = field(default_factory=ClusterTlsConfig)

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"transport backend {self.backend!r} is none of {', '.join(BACKENDS)}")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "checkpoint": str(self.checkpoint)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ShardSettings:
        """Read what `to_json` wrote; keys with a default may be missing."""
        tls = ClusterTlsConfig(**data.get("tls", {}))
        engram = EngramConfig(**data.get("engram", {}))
        return cls(**{**data, "checkpoint": Path(data["checkpoint"]), "tls": tls, "engram": engram})


def shard_settings(vllm_config: Any) -> ShardSettings | None:
    """The settings of a `VllmConfig`; None where vLLM runs without moeray (then every hook behaves as stock vLLM)."""
    additional = vllm_config.additional_config
    if not isinstance(additional, Mapping) or ADDITIONAL_CONFIG_KEY not in additional:
        return None
    return ShardSettings.from_json(additional[ADDITIONAL_CONFIG_KEY])
