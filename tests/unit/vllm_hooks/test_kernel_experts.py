"""A group's experts on vLLM's kernels: the same rows as by the formula, or a refusal; never something else."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from moeray.deepseek_v4 import Checkpoint, CheckpointError, ExpertError, RoutedExperts
from moeray.deepseek_v4.quantise import quantise_checkpoint
from moeray.deepseek_v4.tensor_reader import TensorReader
from moeray.tiny import checkpoint_path
from moeray.vllm_hooks.kernel_experts import KernelExperts

CPU = torch.device("cpu")
HELD = {0: (2, 5, 11), 3: (0, 15)}


@pytest.fixture(scope="module")
def unclamped(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The bundled weights without a swiglu limit: what vLLM's CPU kernel can compute."""
    directory = tmp_path_factory.mktemp("unclamped")
    shutil.copy(checkpoint_path() / "model.safetensors", directory)
    config = json.loads((checkpoint_path() / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "swiglu_limit": 0}))
    return Checkpoint.open(directory)


@pytest.fixture(scope="module")
def kernel(unclamped: Checkpoint) -> KernelExperts:
    return KernelExperts.load(unclamped, HELD, device=CPU)


def batch(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    ids_TK = torch.tensor([[2, -1, 11], [5, 2, -1], [-1, -1, -1], [11, 5, 2]], dtype=torch.int32).repeat(num_tokens, 1)
    return torch.randn(4 * num_tokens, 128, generator=generator).bfloat16(), ids_TK


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_rows_are_those_of_the_formula_in_pair_order(
    kernel: KernelExperts, unclamped: Checkpoint, num_tokens: int
) -> None:
    x_TD, ids_TK = batch(num_tokens)
    expected = RoutedExperts.load(unclamped, HELD, dtype=torch.float32)(0, x_TD.float(), ids_TK)
    rows_PD = kernel(0, x_TD, ids_TK)
    assert rows_PD.dtype == torch.bfloat16
    assert rows_PD.shape == expected.shape == (7 * num_tokens, 128)
    assert (rows_PD.float() - expected).norm() <= 2e-2 * expected.norm()


def test_no_pairs_give_no_rows(kernel: KernelExperts) -> None:
    x_TD, ids_TK = batch(1)
    assert kernel(0, x_TD[:0], ids_TK[:0]).shape == (0, 128)
    assert kernel(0, x_TD, torch.full_like(ids_TK, -1)).shape == (0, 128)


def test_exactly_the_held_experts_are_read(kernel: KernelExperts, unclamped: Checkpoint) -> None:
    names = [name for layer, experts in HELD.items() for name in unclamped.expert_names(layer, experts)]
    assert kernel.bytes_read == unclamped.bytes_of(names)
    assert kernel.held == HELD
    assert kernel.weight_bytes == kernel.bytes_read


def test_experts_come_and_go_beside_others_whose_rows_keep_their_bits(unclamped: Checkpoint) -> None:
    x_TD, ids_TK = batch(2)
    kept_TK = torch.where(ids_TK == 11, ids_TK, -1)
    experts = KernelExperts(unclamped, device=CPU)
    assert (experts.held, experts.kernel, experts.weight_bytes) == ({}, "", 0)
    experts.hold({0: (11, 7), 3: (1,)})
    expected, errors, stop = experts(0, x_TD, kept_TK), [], threading.Event()
    num_calls = 0

    def hammer() -> None:
        nonlocal num_calls
        while not stop.is_set():
            if not torch.equal(experts(0, x_TD, kept_TK), expected):
                errors.append(num_calls)
            num_calls += 1

    thread = threading.Thread(target=hammer)
    thread.start()
    try:
        seen: list[tuple[int, int]] = []
        experts.hold(HELD, lambda done, total: seen.append((done, total)))
        assert experts.held == {0: (2, 5, 7, 11), 3: (0, 1, 15)}
        added = unclamped.bytes_of([*unclamped.expert_names(0, (2, 5)), *unclamped.expert_names(3, (0, 15))])
        assert seen == [(added * step // 4, added) for step in (1, 2, 3, 4)]
        assert experts.bytes_read == experts.weight_bytes == added * 7 // 4, "what was held is not read again"
        exact = RoutedExperts.load(unclamped, HELD, dtype=torch.float32)(0, x_TD.float(), ids_TK)
        assert (experts(0, x_TD, ids_TK).float() - exact).norm() <= 2e-2 * exact.norm()
        experts.release({0: (5, 11)})
        assert experts.held == {0: (5, 11)}
        assert experts.weight_bytes == added * 2 // 4
    finally:
        stop.set()
        thread.join()
    assert num_calls and not errors
    with pytest.raises(ExpertError, match=r"experts \[2\] of layer 0 are not held"):
        experts(0, x_TD, ids_TK)


def test_weights_of_a_layer_that_was_replaced_are_freed(unclamped: Checkpoint) -> None:
    experts = KernelExperts.load(unclamped, {0: (1,)}, device=CPU)
    old = weakref.ref(next(iter(experts._layers[0].parameters.values())))
    experts.hold({0: (2,), 3: (1,)})
    gc.collect()
    assert old() is None


def test_weights_are_read_into_host_memory_whatever_the_default_device_is(unclamped: Checkpoint) -> None:
    """On a GPU the layer is built with the GPU as default device."""
    with torch.device("meta"), TensorReader() as reader:
        assert reader.read([unclamped.expert_matrix(0, 2, "w1").weight]).device == CPU


def test_rows_are_counted_per_layer_and_expert(unclamped: Checkpoint) -> None:
    experts = KernelExperts.load(unclamped, HELD, device=CPU)
    assert not experts.tokens().any(), "the check of the kernel is not load"
    experts(0, *batch(2))
    expected = np.zeros((4, 16), dtype=np.int64)
    expected[0, [2, 5, 11]] = [6, 4, 4]
    assert (experts.tokens() == expected).all()


def test_an_expert_that_is_not_held_is_an_error_with_its_number(kernel: KernelExperts) -> None:
    with pytest.raises(ExpertError, match=r"experts \[3\] of layer 0 are not held here"):
        kernel(0, torch.zeros(1, 128, dtype=torch.bfloat16), torch.tensor([[3]], dtype=torch.int32))


def test_activations_that_are_not_finite_are_not_blamed_on_an_expert(kernel: KernelExperts) -> None:
    x_TD, ids_TK = batch(1)
    x_TD[1] = float("nan")
    with pytest.raises(ExpertError, match="layer 0: the shard sent activations that hold NaN or Inf"):
        kernel(0, x_TD, ids_TK)


def test_a_non_finite_row_names_its_expert(unclamped: Checkpoint) -> None:
    experts = KernelExperts.load(unclamped, HELD, device=CPU)
    x_TD, ids_TK = batch(1)
    x_TD[1] = 3e38  # finite, but not what comes of it
    with pytest.raises(ExpertError, match=r"layer 0: experts \[2, 5\] gave NaN or Inf"):
        experts(0, x_TD, ids_TK)


def test_a_kernel_that_leaves_the_clamp_out_is_refused() -> None:
    """vLLM 0.32's unquantised CPU kernel does; when this fails, it has learned to clamp."""
    with pytest.raises(
        ExpertError, match=r"gives other rows than expert 2 of layer 0: relative error .*swiglu_limit 10"
    ):
        KernelExperts.load(Checkpoint.open(checkpoint_path()), HELD, device=CPU)


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="vLLM has an FP4 kernel on this CPU")
def test_a_format_without_a_kernel_on_this_device_is_refused_and_never_computed_otherwise(tmp_path: Path) -> None:
    quantised = Checkpoint.open(quantise_checkpoint(checkpoint_path(), tmp_path / "quantised"))
    with pytest.raises(CheckpointError, match="vLLM has no MoE kernel on this device for FP4 1x32 E8M0 experts"):
        KernelExperts.load(quantised, HELD, device=CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none")
def test_fp4_experts_on_a_gpu_give_the_rows_of_their_values(tmp_path: Path) -> None:
    quantised = Checkpoint.open(quantise_checkpoint(checkpoint_path(), tmp_path / "quantised"))
    experts = KernelExperts.load(quantised, HELD, device=torch.device("cuda"))
    x_TD, ids_TK = batch(3)
    expected = RoutedExperts.load(quantised, HELD, dtype=torch.float32)(0, x_TD.float(), ids_TK)
    rows_PD = experts(0, x_TD.cuda(), ids_TK.cuda()).cpu().float()
    assert (rows_PD - expected).norm() <= 5e-2 * expected.norm()
