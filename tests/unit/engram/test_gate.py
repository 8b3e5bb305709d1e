"""How rows enter the streams: held to the formula, one stream at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeray.deepseek_v4.engram import add_gated_value
from moeray.deepseek_v4.engram_gate_kernel import add_gated_value_bf16

T, H, D, EPS = 5, 4, 16, 1e-6


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return {
        "streams_THD": torch.randn(T, H, D, generator=g) * 2,
        "kv": torch.randn(T, (H + 1) * D, generator=g),
        "q_weight_HD": 1 + 0.3 * torch.randn(H, D, generator=g),
        "k_weight_HD": 1 + 0.3 * torch.randn(H, D, generator=g),
    }


def by_the_formula(x: dict[str, torch.Tensor]) -> torch.Tensor:
    """h + sigmoid(sign(m) sqrt(max(|m|, 1e-6))) v, m = sum(h q k key) rms(h) rms(key) / sqrt(D), in Python floats."""
    out = x["streams_THD"].clone().double()
    for t in range(T):
        value = x["kv"][t, H * D :].double()
        for s in range(H):
            h, key = x["streams_THD"][t, s].double(), x["kv"][t, s * D : (s + 1) * D].double()
            match = float((h * x["q_weight_HD"][s].double() * x["k_weight_HD"][s].double() * key).sum()) / math.sqrt(D)
            for vector in (h, key):
                match /= math.sqrt(float(vector.square().mean()) + EPS)
            gate = 1 / (1 + math.exp(-math.copysign(math.sqrt(max(abs(match), 1e-6)), match)))
            out[t, s] += gate * value
    return out


def test_the_gate_is_that_of_the_formula(inputs: dict[str, torch.Tensor]) -> None:
    got = add_gated_value(**inputs, rms_eps=EPS)
    torch.testing.assert_close(got.double(), by_the_formula(inputs), rtol=1e-5, atol=1e-5)


def test_bf16_streams_are_off_by_the_rounding_of_the_output_only(inputs: dict[str, torch.Tensor]) -> None:
    low = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    want = by_the_formula({name: tensor.float() for name, tensor in low.items()})
    got = add_gated_value(**low, rms_eps=EPS)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-5)


def compiled(streams_THD: torch.Tensor, kv: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return add_gated_value_bf16(streams_THD, kv, q.float() * k.float(), EPS)


@given(num_tokens=st.integers(0, 9), num_streams=st.integers(1, 4), hidden=st.integers(1, 65), seed=st.integers(0, 999))
def test_the_compiled_gate_rounds_the_formula_once(num_tokens: int, num_streams: int, hidden: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    streams = (2 * torch.randn(num_tokens, num_streams, hidden, generator=g)).bfloat16()
    kv = torch.randn(num_tokens, (num_streams + 1) * hidden, generator=g).bfloat16()
    q, k = (1 + 0.3 * torch.randn(2, num_streams, hidden, generator=g)).bfloat16()
    got = compiled(streams, kv, q, k)
    exact = add_gated_value(streams.double().float(), kv.float(), q.float(), k.float(), EPS)
    assert got.shape == streams.shape and got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), exact, rtol=2**-8, atol=1e-5)
    for t in range(num_tokens):
        assert torch.equal(compiled(streams[t : t + 1], kv[t : t + 1], q, k), got[t : t + 1])


def test_the_compiled_gate_takes_a_part_of_the_streams_and_passes_on_what_is_no_number(
    inputs: dict[str, torch.Tensor],
) -> None:
    low = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    streams, kv, q, k = low["streams_THD"], low["kv"], low["q_weight_HD"], low["k_weight_HD"]
    whole = compiled(streams, kv, q, k)
    assert torch.equal(compiled(streams.repeat(1, 1, 2)[..., :D], kv, q, k), whole)
    streams[1, 2, 3] = torch.nan
    got = compiled(streams, kv, q, k)
    want = add_gated_value(streams, kv, q, k, EPS)
    assert torch.equal(got.isnan(), want.isnan()) and int(got.isnan().sum()) == D


def test_the_streams_are_not_written(inputs: dict[str, torch.Tensor]) -> None:
    before = inputs["streams_THD"].clone()
    add_gated_value(**inputs, rms_eps=EPS)
    assert torch.equal(inputs["streams_THD"], before)


def test_no_token_is_legal(inputs: dict[str, torch.Tensor]) -> None:
    empty = {**inputs, "streams_THD": inputs["streams_THD"][:0], "kv": inputs["kv"][:0]}
    assert add_gated_value(**empty, rms_eps=EPS).shape == (0, H, D)
