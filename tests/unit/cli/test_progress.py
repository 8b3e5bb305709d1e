"""What `moeray up` shows of a start that failed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moeray.cli.progress import _reason

TRACEBACK = """\
The deployment failed to start 3 times in a row. Error:
ray::ServeReplica:moeray:AttentionShard.initialize_and_get_metadata()
RuntimeError: Traceback (most recent call last):
  File "replica.py", line 51, in __init__
    self._child = await ShardProcess.start(spec, self._set_stage)
{error}
"""


@pytest.mark.parametrize(
    "error",
    [
        "moeray.attention_shard.child.ShardStartFailed: model: vLLM does not serve x so: not supported",
        "moeray.config.errors.ConfigError: model: vLLM does not serve x so: not supported",
        "ValueError: too little memory: 3",
    ],
)
def test_the_typed_error_that_a_replica_raised_is_shown(error: str) -> None:
    deployments = {"shard": SimpleNamespace(message=TRACEBACK.format(error=error))}
    assert _reason("deploying", deployments) == error


def test_without_a_traceback_the_applications_own_message_is_shown() -> None:
    assert _reason("no room for the shard", {"shard": SimpleNamespace(message="")}) == "no room for the shard"
