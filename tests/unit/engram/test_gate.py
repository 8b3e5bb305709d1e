"""How rows enter the streams: held to the formula, one stream at a time."""

from __future__ import annotations

import math

import pytest
import torch

from moeray.deepseek_v4.engram import add_gated_value

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


def test_the_streams_are_not_written(inputs: dict[str, torch.Tensor]) -> None:
    before = inputs["streams_THD"].clone()
    add_gated_value(**inputs, rms_eps=EPS)
    assert torch.equal(inputs["streams_THD"], before)


def test_no_token_is_legal(inputs: dict[str, torch.Tensor]) -> None:
    empty = {**inputs, "streams_THD": inputs["streams_THD"][:0], "kv": inputs["kv"][:0]}
    assert add_gated_value(**empty, rms_eps=EPS).shape == (0, H, D)
