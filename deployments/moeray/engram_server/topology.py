"""Whether a cluster's row servers and its model belong together. Imports no ray: bad input is found before Ray is."""

from __future__ import annotations

from moeray.config import ClusterConfig, ConfigError
from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.engram_files import engram_layout
from moeray.engram import Shares


def check_row_servers(config: ClusterConfig, checkpoint: Checkpoint | None) -> None:
    """Whether these tables can be cut for so many servers.

    Args:
        checkpoint: None where only vLLM reads the model's files.
    Raises:
        ConfigError: the model has no Engram, or fewer hash columns.
    """
    if not config.engram.num_servers:
        return
    layout = None if checkpoint is None else engram_layout(checkpoint)
    if layout is None:
        raise ConfigError(
            f"engram.placement: sharded, but {config.model} has no Engram tables: leave `engram` out of cluster.yaml"
        )
    try:
        Shares(config.engram.num_servers, config.engram.copies, layout.num_columns)
    except ValueError as error:
        raise ConfigError(f"engram.num_servers: {error}") from error
