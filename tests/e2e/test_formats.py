"""A checkpoint in the published format (FP4 experts, FP8 matrices, DeepSeek's names) is served as it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clusters import cluster, wrong_answers

from moeray.deepseek_v4 import Checkpoint
from moeray.deepseek_v4.quantise import quantise_checkpoint
from moeray.tiny import checkpoint_path


def test_the_quantised_model_answers_nearly_all_its_questions_exactly(
    golden: list[dict[str, Any]], tmp_path: Path
) -> None:
    directory = quantise_checkpoint(checkpoint_path(), tmp_path / "quantised")
    checkpoint = Checkpoint.open(directory)
    with cluster({"model": str(directory), "experts": {"num_groups": 3}}) as running:
        wrong = wrong_answers(running, golden, running.status()["model"])
        assert len(wrong) <= 0.05 * len(golden), f"{len(wrong)} of {len(golden)} differ, first: {wrong[0]}"
        groups = [group["experts"]["bytes_read"] for group in running.processes("expert_group")]
        assert sum(groups) == checkpoint.bytes_of(filter(checkpoint.is_routed_expert, checkpoint.tensors))
        assert running.moeray("inspect", str(directory)).returncode == 0
