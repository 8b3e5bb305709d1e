"""Packing: every pair reaches its expert's group once, and its answer is found again, on host and device alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moeray.transport.packing import DeviceBlocks, HostBlocks, as_numpy_rows, route_on_host
from moeray.transport.wire import HEADER_BYTES, Flags, Geometry, Header


@dataclass
class Batch:
    """One layer call; x[t] = (t, t, ...), so that a row tells which token it was."""

    geometry: Geometry
    num_groups: int
    owner_E: np.ndarray
    ids_TK: Tensor
    x_TD: Tensor


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    num_experts = draw(st.integers(1, 10))
    top_k = draw(st.integers(1, num_experts))
    num_groups = draw(st.integers(1, 4))
    owner = draw(st.lists(st.integers(0, num_groups - 1), min_size=num_experts, max_size=num_experts))
    rows = draw(st.lists(st.permutations(range(num_experts)), max_size=9))
    ids = torch.tensor([row[:top_k] for row in rows], dtype=torch.int32).view(len(rows), top_k)
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32]))
    geometry = Geometry(draw(st.integers(1, 5)), top_k, dtype, draw(st.integers(1, 12)))
    x_TD = torch.arange(len(rows), dtype=dtype).unsqueeze(1).expand(-1, geometry.hidden_size).contiguous()
    return Batch(geometry, num_groups, np.array(owner, dtype=np.int64), ids, x_TD)


def answer(x_TD: Tensor, ids_TK: Tensor) -> Tensor:
    """A stand-in group: its row for a pair is token * 100 + expert, one column, in (token, k) order."""
    pairs = [
        x_TD[t, 0].item() * 100 + expert for t in range(len(ids_TK)) for expert in ids_TK[t].tolist() if expert >= 0
    ]
    return torch.tensor(pairs)


def replies_matrix(parts: list[Tensor], status_rows: int, room: int | None) -> Tensor:
    """All replies one after another, as the shard receives them."""
    out = []
    for part in parts:
        filler = torch.full((0 if room is None else room - len(part),), -7.0)
        out += [torch.full((status_rows,), -9.0), part, filler]
    return torch.cat(out)


def expected(batch: Batch) -> list[float]:
    return [t * 100.0 + expert for t, row in enumerate(batch.ids_TK.tolist()) for expert in row]


@given(batches())
def test_host_packing_brings_every_pair_to_its_group_and_back(batch: Batch) -> None:
    geometry = batch.geometry
    routing = route_on_host(batch.ids_TK.numpy(), batch.owner_E, batch.num_groups, geometry.status_rows)
    blocks = HostBlocks(geometry, batch.num_groups)
    x = as_numpy_rows(batch.x_TD)
    large = blocks.large_payloads(x, routing)
    parts = []
    for group, tokens in enumerate(routing.tokens):
        if group in large:
            views = geometry.payload_views(large[group], len(tokens), len(tokens))
        else:
            blocks.fill(group, x, tokens, routing.ids[group])
            views = geometry.payload_views(blocks.blocks[group, HEADER_BYTES:], geometry.inline_rows, len(tokens))
        x_TD, ids_TK = views
        held = ids_TK[ids_TK >= 0].tolist()
        assert all(batch.owner_E[expert] == group for expert in held)
        assert (ids_TK >= 0).any(dim=1).all(), "a token without an expert in the group must not travel"
        assert len(held) == routing.num_pairs[group]
        parts.append(answer(x_TD, ids_TK))
    assert (group_is_large := set(large)) == {
        g for g, rows in enumerate(routing.tokens) if len(rows) > geometry.inline_rows
    }
    assert group_is_large <= set(range(batch.num_groups))
    assert replies_matrix(parts, geometry.status_rows, None)[routing.source_P].tolist() == expected(batch)


@given(batches())
def test_device_packing_finds_the_same_rows_without_reading_sizes(batch: Batch) -> None:
    geometry = Geometry(batch.geometry.hidden_size, batch.geometry.top_k, batch.geometry.dtype, 12)
    room = 16 * geometry.top_k
    blocks = DeviceBlocks(geometry, batch.num_groups, torch.device("cpu"))
    source_P, pairs_N = blocks.fill(
        batch.x_TD, batch.ids_TK, torch.from_numpy(batch.owner_E), Header(4, 5, 6, 0, 0, room, Flags.NONE)
    )
    routing = route_on_host(batch.ids_TK.numpy(), batch.owner_E, batch.num_groups, geometry.status_rows)
    parts = []
    for group in range(batch.num_groups):
        header = Header.from_words(blocks.headers_NW[group].tolist())
        assert header == Header(4, 5, 6, len(routing.tokens[group]), routing.num_pairs[group], room, Flags.NONE)
        payload = blocks.blocks[group, HEADER_BYTES:]
        x_TD, ids_TK = geometry.payload_views(payload, geometry.inline_rows, header.num_rows)
        assert torch.equal(ids_TK, torch.from_numpy(routing.ids[group]))
        assert torch.equal(x_TD, batch.x_TD[routing.tokens[group]])
        parts.append(answer(x_TD, ids_TK))
    assert pairs_N.tolist() == routing.num_pairs
    assert replies_matrix(parts, geometry.status_rows, room)[source_P].tolist() == expected(batch)


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
def test_an_id_outside_the_experts_is_refused(bad: int) -> None:
    ids = np.array([[0, 1], [2, bad]], dtype=np.int32)
    with pytest.raises(IndexError):
        route_on_host(ids, np.zeros(4, dtype=np.int64), 2, 1)
