"""What topology and model cannot give is refused before anything is started, with the key and the arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from moeray.config import ConfigError, parse_config
from moeray.controller.settings import controller_settings
from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.membership import Delays
from moeray.placement import Layout
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
        (
            {"experts": {"num_groups": 2, "num_redundant": 15, "min_copies": 2}},
            "experts.min_copies: 2 copies of 16 experts take 16 redundant slots per layer, but .* is 15",
        ),
        (
            {"experts": {"num_groups": 2, "num_redundant": 16, "min_copies": 3}},
            "experts.min_copies: 3 copies of each expert need as many expert groups, but .*num_groups is 2",
        ),
        (
            {"experts": {"num_groups": 0, "min_copies": 2}},
            "experts.min_copies: 2 copies need expert groups, .* experts.num_groups is 0",
        ),
    ],
)
def test_copies_that_have_no_place_are_refused_with_the_arithmetic(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(" experts.num_groups is", r" \(experts.num_groups is")):
        controller_settings(parse_config(data), SHAPE)


def test_the_layout_and_the_delays_are_those_of_the_file() -> None:
    experts = {
        "num_groups": 3, "num_redundant": 20, "min_copies": 2, "join_debounce_s": 0.5, "regroup_s": 7,
        "rebalance_s": 30,
    }  # fmt: skip
    settings = controller_settings(parse_config({"experts": experts, "redis": {"url": "redis://r:1/0"}}), SHAPE)
    assert settings.layout == Layout(SHAPE.num_layers, SHAPE.num_experts, 20, 2)
    assert (settings.delays, settings.rebalance_s) == (Delays(0.5, 7.0), 30.0)
    assert (settings.num_groups, settings.redis_url) == (3, "redis://r:1/0")
