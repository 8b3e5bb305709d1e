"""vLLM's EPLB policy is asked as we think it is."""

from __future__ import annotations

from moeray.vllm_hooks.expert_copies import expert_copies


def test_the_slots_are_filled_and_the_busiest_experts_get_the_copies() -> None:
    rows = [[90.0, 5.0, 60.0, 5.0], [1.0, 1.0, 1.0, 97.0]]
    copies = expert_copies(rows, 7)
    assert copies == [[3, 1, 2, 1], [1, 1, 1, 4]]
