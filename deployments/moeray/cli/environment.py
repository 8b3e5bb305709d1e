"""The variables that Ray reads when it is imported; set before that, by every command that uses Ray."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from moeray.cli.state_file import state_dir

TOKEN_MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def prepare(*, embedded: bool) -> None:
    """Nothing is reported to anybody; the embedded Ray listens on loopback alone and wants our own token."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if embedded:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's switch for "loopback, not this host's address"
        # Ray's workers give way to everything else (nice 15) unless told otherwise; ours are what the machine is for.
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ[TOKEN_MODE] = "token"
        os.environ[TOKEN_PATH] = str(_own_token())
    elif TOKEN_MODE not in os.environ and _has_token():
        # `ray start` protects a cluster if its user has a token, but a driver does not offer it by itself.
        os.environ[TOKEN_MODE] = "token"


def _own_token() -> Path:
    """A token that only this user can read; one in the home folder would arm every later `ray start`."""
    path = state_dir() / "ray_token"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
    return path


def _has_token() -> bool:
    return bool(os.environ.get(TOKEN) or os.environ.get(TOKEN_PATH)) or (Path.home() / ".ray" / "auth_token").exists()
