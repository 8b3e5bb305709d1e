"""What topology and model cannot give is refused before anything is started, with the key and the arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from moeray.config import ConfigError, parse_config
from moeray.controller.settings import controller_settings
from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.tiny import checkpoint_path

SHAPE = Checkpoint.open(checkpoint_path()).shape  # 16 experts


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"experts": {"num_groups": 17}}, "experts.num_groups: 17 groups cannot share the 16 routed experts"),
        (
            {"experts": {"num_groups": 2, "num_redundant": 17}},
            r"experts.num_redundant: 17 .* the first copies take 16 of the 16 x 2 places, so 0\.\.16 can",
        ),
        (
            {"experts": {"num_groups": 1, "num_redundant": 1}},
            r"experts.num_redundant: 1 .* 16 x 1 places, so 0\.\.0 can",
        ),
        (
            {"experts": {"num_groups": 0, "num_redundant": 2}},
            "experts.num_redundant: 2 copies need expert groups, .* experts.num_groups is 0",
        ),
        (
            {"experts": {"num_redundant": 2}, "transport": {"backend": "local"}},
            "experts.num_redundant: 2 copies need expert groups, .* transport.backend local",
        ),
    ],
)
def test_copies_that_have_no_place_are_refused_with_the_arithmetic(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(" experts.num_groups is", r" \(experts.num_groups is")):
        controller_settings(parse_config(data), SHAPE)


def test_controller_and_groups_read_one_placement() -> None:
    settings = controller_settings(parse_config({"experts": {"num_groups": 3, "num_redundant": 20}}), SHAPE)
    placement = settings.placement(generation=7)
    assert (placement.generation, placement.num_layers, placement.num_groups) == (7, SHAPE.num_layers, 3)
    assert placement.slots_per_group == (12, 12, 12)
    assert placement.expert_of_slot == settings.placement(generation=0).expert_of_slot
