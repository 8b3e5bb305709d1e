"""Pairs are sorted by expert, each once, and a plan names the first pair that cannot be computed."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeray.deepseek_v4.expert_layout import plan

NUM_EXPERTS = 9


def planned(ids: list[int], slots: list[int]) -> tuple[int, dict[str, np.ndarray]]:
    """The plan of a call; what it does not write stays -7."""
    arrays = {
        name: np.full(max(len(ids), NUM_EXPERTS + 1), -7, np.int32) for name in ("order", "row", "starts", "slots")
    }
    active = plan()(
        np.array(ids, dtype=np.int32), np.array(slots, dtype=np.int32), np.empty(NUM_EXPERTS + 1, np.int32),
        arrays["order"], arrays["row"], arrays["starts"], arrays["slots"],
    )  # fmt: skip
    return active, arrays


@settings(deadline=None)
@given(
    ids=st.lists(st.integers(-1, NUM_EXPERTS - 1), max_size=60),
    slots=st.permutations(range(NUM_EXPERTS)),
)
def test_every_pair_of_an_expert_stands_under_its_slot_as_they_come(ids: list[int], slots: list[int]) -> None:
    active, written = planned(ids, slots)
    experts = sorted({expert for expert in ids if expert >= 0})
    assert written["slots"][:active].tolist() == [slots[expert] for expert in experts]
    begin = 0
    for at, expert in enumerate(experts):
        pairs = [pair for pair, each in enumerate(ids) if each == expert]
        assert written["starts"][at] == begin
        assert written["order"][begin : begin + len(pairs)].tolist() == pairs
        rows = [sum(each >= 0 for each in ids[:pair]) for pair in pairs]
        assert written["row"][begin : begin + len(pairs)].tolist() == rows
        begin += len(pairs)
    assert written["starts"][active] == begin
    assert (written["order"][begin:] == -7).all()


def test_the_first_pair_whose_expert_is_not_held_is_named() -> None:
    slots = [0, -1, *range(1, NUM_EXPERTS - 1)]
    assert planned([-1, 0, 1, 1], slots)[0] == -1 - 2
    assert planned([NUM_EXPERTS], slots)[0] == -1 - 0
