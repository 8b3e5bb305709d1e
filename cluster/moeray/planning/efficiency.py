"""How much of a device's data sheet is reached, and what does not scale: the numbers that calibration replaces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


class EfficiencyError(ValueError):
    """A file of such numbers that cannot be read; the message names the key."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """The defaults are assumptions for a GPU with CUDA graphs, none of them measured by this project.

    Attributes:
        attention_flops, attention_bandwidth: share of the data sheet's that all but routed experts reach.
        expert_flops, expert_bandwidth: the same of routed experts.
        link: share of a link's bandwidth.
        layer_us: of one layer at the shard, whatever its size: launches, norms, router.
        expert_us: of one call of one group, whatever its size.
        hop_us: of one layer call at the shard beside the way: packing, posting, reducing.
        token_us: of one layer's hop, per token.
        message_us: of one layer call, per group.
        step_us: of one step: scheduler, sampler, output.
        split_us: of one step more where experts are apart.
        imbalance: the fullest rank's tokens against the mean.
        latency: factor on the catalogue's time of a message.
        interference: where all processes share a machine's cores: by so much work slows when all of them are busy.
    """

    attention_flops: float = 0.5
    attention_bandwidth: float = 0.7
    expert_flops: float = 0.5
    expert_bandwidth: float = 0.7
    link: float = 0.7
    layer_us: float = 30.0
    expert_us: float = 10.0
    hop_us: float = 10.0
    token_us: float = 0.0
    message_us: float = 0.5
    step_us: float = 1000.0
    split_us: float = 0.0
    imbalance: float = 1.15
    latency: float = 1.0
    interference: float = 0.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise EfficiencyError(f"{each.name}: {value!r} is not a number")
            is_share = each.name.endswith(("_flops", "_bandwidth")) or each.name == "link"
            if not (value > 0 if is_share else value >= 0):
                raise EfficiencyError(f"{each.name}: {value!r} is too small")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def efficiency_of(values: Mapping[str, Any]) -> Efficiency:
    """Missing ones are the defaults.

    Raises:
        EfficiencyError: an unknown key, or a value that is no such number.
    """
    known = {each.name for each in fields(Efficiency)}
    if unknown := sorted(set(values) - known):
        raise EfficiencyError(f"{unknown[0]}: unknown key; known are {', '.join(sorted(known))}")
    return Efficiency(**values)


def read_efficiency(path: Path) -> Efficiency:
    """As `moeray plan --calibrate` writes it.

    Raises:
        EfficiencyError: see `efficiency_of`, or no JSON object.
        OSError: the file cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EfficiencyError(f"{path}: is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise EfficiencyError(f"{path}: is not a JSON object")
    return efficiency_of(values)
