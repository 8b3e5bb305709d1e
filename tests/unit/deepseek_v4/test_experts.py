"""The routed experts: right mathematics, only their own bytes, and bits that no slicing changes."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moeray.deepseek_v4 import Checkpoint, CheckpointError, ExpertError, RoutedExperts
from moeray.deepseek_v4.expert_formula import ExpertWeights
from moeray.deepseek_v4.experts import given_experts

Write = Callable[..., Path]
HIDDEN, NUM_EXPERTS, LIMIT = 48, 6, 1.5
ALL = dict.fromkeys(range(3), range(NUM_EXPERTS))


def batch(num_tokens: int, top_k: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randperm(NUM_EXPERTS, generator=generator)[:top_k] for _ in range(num_tokens)]
    ids_TK = torch.stack(ids).int() if ids else torch.empty((0, top_k), dtype=torch.int32)
    return torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16(), ids_TK


def weights_of(experts: RoutedExperts, layer: int) -> dict[int, ExpertWeights]:
    return {expert: experts.weights(layer, expert) for expert in experts.held[layer]}


def reference(directory: Path, layer: int, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
    """float64, straight from the formula."""
    stored = load_file(directory / "model.safetensors")
    rows = []
    for token, expert in ((t, e) for t in range(len(ids_TK)) for e in ids_TK[t].tolist() if e >= 0):
        w1, w2, w3 = (stored[f"layers.{layer}.ffn.experts.{expert}.{w}.weight"].double() for w in ("w1", "w2", "w3"))
        x = x_TD[token].double()
        gate, up = (w1 @ x).clamp(max=LIMIT), (w3 @ x).clamp(-LIMIT, LIMIT)
        rows.append(w2 @ (gate * torch.sigmoid(gate) * up))
    return torch.stack(rows)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
def test_rows_are_those_of_the_float64_formula(
    write: Write, dtype: torch.dtype, tolerance: float, compiled: bool
) -> None:
    directory = write()
    experts = RoutedExperts.load(Checkpoint.open(directory), ALL, dtype=dtype, compiled=compiled)
    x_TD, ids_TK = batch(17)
    rows_PD = experts(1, x_TD.to(dtype), ids_TK)
    expected = reference(directory, 1, x_TD, ids_TK)
    assert rows_PD.dtype == dtype
    assert (rows_PD.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_the_limit_bites_on_these_inputs(write: Write) -> None:
    """Without it, the tests of the mathematics would not notice a missing clamp."""
    clamped = RoutedExperts.load(Checkpoint.open(write(name="clamped")), ALL)
    free = RoutedExperts.load(Checkpoint.open(write(name="free", swiglu_limit=0)), ALL)
    x_TD, ids_TK = batch(17)
    assert (clamped(1, x_TD, ids_TK) - free(1, x_TD, ids_TK)).abs().max() > 1


def test_rows_are_those_of_transformers_own_experts(write: Write) -> None:
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

    directory = write()
    config = DeepseekV4Config(
        hidden_size=HIDDEN,
        moe_intermediate_size=20,
        n_routed_experts=NUM_EXPERTS,
        swiglu_limit=LIMIT,
        num_hidden_layers=3,
    )
    config._experts_implementation = "eager"
    theirs = DeepseekV4Experts(config)
    stored = load_file(directory / "model.safetensors")
    names = [f"layers.1.ffn.experts.{expert}" for expert in range(NUM_EXPERTS)]
    with torch.no_grad():
        for expert, name in enumerate(names):
            theirs.gate_up_proj[expert] = torch.cat([stored[f"{name}.w1.weight"], stored[f"{name}.w3.weight"]]).float()
            theirs.down_proj[expert] = stored[f"{name}.w2.weight"].float()
        x_TD, ids_TK = batch(17)
        weights_TK = torch.rand(ids_TK.shape, generator=torch.Generator().manual_seed(3))
        expected = theirs(x_TD.float(), ids_TK.long(), weights_TK)
    ours = RoutedExperts.load(Checkpoint.open(directory), ALL, dtype=torch.float32)
    rows_TKD = ours(1, x_TD.float(), ids_TK).view(17, 3, HIDDEN)
    torch.testing.assert_close((rows_TKD * weights_TK.unsqueeze(-1)).sum(1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("slices", [[range(3), range(3, 6)], [[0], [1, 2, 3, 4], [5]], [[5, 0], [2], [4, 3, 1]]])
def test_bits_are_the_same_for_every_slicing(write: Write, slices: list[list[int]], dtype: torch.dtype) -> None:
    checkpoint = Checkpoint.open(write())
    whole = RoutedExperts.load(checkpoint, ALL, dtype=dtype)
    parts = [(held, RoutedExperts.load(checkpoint, dict.fromkeys(range(3), held), dtype=dtype)) for held in slices]
    for num_tokens in (1, 2, 7, 33, 130):
        x_TD, ids_TK = batch(num_tokens, seed=num_tokens)
        x_TD = x_TD.to(dtype)
        expected = whole(2, x_TD, ids_TK)
        flat = ids_TK.view(-1)
        for held, part in parts:
            mine = torch.isin(flat, torch.tensor(list(held), dtype=torch.int32))
            own_ids = torch.where(mine, flat, -1).view_as(ids_TK)
            tokens = (own_ids >= 0).any(dim=1)
            assert torch.equal(part(2, x_TD[tokens], own_ids[tokens]), expected[mine])


def test_only_the_held_experts_bytes_are_read(write: Write) -> None:
    directory = write()
    checkpoint = Checkpoint.open(directory)
    held = {0: [1, 4], 2: [3]}
    names = [name for layer, experts in held.items() for name in checkpoint.expert_names(layer, experts)]
    x_TD, ids_TK = batch(9)
    ids_TK = torch.where((ids_TK == 1) | (ids_TK == 4), ids_TK, -1)
    expected = RoutedExperts.load(checkpoint, ALL)(0, x_TD, ids_TK)
    with (directory / "model.safetensors").open("r+b") as stream:  # every other tensor becomes NaN
        for name, place in checkpoint.tensors.items():
            if name not in names:
                stream.seek(place.offset)
                stream.write(b"\xff" * place.num_bytes)
    seen: list[tuple[int, int]] = []
    experts = RoutedExperts.load(Checkpoint.open(directory), held, lambda done, total: seen.append((done, total)))
    assert torch.equal(experts(0, x_TD, ids_TK), expected)
    total = 3 * 3 * 2 * 48 * 20
    assert experts.bytes_read == checkpoint.bytes_of(names) == total
    padded = 3 * 2 * (2 * 32 * 48 + 64 * 20)  # widths rounded up to 16, rows of w2 to 32
    assert experts.weight_bytes == padded
    assert seen == [(total * step // 3, total) for step in (1, 2, 3)]
    assert experts.held == {0: (1, 4), 2: (3,)}


def test_a_file_that_shrinks_after_opening_is_named(write: Write) -> None:
    directory = write()
    checkpoint = Checkpoint.open(directory)
    os.truncate(directory / "model.safetensors", 5000)
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: (layers\..*bytes expected, \d+ found|was replaced or changed)"
    ):
        RoutedExperts.load(checkpoint, ALL)


@pytest.mark.parametrize("num_tokens", [0, 4])
@pytest.mark.parametrize("held", [ALL, {1: [0]}, {}])
def test_a_call_without_a_pair_is_legal(write: Write, num_tokens: int, held: dict[int, list[int]]) -> None:
    experts = RoutedExperts.load(Checkpoint.open(write()), held)
    rows_PD = experts(0, torch.ones(num_tokens, HIDDEN).bfloat16(), torch.full((num_tokens, 2), -1, dtype=torch.int32))
    assert rows_PD.shape == (0, HIDDEN)
    assert experts.tokens().sum() == 0


def test_an_expert_that_is_not_held_is_named(write: Write) -> None:
    experts = RoutedExperts.load(Checkpoint.open(write()), {0: [0, 1]})
    x_TD = torch.ones(1, HIDDEN).bfloat16()
    with pytest.raises(ExpertError, match="expert 5 of layer 0 is not held here"):
        experts(0, x_TD, torch.tensor([[0, 5]], dtype=torch.int32))
    with pytest.raises(ExpertError, match="expert 0 of layer 2 is not held here"):
        experts(2, x_TD, torch.tensor([[0]], dtype=torch.int32))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_row_is_an_error_that_names_its_experts(write: Write, poison: float, compiled: bool) -> None:
    weights = weights_of(RoutedExperts.load(Checkpoint.open(write()), ALL), 1)
    x_TD, _ = batch(3)
    ids_TK = torch.tensor([[0, 1], [3, 2], [4, 5]], dtype=torch.int32)
    for expert in (2, 3):
        weights[expert].w2[7, 3] = poison
    experts = given_experts({1: weights}, num_layers=3, num_experts=NUM_EXPERTS, swiglu_limit=LIMIT, compiled=compiled)
    with pytest.raises(ExpertError, match=r"layer 1: experts \[2, 3\] gave NaN or Inf"):
        experts(1, x_TD, ids_TK)


def test_activations_that_are_not_finite_are_not_blamed_on_an_expert(write: Write) -> None:
    experts = RoutedExperts.load(Checkpoint.open(write()), ALL)
    x_TD, ids_TK = batch(3)
    x_TD[1, 5] = float("nan")
    with pytest.raises(ExpertError, match="layer 1: the shard sent activations that hold NaN or Inf"):
        experts(1, x_TD, ids_TK)


@pytest.mark.parametrize("compiled", [True, False])
def test_large_finite_rows_are_no_error(write: Write, compiled: bool) -> None:
    loaded = RoutedExperts.load(Checkpoint.open(write(swiglu_limit=0)), ALL, dtype=torch.float32)
    weights = weights_of(loaded, 0)
    for matrices in weights.values():
        matrices.w2.mul_(1e36)
    experts = given_experts(
        {0: weights}, num_layers=3, num_experts=NUM_EXPERTS, swiglu_limit=math.inf, compiled=compiled
    )
    x_TD, ids_TK = batch(30)
    rows_PD = experts(0, x_TD.float(), ids_TK)
    assert rows_PD.isfinite().all()


def test_activations_of_another_dtype_are_refused(write: Write) -> None:
    experts = RoutedExperts.load(Checkpoint.open(write()), ALL)
    with pytest.raises(ExpertError, match=r"float32 x 48, the experts torch.bfloat16 x 48"):
        experts(0, torch.ones(1, HIDDEN), torch.tensor([[1]], dtype=torch.int32))


def test_load_counts_every_pair_once_also_from_many_threads(write: Write) -> None:
    experts = RoutedExperts.load(Checkpoint.open(write()), ALL)
    batches = [(layer, *batch(40, seed=seed)) for seed in range(4) for layer in range(3)]

    def work(part: list[tuple[int, Tensor, Tensor]]) -> None:
        for _ in range(10):
            for call in part:
                experts(*call)

    threads = [threading.Thread(target=work, args=(batches[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = np.zeros((3, NUM_EXPERTS), dtype=np.int64)
    for layer, _, ids_TK in batches:
        expected[layer] += 10 * np.bincount(ids_TK.view(-1).numpy(), minlength=NUM_EXPERTS)
    assert (experts.tokens() == expected).all()


@pytest.mark.parametrize(("dtype", "compiled"), [(torch.bfloat16, False), (torch.float64, True)])
def test_what_the_kernel_does_not_compute_is_the_formula_and_is_said_to_depend_on_the_batch(
    write: Write, dtype: torch.dtype, compiled: bool
) -> None:
    experts = RoutedExperts.load(Checkpoint.open(write()), ALL, dtype=dtype, compiled=compiled)
    assert (experts.kernel, experts.batch_invariant) == ("torch", False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(write: Write, dtype: torch.dtype) -> None:
    experts = RoutedExperts.load(Checkpoint.open(write()), ALL, dtype=dtype)
    assert (experts.kernel, experts.batch_invariant) == ("moeray", True)
    x_TD, ids_TK = batch(130)
    together = experts(1, x_TD.to(dtype), ids_TK).view(130, 3, HIDDEN)
    for token in (0, 1, 64, 129):
        assert torch.equal(experts(1, x_TD[token : token + 1].to(dtype), ids_TK[token : token + 1]), together[token])


def test_the_kernel_rounds_where_the_formula_does(write: Write) -> None:
    """Sums in another order change a rounding now and then; a rounding less changes most numbers."""
    x_TD, ids_TK = batch(100)
    kernel, formula = (
        RoutedExperts.load(Checkpoint.open(write(name=str(compiled))), ALL, compiled=compiled)(1, x_TD, ids_TK)
        for compiled in (True, False)
    )
    assert (kernel == formula).float().mean() > 0.95
