"""Formats of dispatched rows: plain ones are the same bytes, FP8's error stays under its bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moeray.transport.rows import GROUP_SIZE, Fp8Rows, row_format


@st.composite
def activations(draw: st.DrawFn) -> Tensor:
    """[T, D] of any magnitude: groups of one row differ by up to 2^40, values within a group by up to 2^30."""
    num_tokens, hidden = draw(st.integers(0, 5)), draw(st.sampled_from([1, 31, 128, 129, 300]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(num_tokens, hidden, generator=generator)
    values *= 2.0 ** torch.randint(-30, 1, values.shape, generator=generator)
    scale = 2.0 ** torch.randint(-20, 21, (num_tokens, -(-hidden // GROUP_SIZE)), generator=generator)
    values *= scale.repeat_interleave(GROUP_SIZE, dim=1)[:, :hidden]
    return values.to(draw(st.sampled_from([torch.bfloat16, torch.float32])))


@given(activations(), st.sampled_from(["plain", "fp8"]))
def test_rows_have_the_size_that_the_format_says(x_TD: Tensor, name: str) -> None:
    rows = row_format(name, x_TD.shape[1], x_TD.dtype)  # type: ignore[arg-type]
    encoded = rows.encode(x_TD)
    assert encoded.dtype == torch.uint8 and encoded.shape == (len(x_TD), rows.row_bytes)
    assert rows.decode(encoded).shape == x_TD.shape and rows.decode(encoded).dtype == x_TD.dtype


@given(activations())
def test_plain_rows_arrive_bit_for_bit(x_TD: Tensor) -> None:
    rows = row_format("plain", x_TD.shape[1], x_TD.dtype)
    assert torch.equal(rows.decode(rows.encode(x_TD).clone()).view(torch.uint8), x_TD.view(torch.uint8))


@given(activations())
def test_fp8_is_off_by_no_more_than_its_rounding(x_TD: Tensor) -> None:
    """2^-4 of the value (three mantissa bits), 2^-10 of the scale below e4m3's normal numbers, and bf16's own."""
    rows = Fp8Rows(x_TD.shape[1], x_TD.dtype)
    got_TD, x_TD = rows.decode(rows.encode(x_TD)).double(), x_TD.double()
    groups = x_TD.split(GROUP_SIZE, dim=1)
    largest_TD = torch.cat([group.abs().amax(dim=1, keepdim=True).expand_as(group) for group in groups], dim=1)
    bound_TD = torch.maximum(x_TD.abs() * 2**-4, largest_TD / 448 * 2**-10) * (1 + 2**-7) + x_TD.abs() * 2**-8
    assert ((got_TD - x_TD).abs() <= bound_TD).all()


def test_fp8_is_about_half_of_bf16s_bytes() -> None:
    plain, fp8 = (row_format(name, 7168, torch.bfloat16).row_bytes for name in ("plain", "fp8"))  # type: ignore[arg-type]
    assert (plain, fp8) == (14336, 7168 + 4 * 56)


def test_nan_is_still_nan_and_zero_is_zero() -> None:
    rows = Fp8Rows(256, torch.bfloat16)
    x_TD = torch.zeros(2, 256, dtype=torch.bfloat16)
    x_TD[1, 3] = torch.nan
    got_TD = rows.decode(rows.encode(x_TD))
    assert torch.equal(got_TD[0], x_TD[0]) and torch.equal(got_TD[1, 128:], x_TD[1, 128:])
    assert got_TD[1, :128].isnan().any()


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="'int3'"):
        row_format("int3", 4, torch.bfloat16)  # type: ignore[arg-type]
