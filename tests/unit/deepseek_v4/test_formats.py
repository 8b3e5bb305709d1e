"""Quantised weights have exactly the values that their formats' definitions give them."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from moeray.deepseek_v4.errors import CheckpointError
from moeray.deepseek_v4.formats import dequantise, stored_matrix, unpack_e2m1
from moeray.deepseek_v4.quantise import quantise_fp4, quantise_fp8
from moeray.deepseek_v4.weight_files import StoredTensor


def e2m1(code: int) -> float:
    """OCP MX v1.0, table 5: one sign, two exponent (bias 1) and one mantissa bit."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, (code >> 1) & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))


def e4m3(byte: int) -> float:
    """OCP FP8, variant fn: bias 7, no infinity, all ones is NaN."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))


def transformers_values(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The same conversion by transformers, an independent implementation."""
    return Fp8Dequantize(SimpleNamespace())._dequantize_one(values, scales, dtype)


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def random_scales(*shape: int, low: int = 100, high: int = 150) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8).view(torch.float8_e8m0fnu)


def finite_e4m3(*shape: int) -> Tensor:
    values = random_bytes(*shape)
    return torch.where(values & 127 == 127, values - 1, values).view(torch.float8_e4m3fn)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Also tells -0 from 0."""
    as_int = torch.int16 if left.dtype == torch.bfloat16 else torch.int32
    return left.dtype == right.dtype and torch.equal(left.view(as_int), right.view(as_int))


def test_every_byte_unpacks_to_the_two_values_of_its_halves_low_half_first() -> None:
    got = unpack_e2m1(torch.arange(256, dtype=torch.uint8).view(1, 256)).view(256, 2)
    assert got.tolist() == [[e2m1(byte & 15), e2m1(byte >> 4)] for byte in range(256)]
    assert got[0x88].signbit().all()


def test_every_e4m3_byte_has_the_value_of_its_definition() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, 256)
    got = dequantise(values, torch.ones(1, 2), (128, 128), torch.float32)[0].tolist()
    for byte, value in enumerate(got):
        assert value == e4m3(byte) or (math.isnan(value) and math.isnan(e4m3(byte)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("container", [torch.int8, torch.uint8])
def test_fp4_equals_transformers_bit_for_bit(dtype: torch.dtype, container: torch.dtype) -> None:
    packed, scales = random_bytes(96, 64), random_scales(96, 4)
    got = dequantise(packed.view(container), scales, (1, 32), dtype)
    assert got.shape == (96, 128)
    assert same_bits(got, transformers_values(packed.view(torch.int8), scales, dtype))
    assert same_bits(got, dequantise(packed, scales.view(torch.uint8), (1, 32), dtype)), "e8m0 kept as raw bytes"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [128, 32])
@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.float32])
def test_fp8_equals_transformers_bit_for_bit(dtype: torch.dtype, block: int, scale_dtype: torch.dtype) -> None:
    values, scales = finite_e4m3(256, 384), random_scales(256 // block, 384 // block)
    if scale_dtype == torch.float32:
        scales = scales.float() * 1.3
    got = dequantise(values, scales, (block, block), dtype)
    assert same_bits(got, transformers_values(values, scales, dtype))


def test_blocks_at_the_edges_may_be_smaller() -> None:
    values, scales = finite_e4m3(200, 136), random_scales(2, 2)
    got = dequantise(values, scales, (128, 128), torch.float32)
    for row, column in ((0, 0), (127, 127), (128, 128), (199, 135), (199, 0)):
        expected = values.float()[row, column] * scales.float()[row // 128, column // 128]
        assert got[row, column] == expected


@given(st.integers(0, 255), st.integers(8, 251))  # short of under- and overflow
def test_bf16_holds_every_product_of_a_quantised_value_and_an_e8m0_scale_exactly(byte: int, exponent: int) -> None:
    scales = torch.tensor([[exponent]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    packed = torch.full((1, 16), byte, dtype=torch.uint8)
    assert dequantise(packed, scales, (1, 32), torch.bfloat16)[0, :2].double().tolist() == [
        e2m1(byte & 15) * 2.0 ** (exponent - 127),
        e2m1(byte >> 4) * 2.0 ** (exponent - 127),
    ]


@pytest.mark.parametrize(
    ("weight", "scale", "expected"),
    [
        (("BF16", (256, 128)), None, "BF16"),
        (("I8", (256, 64)), ("F8_E8M0", (256, 4)), "FP4 1x32 E8M0"),
        (("U8", (256, 64)), ("U8", (256, 4)), "FP4 1x32 E8M0"),
        (("F8_E4M3", (256, 128)), ("F8_E8M0", (2, 1)), "FP8 128x128 E8M0"),
        (("F8_E4M3", (256, 128)), ("F32", (2, 1)), "FP8 128x128 F32"),
        (("F8_E4M3", (256, 128)), ("F8_E8M0", (8, 4)), "FP8 32x32 E8M0"),
        (("F8_E4M3", (200, 136)), ("F8_E8M0", (2, 2)), "FP8 128x128 E8M0"),
        (("F8_E4M3", (256, 128)), ("F8_E8M0", (256, 4)), "FP8 1x32 E8M0"),
    ],
)
def test_the_format_is_recognised_from_dtypes_and_shapes(
    weight: tuple[str, tuple[int, ...]], scale: tuple[str, tuple[int, ...]] | None, expected: str
) -> None:
    matrix = stored_matrix(tensor("w.weight", *weight), tensor("w.scale", *scale) if scale else None)
    assert matrix.format == expected
    assert matrix.shape == (weight[1][0], weight[1][1] * (2 if "FP4" in expected else 1))


def test_config_json_decides_between_block_sizes_that_both_fit() -> None:
    """A matrix within one block of 32 and of 128 has one scale either way."""
    weight, scale = tensor("w.weight", "F8_E4M3", (32, 32)), tensor("w.scale", "F8_E8M0", (1, 1))
    assert stored_matrix(weight, scale, (32, 32)).block == (32, 32)
    assert stored_matrix(weight, scale, (128, 128)).block == (128, 128)


@pytest.mark.parametrize(
    ("weight", "scale", "message"),
    [
        (("F8_E4M3", (256, 128)), None, "w.weight is stored as F8_E4M3 and has no scales beside it"),
        (("I32", (256, 128)), ("F32", (2, 1)), "stored as I32 with scales"),
        (("F8_E5M2", (256, 128)), ("F32", (2, 1)), "stored as F8_E5M2 with scales"),
        (("I8", (256, 64)), ("F32", (256, 4)), "w.scale is stored as F32; scales are F8_E8M0 or U8"),
        (("I8", (256, 64)), ("F8_E8M0", (256, 8)), r"w.scale has shape \[256, 8\].*\[256, 4\] \(blocks of 1x32\)"),
        (("F8_E4M3", (256, 128)), ("F32", (3, 1)), r"w.scale has shape \[3, 1\].*\[2, 1\] \(blocks of 128x128\)"),
    ],
)
def test_an_unknown_format_is_refused_with_the_tensors_name_and_what_would_do(
    weight: tuple[str, tuple[int, ...]], scale: tuple[str, tuple[int, ...]] | None, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored_matrix(tensor("w.weight", *weight), tensor("w.scale", *scale) if scale else None)


def tensor(name: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(name, Path("model.safetensors"), dtype, shape, 0, math.prod(shape))


@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0])
def test_quantising_rounds_to_the_nearest_value_of_the_format(spread: float) -> None:
    weight = torch.randn(200, 160, generator=torch.Generator().manual_seed(2)) * spread
    for block, grid, e8m0 in (((128, 128), (2, 2), True), ((32, 32), (7, 5), True), ((128, 128), (2, 2), False)):
        fp8, scales = quantise_fp8(weight, block, e8m0=e8m0)
        assert (fp8.shape, scales.shape) == (weight.shape, grid)
        error = (dequantise(fp8, scales, block, torch.float32) - weight).abs()
        half_a_step = weight.abs() * 2.0**-4 + 2.0**-9 * scales.float().max()  # of three bits of mantissa
        assert (error <= half_a_step).all()
    fp4, fp4_scales = quantise_fp4(weight)
    assert (fp4.shape, fp4_scales.shape) == ((200, 80), (200, 5))
    back = dequantise(fp4, fp4_scales, (1, 32), torch.float32)
    assert (back - weight).square().mean() < 0.02 * weight.square().mean()


def test_what_the_format_holds_exactly_survives_quantising() -> None:
    packed, scales = random_bytes(64, 64), random_scales(64, 4)
    packed[:, ::16] = 0x77  # a largest value in every block, so that its scale is the only exact one
    values = dequantise(packed, scales, (1, 32), torch.float32)
    assert torch.equal(dequantise(*quantise_fp4(values), (1, 32), torch.float32), values)


def test_a_matrix_of_zeros_stays_zero() -> None:
    zeros = torch.zeros(32, 64)
    assert not dequantise(*quantise_fp4(zeros), (1, 32), torch.float32).any()
    assert not dequantise(*quantise_fp8(zeros, (128, 128)), (128, 128), torch.float32).any()
