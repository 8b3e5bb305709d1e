"""What a group computes with, before it holds anything: listening, refusing, and merged only where bits allow it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeray.config import ClusterConfig
from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.expert_group.computation import Computation, start_computation
from moeray.placement import contiguous
from moeray.tiny import checkpoint_path
from moeray.transport import GroupFailed, HandshakeRefused, TransportSpec, connect


@contextmanager
def started(model: Path, broken: list[str] | None = None) -> Iterator[Computation]:
    before = torch.get_num_threads()
    config, broken = ClusterConfig(model=str(model)), [] if broken is None else broken
    computation = start_computation(
        config, str(model), host="127.0.0.1", may_poll=False, on_broken=lambda error: broken.append(str(error))
    )
    try:
        yield computation
    finally:
        computation.server.stop()
        torch.set_num_threads(before)


def until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + 60
    while not condition():
        assert monotonic() < deadline
        sleep(0.01)


@pytest.fixture(scope="module")
def half_precision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in a dtype that the CPU kernel does not compute."""
    directory = tmp_path_factory.mktemp("float16")
    tensors = load_file(checkpoint_path() / "model.safetensors")
    halves = {name: each.half() if each.dtype == torch.bfloat16 else each for name, each in tensors.items()}
    save_file(halves, directory / "model.safetensors")
    config = json.loads((checkpoint_path() / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "float16", "torch_dtype": "float16"}))
    return directory


def test_calls_are_merged_where_rows_do_not_depend_on_other_rows() -> None:
    with started(checkpoint_path()) as computation:
        assert computation.experts.held == {}
        assert computation.merged is not None
        assert computation.server._compute is computation.merged


def test_calls_are_not_merged_where_rows_depend_on_other_rows(half_precision: Path) -> None:
    with started(half_precision) as computation:
        assert computation.experts.kernel == "torch"
        assert computation.merged is None


def test_a_shard_is_refused_until_its_generation_is_served_and_then_gets_the_experts_rows() -> None:
    checkpoint = Checkpoint.open(checkpoint_path())
    shape = checkpoint.shape
    placement = contiguous(generation=5, num_layers=shape.num_layers, num_experts=shape.num_experts, num_groups=1)
    with started(checkpoint_path()) as computation:
        spec = TransportSpec(backend="gloo", shard="shard", identity=computation.identity, max_tokens=8, timeout_s=60.0)
        with pytest.raises(HandshakeRefused, match="generation"):
            connect(spec, placement, [computation.address])
        everything = dict.fromkeys(shape.moe_layers, range(shape.num_experts))
        computation.experts.hold(everything)
        computation.server.serve_generations({5: 0})
        transport = connect(spec, placement, [computation.address])
        x_TD = torch.randn(3, shape.hidden_size).bfloat16()
        ids_TK = torch.arange(3 * shape.top_k, dtype=torch.int32).view(3, -1) % shape.num_experts
        weights_TK = torch.zeros(ids_TK.shape)
        weights_TK[:, 0] = 1.0  # so that the reduced row is the first expert's
        y_TD = transport.combine(transport.dispatch(0, x_TD, ids_TK, weights_TK))
        rows_TKD = computation.experts(0, x_TD, ids_TK).view(3, shape.top_k, -1)
        assert torch.equal(y_TD, rows_TKD[:, 0])
        transport.close()


def test_a_group_whose_weights_give_garbage_refuses_the_call_and_finds_that_it_is_broken() -> None:
    shape = Checkpoint.open(checkpoint_path()).shape
    placement = contiguous(generation=1, num_layers=shape.num_layers, num_experts=shape.num_experts, num_groups=1)
    broken: list[str] = []
    with started(checkpoint_path(), broken) as computation:
        computation.experts.hold(dict.fromkeys(shape.moe_layers, range(shape.num_experts)))
        computation.server.serve_generations({1: 0})
        spec = TransportSpec(backend="gloo", shard="shard", identity=computation.identity, max_tokens=8, timeout_s=60.0)
        transport = connect(spec, placement, [computation.address])
        store: Any = computation.experts._store
        store._layers[0].experts[3].w2.fill(0x7FC0)  # NaN in bf16, whose bits the kernel's packing keeps
        ids_TK = torch.full((1, shape.top_k), 3, dtype=torch.int32)
        x_TD = torch.randn(1, shape.hidden_size).bfloat16()
        with pytest.raises(GroupFailed):
            transport.combine(transport.dispatch(0, x_TD, ids_TK, torch.ones(ids_TK.shape)))
        until(lambda: bool(broken))
        assert "experts [3] gave NaN or Inf" in broken[0]
        transport.close()
