"""`moeray plan`: what a model needs and costs on given devices, split or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from moeray.cli.chat import Identity
from moeray.cli.errors import CommandError
from moeray.planning import (
    Efficiency,
    EfficiencyError,
    PlanError,
    Task,
    bundled_models,
    load_plan,
    plan,
    read_efficiency,
    task_of,
)
from moeray.planning.plot import plot
from moeray.planning.report import as_json, text, values


@dataclass(frozen=True)
class Outputs:
    """What to print, and files to write beside that."""

    as_json: bool = False
    rows: int = 12
    values: Path | None = None
    plot: Path | None = None


def make_plan(file: Path, efficiency: Path | None, outputs: Outputs) -> int:
    """0 if something can serve the workload within its goals, else 1.

    Raises:
        CommandError: the files are wrong (2).
    """
    task = _task(file, efficiency)
    found = plan(task)
    print(json.dumps(as_json(task, found), indent=1) if outputs.as_json else text(task, found, outputs.rows))
    if outputs.values is not None and found.best is not None:
        said = (
            f"# {found.best.topology.name}, by `moeray plan -f {file.name}`; checkpoint and tenants are yours to add.\n"
        )
        _write(outputs.values, said + yaml.safe_dump(values(task, found), sort_keys=False))
    if outputs.plot is not None:
        _write(outputs.plot, plot(task, found))
    return 0 if found.best is not None else 1


def measure_plan(
    file: Path, efficiency: Path | None, batches: Sequence[int], identity: Identity, out: Path | None, as_json: bool
) -> int:
    """Of the running cluster, see `calibrate.calibrate_cluster`; numbers are found for `out`, else `efficiency` holds.

    Raises:
        CommandError: the files are wrong (2), or the cluster cannot be measured.
    """
    from moeray.cli.calibrate import calibrate_cluster

    task = _task(file, efficiency)
    known = None if out is not None else task.efficiency
    return calibrate_cluster(task, batches, efficiency=known, identity=identity, out=out, as_json=as_json)


def _task(file: Path, efficiency: Path | None) -> Task:
    from moeray.deepseek_v4.source import BUNDLED

    try:
        known = Efficiency() if efficiency is None else read_efficiency(efficiency)
        return task_of(load_plan(file), known, {name: path() for name, path in BUNDLED.items()})
    except (PlanError, EfficiencyError) as error:
        raise CommandError(str(error), status=2) from error
    except OSError as error:
        raise CommandError(f"{error.filename}: cannot be read: {error.strerror}", status=2) from error


def list_models() -> int:
    from moeray.deepseek_v4.source import BUNDLED

    print("\n".join([*BUNDLED, *bundled_models()]))
    return 0


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{path}: cannot be written: {error.strerror}") from error
