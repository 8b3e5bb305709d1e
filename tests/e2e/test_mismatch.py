"""Processes that read different files under one path never serve together, and people are told which two and why."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from clusters import Cluster, cluster, golden_request, kill, wait_for

from moeray.tiny import checkpoint_path

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

HEALING_S = 180


def replace_weights(directory: Path, change: bytes) -> None:
    """Another last byte in a weight file; the file is replaced as a copy tool does it, processes keep the old one."""
    file = max(directory.glob("*.safetensors"), key=lambda each: each.stat().st_size)
    new = file.with_suffix(".new")
    new.write_bytes(file.read_bytes()[:-1] + change)
    new.replace(file)


def group_1(running: Cluster) -> dict[str, Any]:
    (found,) = (group for group in running.processes("expert_group") if group["index"] == 1)
    return found


def test_a_group_that_comes_back_with_other_weights_is_kept_out_until_it_has_the_right_ones(
    tmp_path: Path, golden: list[dict[str, Any]]
) -> None:
    model = tmp_path / "moeray-tiny"
    shutil.copytree(checkpoint_path(), model)
    (file,) = model.glob("*.safetensors")
    right = file.read_bytes()[-1:]
    config = {
        "model": str(model), "attention": {"num_shards": 1}, "experts": {"num_groups": 2, "num_redundant": 3},
    }  # fmt: skip
    with cluster(config) as running:
        expected = running.chat(golden[0])
        assert [group["experts"]["num_copies"] for group in running.processes("expert_group")] == [0, 3]

        replace_weights(model, bytes([right[0] ^ 1]))
        kill(group_1(running)["pid"])
        wait_for(lambda: bool(running.status()["mismatches"]), HEALING_S, "naming the odd group")
        state = running.status()
        (text,) = state["mismatches"]
        assert re.fullmatch(
            r"expert group 1 \(node \w{8}, pid \d+\) has fingerprint '\w+'; "
            r"expert group 0 \(node \w{8}, pid \d+\) has fingerprint '\w+'",
            text,
        )
        assert (state["generation"], state["is_complete"]) == (1, False)
        status, answer = running.post("/v1/chat/completions", golden_request(golden[0]))
        assert status == 503 and text in answer["error"]["message"]
        assert f"not the same model: {text}" in running.moeray("status").stdout

        replace_weights(model, right)
        kill(group_1(running)["pid"])
        wait_for(lambda: running.status()["generation"] == 2, HEALING_S, "the next generation")
        assert running.status()["mismatches"] == []
        wait_for(
            lambda: running.post("/v1/chat/completions", golden_request(golden[0]))[0] == 200, HEALING_S, "serving"
        )
        assert running.chat(golden[0]) == expected
