"""What a person may write about a cluster, checked at the edge, frozen inside."""

from moeray.config.caches import EngramConfig, KvCacheConfig
from moeray.config.errors import ConfigError
from moeray.config.load import load_config, parse_config, to_dict
from moeray.config.scaling import AutoscalingConfig, PoolScalingConfig
from moeray.config.schema import (
    POOL_LABEL,
    AttentionConfig,
    BatchConfig,
    ChannelUsers,
    ClusterConfig,
    ClusterTlsConfig,
    ExpertsConfig,
    IngressConfig,
    MicroBatches,
    RowFormatName,
    TenancyConfig,
    TlsConfig,
    TransportConfig,
)
from moeray.config.telemetry import TelemetryConfig

__all__ = [
    "POOL_LABEL",
    "AttentionConfig",
    "AutoscalingConfig",
    "BatchConfig",
    "ChannelUsers",
    "ClusterConfig",
    "ClusterTlsConfig",
    "ConfigError",
    "EngramConfig",
    "ExpertsConfig",
    "IngressConfig",
    "KvCacheConfig",
    "MicroBatches",
    "PoolScalingConfig",
    "RowFormatName",
    "TelemetryConfig",
    "TenancyConfig",
    "TlsConfig",
    "TransportConfig",
    "load_config",
    "parse_config",
    "to_dict",
]
