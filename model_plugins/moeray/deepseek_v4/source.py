"""Where a checkpoint is: `model:` of cluster.yaml -> a directory on this machine."""

from __future__ import annotations

from pathlib import Path

from moeray.config import ConfigError
from moeray.tiny import checkpoint_path

BUNDLED = {"moeray-tiny": checkpoint_path}


def locate(model: str) -> Path:
    """A bundled name, a directory, or a hub id (downloaded, or found in the hub's cache).

    Raises:
        ConfigError: nothing of that name, with what was tried.
    """
    if model in BUNDLED:
        return BUNDLED[model]()
    directory = Path(model).expanduser()
    if model and directory.is_dir():
        return directory.resolve()
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_like_path:
        raise ConfigError(
            f"model: {model!r} is neither a bundled model ({', '.join(BUNDLED)}), nor a directory here, nor a hub id"
        )
    return _from_hub(model)


def _from_hub(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # costs 0.5 s to import; bundled and local models do not need it

    try:
        return Path(snapshot_download(hub_id))
    except Exception as error:  # the hub raises many unrelated types for "no such thing" and "no network"
        raise ConfigError(f"model: no directory {hub_id!r} here, and the hub did not give it: {error}") from error
