"""`moeray plan`: what may be typed, what it writes, and how counters of a cluster become a measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeray.cli.calibrate import measured_between, spread, table
from moeray.cli.commands import main
from moeray.cli.errors import CommandError
from moeray.planning.calibration import START, Measured, Setting, compare
from moeray.planning.formats import Formats
from moeray.planning.hardware import catalogue
from moeray.planning.spec import load_shape
from moeray.planning.topology import Topology
from moeray.tiny import checkpoint_path

PLAN = """
model: {config: deepseek-v4-flash, routed: fp4, other: fp8, kv: fp8, dispatch: fp8}
hardware: {attention: H200, most: 8}
"""


def written(folder: Path, text: str = PLAN) -> str:
    file = folder / "plan.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_it_writes_table_values_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "values.yaml", tmp_path / "plan.svg"
    assert main(["plan", "-f", written(tmp_path), "--values", str(out), "--plot", str(picture), "--rows", "3"]) == 0
    said = capsys.readouterr().out
    assert "TPOT ms" in said and "expert parallelism" in said
    assert set(yaml.safe_load(out.read_text(encoding="utf-8"))) == {"config", "workerGroups"}
    assert picture.read_text(encoding="utf-8").startswith("<svg")
    assert main(["plan", "-f", written(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"]


def test_the_bundled_model_on_cores_is_planned_unsplit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "model: {config: moeray-tiny}\nhardware: {attention: CPU, most: 2, shared_cores: 2}\ngoals: {tpot_s: 1}\n"
    assert main(["plan", "-f", written(tmp_path, text + "workload: {prompt: 100, output: 50}\n"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"] == "unsplit"


def test_where_nothing_will_do_the_status_is_one(tmp_path: Path) -> None:
    assert main(["plan", "-f", written(tmp_path, PLAN + "goals: {tpot_s: 0.0001}\n")]) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {config: deepseek-v4-flash}", "hardware: is missing"),
        (PLAN + "worklaod: {}", "worklaod: unknown key; did you mean workload?"),
        ("model: [", "is not YAML"),
    ],
)
def test_a_wrong_file_is_told_by_its_field(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "-f", written(tmp_path, text)]) == 2
    assert said in capsys.readouterr().err


def test_wrong_arguments_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2 and "-f PLAN.YAML is needed" in capsys.readouterr().err
    assert main(["plan", "-f", str(tmp_path / "none.yaml")]) == 2 and "cannot be read" in capsys.readouterr().err
    wrong = tmp_path / "found.json"
    wrong.write_text('{"speed": 2}', encoding="utf-8")
    assert main(["plan", "-f", written(tmp_path), "--efficiency", str(wrong)]) == 2
    assert "speed: unknown key" in capsys.readouterr().err
    assert main(["plan", "--models"]) == 0 and "moeray-tiny" in capsys.readouterr().out
    for wrong_arguments in (["--batches", "1,0"], ["--batches", "many"], ["--rows", "0"]):
        with pytest.raises(SystemExit):
            main(["plan", *wrong_arguments])


def state(steps: int, at_s: float, *, calls: int = 0, groups: bool = True) -> dict[str, Any]:
    """Two shards that have computed so many steps of four tokens, three layers each; one that does nothing."""
    hop = {
        "steps": steps, "step_tokens": 4 * steps, "at_us": 1e6 * at_s, "calls": 3 * steps, "dispatch_us": 30.0 * steps,
        "overlap_us": 60.0 * steps, "combine_us": 90.0 * steps,
    }  # fmt: skip
    idle = {**dict.fromkeys(hop, 0), "at_us": 1e6 * at_s}
    shards = [("a", hop), ("b", hop), ("idle", idle)]
    processes = [{"role": "attention_shard", "state": "ready", "id": name, "hop": each} for name, each in shards]
    if groups:
        held = {"calls": calls, "calls_us": 20.0 * calls, "num_layers": 3}
        processes.append({"role": "expert_group", "state": "ready", "id": "g", "experts": held})
    return {"processes": processes}


def test_counters_that_grow_are_times_of_a_step() -> None:
    found = measured_between(state(0, 0.0), state(10, 1.0, calls=60), state(110, 2.0, calls=660))
    assert found == Measured(Topology("split", 3, 1), 4.0, found.context, 10_000.0, 60.0, 20.0, 20.0)
    plain = measured_between(state(0, 0.0), state(10, 1.0, groups=False), state(110, 2.0, groups=False))
    assert plain.call == plain.expert == 0.0 and plain.step == 10_000.0
    with pytest.raises(CommandError, match="no shard has counted a step"):
        measured_between(state(0, 0.0), state(10, 1.0), state(10, 2.0))


def test_predictions_are_printed_beside_what_was_measured() -> None:
    tiny, cpu = load_shape(str(checkpoint_path())), catalogue()["CPU"]
    found = [Measured(Topology("split", 1, 1), tokens, 100, 10_000.0) for tokens in (1, 2, 4, 8)]
    fitted = spread(found, 3)
    assert [each.tokens for each in fitted] == [1, 4, 8]
    lines = table(compare(Setting(tiny, Formats(), cpu, cpu), START, found, fitted)).splitlines()
    assert len(lines) == 7 and sum("(fitted)" in line for line in lines) == 3 and "predicted only" in lines[-1]
