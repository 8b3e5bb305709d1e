"""Packing: every pair reaches its expert's group once, and its answer is found again, on host and device alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moeray.transport.arena import Arena
from moeray.transport.links import room_for
from moeray.transport.packing import DevicePacker, HostPacker, Packed, route_on_host
from moeray.transport.wire import HEADER_BYTES, Flags, Geometry, Header, read_header


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
    dispatch_format = draw(st.sampled_from(["plain", "fp8"]))  # small whole numbers survive FP8
    geometry = Geometry(draw(st.integers(1, 5)), top_k, dtype, draw(st.integers(1, 12)), dispatch_format)
    x_TD = torch.arange(len(rows), dtype=dtype).unsqueeze(1).expand(-1, geometry.hidden_size).contiguous()
    return Batch(geometry, num_groups, np.array(owner, dtype=np.int64), ids, x_TD)


def answer(x_TD: Tensor, ids_TK: Tensor) -> Tensor:
    """A stand-in group: its row for a pair is token * 100 + expert, one column, in (token, k) order."""
    pairs = [
        x_TD[t, 0].item() * 100 + expert for t in range(len(ids_TK)) for expert in ids_TK[t].tolist() if expert >= 0
    ]
    return torch.tensor(pairs)


def replies_matrix(parts: list[Tensor], status_rows: int, room: list[int]) -> Tensor:
    """All replies one after another, as the shard receives them."""
    out = []
    for part, pairs in zip(parts, room, strict=True):
        out += [torch.full((status_rows,), -9.0), part, torch.full((pairs - len(part),), -7.0)]
    return torch.cat(out)


def expected(batch: Batch) -> list[float]:
    return [t * 100.0 + expert for t, row in enumerate(batch.ids_TK.tolist()) for expert in row]


HEADER = Header(4, 5, 0, 0, 0, 0, Flags.NONE)


def pack(batch: Batch, kind: str) -> Packed:
    """With no more room than `room_for` says, and what the caller wrote there before."""
    num_tokens = len(batch.ids_TK)
    arena = Arena.create(room_for(batch.geometry, num_tokens, batch.num_groups))
    packer = (HostPacker if kind == "host" else DevicePacker)(
        batch.geometry, batch.owner_E[None], batch.num_groups, arena, num_tokens
    )
    arena.take(batch.geometry.reply_room(num_tokens, batch.num_groups) * batch.geometry.row_bytes)
    arena.close()
    packed = packer.pack(HEADER, batch.x_TD, batch.ids_TK)
    replies = [batch.geometry.status_rows + pairs for pairs in packed.reply_pairs]
    assert sum(replies) <= batch.geometry.reply_room(num_tokens, batch.num_groups)
    return packed


def received(batch: Batch, packed: Packed, group: int) -> tuple[Header, Tensor, Tensor]:
    """What a group reads from its messages."""
    messages = [tensor for tensor, peer in packed.sends if peer == 1 + group]
    header = read_header(messages[0])
    large = bool(header.flags & Flags.LARGE)
    assert len(messages) == 1 + large
    payload = messages[1] if large else messages[0][HEADER_BYTES:]
    is_exact = large or bool(header.flags & Flags.EXACT)
    capacity = header.num_rows if is_exact else batch.geometry.inline_rows
    assert header.num_rows <= capacity
    assert not is_exact or len(payload) == batch.geometry.payload_bytes(header.num_rows)
    x_TB, ids_TK = batch.geometry.payload_views(payload, capacity, header.num_rows)
    return header, batch.geometry.dispatched.decode(x_TB), ids_TK


@pytest.mark.parametrize("kind", ["host", "device"])
@given(batch=batches())
def test_every_pair_reaches_its_group_once_and_its_answer_is_found(kind: str, batch: Batch) -> None:
    packed = pack(batch, kind)
    parts = []
    for group in range(batch.num_groups):
        header, x_TD, ids_TK = received(batch, packed, group)
        held = ids_TK[ids_TK >= 0].tolist()
        assert all(batch.owner_E[expert] == group for expert in held)
        assert (ids_TK >= 0).any(dim=1).all(), "a token without an expert in the group must not travel"
        assert len(held) == header.num_pairs <= header.reply_pairs == packed.reply_pairs[group]
        assert (header.generation, header.sequence, header.layer) == (4, 5, 0)
        parts.append(answer(x_TD, ids_TK))
    if packed.num_pairs is not None:
        assert packed.num_pairs == packed.reply_pairs == [len(part) for part in parts]
    matrix = replies_matrix(parts, batch.geometry.status_rows, packed.reply_pairs)
    assert matrix[packed.source_P].tolist() == expected(batch)


@given(batches())
def test_sizes_of_a_decode_batch_on_a_device_do_not_depend_on_the_routing(batch: Batch) -> None:
    packed = pack(batch, "device")
    num_tokens = len(batch.ids_TK)
    if num_tokens <= batch.geometry.inline_rows:
        bucket = max(1, 1 << (num_tokens - 1).bit_length()) if num_tokens else 1
        assert packed.reply_pairs == [bucket * batch.geometry.top_k] * batch.num_groups
        assert [tensor.nbytes for tensor, _ in packed.sends] == [batch.geometry.block_bytes] * batch.num_groups
        assert packed.num_pairs is None


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
def test_an_id_outside_the_experts_is_refused(bad: int) -> None:
    ids = np.array([[0, 1], [2, bad]], dtype=np.int32)
    with pytest.raises(IndexError):
        route_on_host(ids, np.zeros(4, dtype=np.int64), 2, 1)
