"""Predicted and measured step times of whole clusters on this machine: `moeray plan`, calibrated on a few of them.

    python benchmarks/planning.py [--quick] [--json FILE]

Each topology is started as users start it and decodes batches of several sizes. The planner's numbers are found from
three batches of 1A x 1E (the smallest, the largest, one between) and the middle one of 2A x 1E and of 2A x 2E, which
say how much the machine's cores slow each other down, and of the unsplit engine; everything else is predicted only.
The error is of the time from one step to the next.

Memory: routed experts of a model of 1.6 GB (bench_model.py) are loaded in a process of their own, whose growth is
compared with what the planner says of an expert group.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import records
import yaml
from bench_model import NAME, large_checkpoint
from records import Record
from whole import cluster

from moeray.cli.calibrate import spread, table
from moeray.planning import Efficiency, Topology, parse_plan, shape_of, task_of
from moeray.planning.calibration import Compared, Measured, Setting, calibrate, compare
from moeray.planning.formats import Formats
from moeray.planning.memory import expert_weights
from moeray.tiny import checkpoint_path

ALONE = "1A x 1E"
TOPOLOGIES: dict[str, dict[str, Any]] = {
    ALONE: {"attention": {"num_shards": 1}, "experts": {"num_groups": 1}},
    "2A x 1E": {"attention": {"num_shards": 2}, "experts": {"num_groups": 1}},
    "1A x 2E": {"attention": {"num_shards": 1}, "experts": {"num_groups": 2}},
    "2A x 2E": {"attention": {"num_shards": 2}, "experts": {"num_groups": 2}},
    "plain": {"attention": {"num_shards": 1}, "experts": {"num_groups": 0}},
}
MIDDLE = ("2A x 1E", "2A x 2E", "plain")
PLAN = {"model": {"config": str(checkpoint_path())}, "hardware": {"attention": "CPU", "shared_cores": 2}}
BATCHES = "1,2,4,8,16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three topologies (five minutes instead of nine)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the records there")
    options = parser.parse_args()
    names = list(TOPOLOGIES)[:3] if options.quick else list(TOPOLOGIES)
    found = {name: measured(name) for name in names}
    task = task_of(parse_plan(PLAN), Efficiency())
    setting = Setting(task.shape, task.formats, task.attention, task.experts, task.shared_cores)
    middle = [sorted(found[name], key=lambda each: each.tokens)[2] for name in MIDDLE if name in found]
    fitted = [*spread(found[ALONE], 3), *middle]
    compared = compare(setting, calibrate(setting, fitted), [each for name in names for each in found[name]], fitted)
    print(table(compared))
    weights = memory_record()
    print(f"routed experts: {weights['measured_mib']} MiB more in memory, predicted {weights['predicted_mib']}, "
          f"error {100 * weights['error']:+.1f} %")  # fmt: skip
    if options.json:
        records.write(options.json, [*map(record_of, compared), weights])


def measured(name: str) -> list[Measured]:
    """Of one topology, by `moeray plan --measure --json`."""
    print(f"{name}: starting", flush=True)
    with cluster(TOPOLOGIES[name]) as running, tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.yaml"
        plan.write_text(yaml.safe_dump(PLAN), encoding="utf-8")
        answer = running.moeray("plan", "-f", str(plan), "--measure", "--json", "--batches", BATCHES)
    return [
        Measured(**{**each["measured"], "topology": Topology(**each["measured"]["topology"])})
        for each in json.loads(answer)
    ]


def record_of(each: Compared) -> Record:
    return {
        "topology": each.measured.topology.name,
        "tokens": round(each.measured.tokens, 1),
        "measured_ms": round(each.measured.step / 1e3, 2),
        "predicted_ms": round(each.predicted.total / 1e3, 2),
        "error": round(each.error, 3),
        "fitted": each.is_fitted,
        "measured": {key: round(value, 1) for key, value in asdict(each.measured).items() if isinstance(value, float)},
    }


def memory_record() -> Record:
    """Resident bytes that loading all routed experts adds to a process, beside the planner's."""
    checkpoint = large_checkpoint()
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    predicted = expert_weights(shape_of(config, NAME), Formats(), ranks=1)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        measured = pool.apply(_growth, (checkpoint,))
    return {
        "topology": "memory of routed experts",
        "measured_mib": round(measured / 2**20),
        "predicted_mib": round(predicted / 2**20),
        "error": round(predicted / measured - 1, 3),
    }


def _growth(checkpoint: Path) -> int:
    import torch

    from moeray.deepseek_v4 import Checkpoint, RoutedExperts

    torch.set_num_threads(1)
    opened = Checkpoint.open(checkpoint)
    held = dict.fromkeys(opened.shape.moe_layers, tuple(range(opened.shape.num_experts)))
    before = psutil.Process().memory_info()
    experts = RoutedExperts.load(opened, held, num_threads=1)
    after = psutil.Process().memory_info()
    assert experts.weight_bytes
    return int((after.rss - after.shared) - (before.rss - before.shared))  # without pages of files that are mapped


if __name__ == "__main__":
    main()
