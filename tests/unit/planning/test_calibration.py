"""Numbers that made the times are found from the times, or at least ones that predict the same."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from moeray.planning import Topology, efficiency_of, read_efficiency
from moeray.planning.calibration import START, Measured, Setting, calibrate, compare
from moeray.planning.formats import Formats
from moeray.planning.hardware import catalogue
from moeray.planning.spec import load_shape
from moeray.tiny import checkpoint_path

SETTING = Setting(load_shape(str(checkpoint_path())), Formats(), catalogue()["CPU"], catalogue()["CPU"], shared_cores=2)
TRUE = replace(
    START, layer_us=1500.0, attention_flops=0.2, expert_us=50.0, expert_flops=0.3, hop_us=80.0, token_us=4.0,
    interference=0.3,
)  # fmt: skip


def timed(shards: int, groups: int, tokens: int) -> Measured:
    """What a cluster with these numbers would show."""
    bare = Measured(Topology("split", shards, groups), tokens, 100, 1.0)
    step, layers = SETTING.predict(TRUE, bare), SETTING.shape.moe_layers
    alone = SETTING.predict(TRUE, replace(bare, topology=Topology("split", 1, groups)))
    own = (alone.attention + alone.head + alone.fixed) / layers
    return replace(
        bare, step=step.total, call=step.total / layers - own, shared=alone.shared / layers,
        expert=alone.experts / layers,
    )  # fmt: skip


FOUND = [
    timed(*each) for each in ((1, 1, 1), (1, 1, 4), (1, 1, 16), (2, 1, 4), (2, 1, 1), (2, 1, 8), (1, 2, 4), (2, 2, 8))
]


def test_what_was_not_measured_is_predicted_by_what_was() -> None:
    efficiency = calibrate(SETTING, FOUND[:4])
    errors = {each.measured: each.error for each in compare(SETTING, efficiency, FOUND, FOUND[:4])}
    assert max(map(abs, errors.values())) < 0.05, errors
    assert sum(each.is_fitted for each in compare(SETTING, efficiency, FOUND, FOUND[:4])) == 4


def test_one_batch_does_not_tell_what_grows_with_it() -> None:
    with pytest.raises(ValueError, match="two batches"):
        calibrate(SETTING, FOUND[:1])
    with pytest.raises(ValueError, match="two batches"):
        calibrate(SETTING, [replace(each, call=0.0) for each in FOUND])


def test_what_was_found_can_be_kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("found") / "efficiency.json"
    file.write_text(TRUE.to_json(), encoding="utf-8")
    assert read_efficiency(file) == TRUE == efficiency_of(asdict(TRUE))
