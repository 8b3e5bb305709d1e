"""Metadata kernels against the definition, one request and token at a time."""

from __future__ import annotations

import pytest
import torch

from moeray.vllm_hooks import cpu_kernels

PAD = -1


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Four requests: a decode, a chunk in the middle of a prompt, a whole prompt, a decode."""
    return {
        "starts": torch.tensor([0, 1, 8, 13, 14], dtype=torch.int32),
        "seq_lens": torch.tensor([9, 20, 5, 256], dtype=torch.int32),
        "blocks": torch.arange(4 * 300, dtype=torch.int32).reshape(4, 300) + 7,
    }


def tokens(batch: dict[str, torch.Tensor]) -> list[tuple[int, int, int]]:
    """(token, request, position) for every token of the step."""
    starts, lengths = batch["starts"].tolist(), batch["seq_lens"].tolist()
    return [
        (t, r, lengths[r] - (starts[r + 1] - starts[r]) + t - starts[r])
        for r in range(4)
        for t in range(starts[r], starts[r + 1])
    ]


def test_every_token_is_mapped_to_its_request(batch: dict[str, torch.Tensor]) -> None:
    out = torch.full((20,), 99, dtype=torch.int32)
    cpu_kernels.token_request_mapping(batch["starts"], out, 4, 14, 16)
    assert out[:16].tolist() == [r for _, r, _ in tokens(batch)] + [0, 0]
    assert out[16:].tolist() == [99] * 4


def test_a_prefill_gathers_its_tokens_and_a_window_before_them(batch: dict[str, torch.Tensor]) -> None:
    out = torch.zeros(3, dtype=torch.int32)
    replay = torch.tensor([0, 4, 0, 0], dtype=torch.int32)
    cpu_kernels.prefill_gather_lengths(out, batch["seq_lens"], batch["starts"], replay, 2, 1, 6, 4)
    # Request 1: 7 tokens after 13, of which 9 are visible, of which window - 1 = 5 count; request 2: 5 after none.
    assert out.tolist() == [7 + 5, 5 + 0, 0]


@pytest.mark.parametrize("ratio", [4, 128])
def test_a_compressed_entry_goes_to_the_slot_of_the_token_that_completes_it(
    batch: dict[str, torch.Tensor], ratio: int
) -> None:
    slots = torch.arange(14) + 1000
    slots[2] = PAD
    out = torch.full((14,), 99)
    cpu_kernels.compressed_slot_mapping(
        out, slots, batch["starts"], batch["seq_lens"], batch["blocks"], 300, 2, 1, 1, ratio, PAD, 1024
    )
    want = []
    for token, request, position in tokens(batch):
        entry = position // ratio
        complete = (position + 1) % ratio == 0 and slots[token] != PAD
        want.append(int(batch["blocks"][request, entry // 2]) * 2 + entry % 2 if complete else PAD)
    assert out.tolist() == want
    assert any(slot != PAD for slot in want)


@pytest.mark.parametrize("query_slice", [(0, 14), (3, 10)])
def test_a_query_sees_the_compressed_entries_before_it(
    batch: dict[str, torch.Tensor], query_slice: tuple[int, int]
) -> None:
    first, last = query_slice
    compressed = batch["seq_lens"] // 4
    sums = torch.cat([torch.zeros(1, dtype=torch.int32), compressed.cumsum(0).int()])
    begin, end = torch.full((last - first,), -1, dtype=torch.int32), torch.full((last - first,), -1, dtype=torch.int32)
    owner = torch.full((int(sums[-1]),), -1, dtype=torch.int32)
    cpu_kernels.build_prefill_chunk(
        batch["starts"], batch["seq_lens"], sums, sums, owner, begin, end, first, last, 0, 1, 1, 1024, 4
    )
    inside = [(r, p) for t, r, p in tokens(batch) if first <= t < last]
    assert begin.tolist() == [int(sums[r]) for r, _ in inside]
    assert end.tolist() == [int(sums[r]) + (p + 1) // 4 for r, p in inside]
    assert owner.tolist() == [r for r in range(4) for _ in range(int(compressed[r]))]


def test_context_parallelism_is_refused() -> None:
    empty = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="context parallelism of 2"):
        cpu_kernels.compressed_slot_mapping(empty, empty, empty, empty, empty, 1, 1, 2, 1, 4, PAD, 1024)
