"""The engine's logprobs are those of transformers' DeepSeek-V4 in fp32, but for the rounding that is known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import InProcessEngine, in_process_engine
from knobs import MATRIX, Knobs
from parity import measure, prompts_of
from random_checkpoints import write_random_checkpoint
from transformers import DeepseekV4ForCausalLM
from v4_reference import load

from moeray.deepseek_v4.quantise import quantise_checkpoint
from moeray.tiny import checkpoint_path

pytestmark = pytest.mark.slow

Pair = tuple[InProcessEngine, DeepseekV4ForCausalLM]


@pytest.fixture(scope="module", params=["bundled", "random"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """An engine and the reference over one checkpoint."""
    if request.param == "bundled":
        directory = checkpoint_path()
    else:
        directory = write_random_checkpoint(tmp_path_factory.mktemp("random"))
    with in_process_engine(directory) as engine:
        yield engine, load(directory)


@pytest.mark.parametrize(
    ("length", "num_prompts"),
    [
        pytest.param(20, 12, id="short"),
        pytest.param(150, 2, id="window"),
        pytest.param(300, 2, id="compressed"),
        pytest.param(2300, 1, id="indexer-selects", marks=pytest.mark.full),
        pytest.param(4500, 1, id="many-chunks", marks=[pytest.mark.full, pytest.mark.timeout(900)]),
    ],
)
def test_logprobs_are_as_near_to_fp32_as_rounding_allows(pair: Pair, length: int, num_prompts: int) -> None:
    engine, model = pair
    assert measure(engine, model, prompts_of(length, num_prompts)).excess() == []


@pytest.mark.parametrize("like", ["v4", pytest.param("v4-base", marks=pytest.mark.full), "v4.1"])
def test_a_quantised_checkpoint_is_as_near_to_its_own_values_in_fp32(like: str, tmp_path: Path) -> None:
    directory = quantise_checkpoint(write_random_checkpoint(tmp_path / "plain"), tmp_path / "quantised", like)
    model = load(directory)
    with in_process_engine(directory) as engine:
        found = [measure(engine, model, prompts_of(*size)) for size in ((20, 12), (300, 2))]
    assert [text for each in found for text in each.excess()] == []


@pytest.mark.parametrize(
    "knobs", [pytest.param(each, id=str(each), marks=() if each.quick else pytest.mark.full) for each in MATRIX]
)
def test_every_knob_gives_the_logprobs_of_transformers(knobs: Knobs, tmp_path: Path) -> None:
    directory = write_random_checkpoint(tmp_path, **knobs.changes)
    with in_process_engine(directory, num_groups=knobs.num_groups) as engine:
        assert measure(engine, load(directory), prompts_of(150, 3)).excess() == []
