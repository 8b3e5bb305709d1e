"""The CPU kernel: within the bounds of its arithmetic, and a row's bits are its token's and its expert's alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeray.deepseek_v4 import ExpertError, packed_experts
from moeray.deepseek_v4.expert_formula import ExpertWeights
from moeray.deepseek_v4.experts import given_experts
from moeray.deepseek_v4.packed_experts import PackedExperts

NUM_EXPERTS, TOP_K, LAYER, LIMIT = 5, 3, 7, 1.0
SHAPES = [(64, 32), (33, 16), (48, 20), (1, 1), (7, 40), (250, 130)]
DTYPES = [torch.bfloat16, torch.float32]
UNIT = {torch.bfloat16: 2.0**-9, torch.float32: 0.0}
"""Half a unit in the last place: what a rounding to the activations' dtype adds to the fp32 arithmetic."""
FP32 = 2.0**-24

Shape = tuple[int, int]


def matrices(hidden: int, width: int, dtype: torch.dtype) -> dict[int, ExpertWeights]:
    generator = torch.Generator().manual_seed(hidden * 1000 + width)
    return {
        expert: ExpertWeights(
            (torch.randn(2 * width, hidden, generator=generator) / hidden**0.5).to(dtype),
            (torch.randn(hidden, width, generator=generator) / width**0.5).to(dtype),
        )
        for expert in range(NUM_EXPERTS)
    }


def packed(
    weights: dict[int, ExpertWeights], held: Sequence[int] | None = None, num_threads: int = 1, limit: float = LIMIT
) -> PackedExperts:
    held = tuple(weights) if held is None else held
    hidden, width = weights[0].w2.shape
    experts = PackedExperts(
        hidden_size=hidden, width=width, dtype=weights[0].w2.dtype, num_experts=NUM_EXPERTS, limit=limit,
        num_threads=num_threads,
    )  # fmt: skip
    for expert in held:
        experts.put(LAYER, expert, weights[expert])
    return experts


def batch(num_tokens: int, hidden: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(num_tokens)]
    x_TD = 2 * torch.randn(num_tokens, hidden, generator=generator)
    return x_TD.to(dtype), torch.stack(ids).int() if ids else torch.empty((0, TOP_K), dtype=torch.int32)


def exact_and_bound(weights: ExpertWeights, x: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """One row in float64, and how far fp32 sums in any order, rounded where they are, may be from it.

    A sum of n products is within n units of the sum of their magnitudes; clamps do not widen an error, silu by 1.1 at
    most; silu itself is within 6 units (exp 2 ulp = 4, one sum, one quotient).
    """
    w13, w2, x = weights.w13.double(), weights.w2.double(), x.double()
    width, hidden = len(w13) // 2, len(x)
    pre, pre_error = w13 @ x, hidden * FP32 * (w13.abs() @ x.abs())
    pre_error = pre_error + unit * (pre.abs() + pre_error)
    gate, up = pre[:width].clamp(max=LIMIT), pre[width:].clamp(-LIMIT, LIMIT)
    silu = gate * torch.sigmoid(gate)
    silu_error = 1.1 * pre_error[:width] + 7 * FP32 * (silu.abs() + 1.1 * pre_error[:width])
    h = silu * up
    h_error = (silu.abs() + silu_error) * pre_error[width:] + silu_error * up.abs()
    h_error = h_error + (FP32 + unit) * (h.abs() + h_error)
    y = w2 @ h
    y_error = w2.abs() @ h_error + width * FP32 * (w2.abs() @ (h.abs() + h_error))
    return y, 1.001 * (y_error + unit * (y.abs() + y_error)) + 1e-30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "width"), SHAPES)
def test_every_number_is_within_the_bound_of_its_arithmetic(hidden: int, width: int, dtype: torch.dtype) -> None:
    weights = matrices(hidden, width, dtype)
    x_TD, ids_TK = batch(30, hidden, dtype)
    rows_PD = packed(weights).rows(LAYER, x_TD, ids_TK).rows_PD
    for pair, expert in enumerate(ids_TK.view(-1).tolist()):
        expected, bound = exact_and_bound(weights[expert], x_TD[pair // TOP_K], UNIT[dtype])
        assert ((rows_PD[pair].double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "width"), SHAPES)
def test_matrices_come_back_as_they_were_put(hidden: int, width: int, dtype: torch.dtype) -> None:
    weights = matrices(hidden, width, dtype)
    experts = packed(weights)
    for expert, given_ in weights.items():
        assert torch.equal(experts.get(LAYER, expert).w13, given_.w13)
        assert torch.equal(experts.get(LAYER, expert).w2, given_.w2)


def test_where_nothing_is_rounded_up_to_a_block_packing_takes_no_memory() -> None:
    weights = matrices(64, 32, torch.bfloat16)
    assert packed(weights).weight_bytes == NUM_EXPERTS * 3 * 64 * 32 * 2


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    num_tokens=st.integers(1, 130),  # an expert gets more rows than the kernel takes at a time
    chosen=st.data(),
)
def test_bits_do_not_depend_on_batch_position_slice_or_threads(
    dtype: torch.dtype, shape: Shape, num_tokens: int, chosen: st.DataObject
) -> None:
    hidden, width = shape
    weights = matrices(hidden, width, dtype)
    x_TD, ids_TK = batch(num_tokens, hidden, dtype, seed=num_tokens)
    expected = packed(weights).rows(LAYER, x_TD, ids_TK).rows_PD.view(num_tokens, TOP_K, hidden)
    tokens = chosen.draw(st.lists(st.integers(0, num_tokens - 1), min_size=1, max_size=60), label="tokens")
    held = chosen.draw(st.permutations(range(NUM_EXPERTS)), label="held")[: chosen.draw(st.integers(1, NUM_EXPERTS))]
    part = packed(weights, held, num_threads=chosen.draw(st.integers(1, 4), label="threads"))
    mine_TK = torch.isin(ids_TK[tokens], torch.tensor(held, dtype=torch.int32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_experts, "SHARED_BYTES", 0)
        patch.setattr(packed_experts, "MAX_PAIRS", chosen.draw(st.sampled_from([1, 7, 100, 8192]), label="at a time"))
        rows_PD = part.rows(LAYER, x_TD[tokens], torch.where(mine_TK, ids_TK[tokens], -1)).rows_PD
    assert torch.equal(rows_PD, expected[tokens][mine_TK])


def silu_of(gates: Tensor, limit: float = torch.inf) -> Tensor:
    """What the kernel makes of these gates, with up = 1 and w2 = 1: fp32, one unit, nothing to sum."""
    weights = {0: ExpertWeights(torch.eye(2), torch.ones(2, 1))}
    experts = packed(weights, limit=limit)
    x_T2 = torch.stack([gates, torch.ones_like(gates)], dim=1)
    return experts.rows(LAYER, x_T2, torch.zeros(len(gates), 1, dtype=torch.int32)).rows_PD[:, 0]


def test_silu_is_within_six_half_units_in_the_last_place() -> None:
    gates = torch.cat([torch.linspace(-87, 88, 40001), torch.logspace(-30, 1, 2001), -torch.logspace(-30, 1, 2001)])
    exact = gates.double() * torch.sigmoid(gates.double())
    assert ((silu_of(gates).double() - exact).abs() <= 6 * FP32 * exact.abs()).all()


def test_silu_of_what_exp_cannot_hold_is_zero_or_the_gate_itself() -> None:
    assert silu_of(torch.tensor([-88.5, -1e4, -3e38])).abs().max() == 0
    large = torch.tensor([88.5, 1e4, 3e38])
    assert torch.equal(silu_of(large), large)


def test_gate_is_clamped_above_and_up_on_both_sides() -> None:
    weights = {0: ExpertWeights(torch.eye(2), torch.ones(2, 1))}
    experts = packed(weights, limit=1.5)
    x_TD = torch.tensor([[1.5, 1.0], [9.0, 1.0], [1.0, 1.5], [1.0, 7.0], [1.0, -1.5], [1.0, -8.0], [-9.0, 1.0]])
    y = experts.rows(LAYER, x_TD, torch.zeros(len(x_TD), 1, dtype=torch.int32)).rows_PD[:, 0]
    assert y[0] == y[1]
    assert y[2] == y[3] == -y[4] == -y[5]
    assert y[6] == silu_of(torch.tensor([-9.0]))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_marked_and_no_others(
    dtype: torch.dtype, num_threads: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_experts, "SHARED_BYTES", 0)
    weights = matrices(48, 20, dtype)
    weights[2].w2[41, 3] = value
    x_TD, ids_TK = batch(20, 48, dtype)
    result = packed(weights, num_threads=num_threads).rows(LAYER, x_TD, ids_TK)
    assert result.bad_P is not None
    assert np.array_equal(result.bad_P > 0, (ids_TK.view(-1) == 2).numpy())
    assert np.array_equal(result.bad_P > 0, ~result.rows_PD.isfinite().all(dim=1).numpy())


def test_nan_in_an_activation_is_seen_through_the_clamp() -> None:
    weights = matrices(48, 20, torch.bfloat16)
    x_TD, ids_TK = batch(3, 48, torch.bfloat16)
    x_TD[1, 5] = float("nan")
    bad_P = packed(weights).rows(LAYER, x_TD, ids_TK).bad_P
    assert bad_P is not None
    assert bad_P.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("expert", [NUM_EXPERTS - 1, NUM_EXPERTS, 2**31 - 1])
def test_an_expert_that_is_not_held_or_does_not_exist_is_named(expert: int) -> None:
    weights = matrices(48, 20, torch.bfloat16)
    experts = packed(weights, held=(0, 1))
    with pytest.raises(ExpertError, match=f"expert {expert} of layer {LAYER} is not held here"):
        experts.rows(LAYER, torch.zeros(1, 48).bfloat16(), torch.tensor([[0, -1, expert]], dtype=torch.int32))


def test_activations_and_ids_may_lie_anywhere() -> None:
    weights = matrices(48, 20, torch.bfloat16)
    experts = packed(weights)
    x_TD, ids_TK = batch(9, 48, torch.bfloat16)
    expected = experts.rows(LAYER, x_TD, ids_TK).rows_PD
    strided, odd = x_TD.t().contiguous().t(), torch.empty(9 * 48 + 1).bfloat16()[1:].view(9, 48)
    odd.copy_(x_TD)
    for x in (strided, odd):
        assert torch.equal(experts.rows(LAYER, x, ids_TK.t().contiguous().t()).rows_PD, expected)


@pytest.mark.parametrize("compiled", [True, False])
def test_rows_lie_where_they_are_wanted_or_it_is_said_why_not(compiled: bool) -> None:
    weights = matrices(48, 20, torch.bfloat16)
    experts = given_experts({0: weights}, num_layers=1, num_experts=NUM_EXPERTS, swiglu_limit=LIMIT, compiled=compiled)
    x_TD, ids_TK = batch(9, 48, torch.bfloat16)
    expected, room = experts(0, x_TD, ids_TK), torch.full((30, 48), 7).bfloat16()
    rows_PD = experts(0, x_TD, ids_TK, room[1:])
    assert rows_PD.data_ptr() == room[1:].data_ptr()
    assert torch.equal(rows_PD, expected)
    assert (room[0] == 7).all() and (room[28:] == 7).all()
    for wrong in (room[:26], room.float(), room[:, :47], room.t().contiguous().t()):
        with pytest.raises(ExpertError, match=r"no room for 27 rows of torch\.bfloat16 x 48 in"):
            experts(0, x_TD, ids_TK, wrong)


def test_nan_is_marked_in_the_slice_of_a_long_call_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_experts, "MAX_PAIRS", 3 * TOP_K)
    x_TD, ids_TK = batch(10, 48, torch.bfloat16)
    x_TD[7, 0] = float("nan")
    bad_P = packed(matrices(48, 20, torch.bfloat16)).rows(LAYER, x_TD, ids_TK).bad_P
    assert bad_P is not None
    assert np.flatnonzero(bad_P).tolist() == [21, 22, 23]


def test_calls_from_several_threads_do_not_disturb_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_experts, "SHARED_BYTES", 0)
    experts = packed(matrices(64, 32, torch.bfloat16), num_threads=2)
    calls = [batch(num_tokens, 64, torch.bfloat16, seed=num_tokens) for num_tokens in (1, 3, 17, 40)]
    expected = [experts.rows(LAYER, *call).rows_PD for call in calls]
    wrong: list[int] = []

    def work(at: int) -> None:
        wrong.extend(at for _ in range(50) if not torch.equal(experts.rows(LAYER, *calls[at]).rows_PD, expected[at]))

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_shares_of_a_large_call_are_computed_at_one_time_by_as_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    num_threads = 3
    experts = packed(matrices(64, 32, torch.bfloat16), num_threads=num_threads)
    meeting, gate_up, seen = threading.Barrier(num_threads), experts._products.gate_up, set()

    def together(*arguments: object) -> None:
        seen.add(threading.get_ident())
        if len(seen) > 1 or packed_experts.SHARED_BYTES == 0:
            meeting.wait(timeout=60)  # breaks if one thread is to compute two shares, or there is no other one
        gate_up(*arguments)

    experts._products = experts._products._replace(gate_up=together)
    call = batch(9, 64, torch.bfloat16)
    experts.rows(LAYER, *call)
    assert seen == {threading.get_ident()}, "a call that reads little is not worth another thread"
    monkeypatch.setattr(packed_experts, "SHARED_BYTES", 0)
    experts.rows(LAYER, *call)
    assert len(seen) == num_threads


BITS_OF_A_CALL = """
import sys, hashlib, torch
from test_packed_experts import DTYPES, LAYER, batch, matrices, packed
from moeray.deepseek_v4.expert_kernel import TILE_ROWS
digest = hashlib.sha256()
for dtype in DTYPES:
    for hidden, width in ((48, 20), (250, 130)):
        experts = packed(matrices(hidden, width, dtype))
        for num_tokens in (1, 2, 30):
            rows_PD = experts.rows(LAYER, *batch(num_tokens, hidden, dtype)).rows_PD
            digest.update(rows_PD.view(torch.uint8).numpy().tobytes())
print(TILE_ROWS, digest.hexdigest())
"""
MACHINES = {
    "this one": {},
    "AVX2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+sse4.2,+popcnt"},
    "SSE2, no fused multiply-add": {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"},
}


@pytest.mark.full
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for other x86 processors")
def test_bits_do_not_depend_on_the_machines_vectors() -> None:
    bits = {}
    for name, environment in MACHINES.items():
        done = subprocess.run(
            [sys.executable, "-c", BITS_OF_A_CALL], capture_output=True, text=True, timeout=240, check=False,
            env={**os.environ, **environment}, cwd=Path(__file__).parent,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        bits[name] = done.stdout.split()
    assert len({digest for _, digest in bits.values()}) == 1, bits
    assert bits["AVX2"][0] == "2"


def test_a_product_half_way_between_two_numbers_goes_to_the_even_one() -> None:
    """As torch rounds: 1 + 2^-8 is half-way between 1 and 1 + 2^-7 in bf16, and what follows shows which it was."""
    weights = ExpertWeights(
        torch.tensor([[8.0, 0.0], [1.0, 2.0**-8]]).bfloat16(), torch.tensor([[1.0], [0.0]]).bfloat16()
    )
    ids_TK, x_TD = torch.zeros((1, 1), dtype=torch.int32), torch.ones((1, 2), dtype=torch.bfloat16)
    for compiled in (True, False):
        experts = given_experts({0: {0: weights}}, num_layers=1, num_experts=1, swiglu_limit=10.0, compiled=compiled)
        assert experts(0, x_TD, ids_TK)[0, 0].item() == 8.0
