"""Two halves of a step take turns: one runs at a time, the first is ahead, an error ends both."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import forward_context
from vllm.v1.worker.ubatch_utils import UBatchSlice

from moeray.vllm_hooks import micro_batches
from moeray.vllm_hooks.hop import HopCosts, hop
from moeray.vllm_hooks.micro_batches import Halves, Measured, Plan, hop_report, second_hop, state, whole_starts

pytestmark = pytest.mark.timeout(120)  # a lost turn would wait for ever
LAYERS = 3


@pytest.fixture(autouse=True)
def _restored_context() -> Iterator[None]:
    before = forward_context._forward_context
    yield
    forward_context._forward_context = before


def step(num_first: int, num_second: int) -> Any:
    """What vLLM's runner knows of a step in two halves."""
    return SimpleNamespace(
        attn_metadata=["first's", "second's"],
        slot_mapping=[{}, {}],
        ubatch_slices=[
            UBatchSlice(slice(0, 1), slice(0, num_first)),
            UBatchSlice(slice(1, 2), slice(num_first, num_first + num_second)),
        ],
    )


def run(compute: Callable[[Halves, Any, list[Any]], Tensor]) -> tuple[Tensor, list[Any]]:
    """The result, and the log that `compute(halves, its slice, log)` wrote."""
    log: list[Any] = []
    halves = Halves(step(2, 3), lambda half: log.append(f"turn {half}"))
    return halves.run(lambda part: compute(halves, part, log)), log


def layers(halves: Halves, part: Any, log: list[Any]) -> Tensor:
    half = int(part.token_slice.start > 0)
    for layer in range(LAYERS):
        log.append((half, layer))
        assert halves.hop is (hop, second_hop)[half]
        assert forward_context.get_forward_context().attn_metadata == ("first's", "second's")[half]
        halves.hand_over()
    return torch.arange(part.token_slice.start, part.token_slice.stop)


def test_halves_alternate_layer_by_layer_and_the_first_is_ahead() -> None:
    result, log = run(layers)
    assert [entry for entry in log if isinstance(entry, tuple)] == [
        (half, layer) for layer in range(LAYERS) for half in range(2)
    ]
    assert result.tolist() == [0, 1, 2, 3, 4]


def test_whoever_goes_on_takes_its_own_state_first() -> None:
    _, log = run(layers)
    turn = None
    for entry in log:
        if isinstance(entry, str):
            turn = int(entry.split()[1])
        else:
            assert entry[0] == turn


def test_nothing_is_left_after_a_step() -> None:
    whole = step(2, 3)
    Halves(whole, lambda _: None).run(lambda part: torch.zeros(part.num_tokens))
    assert state.running is None
    assert forward_context._forward_context is whole


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
@pytest.mark.parametrize("half", [0, 1])
def test_an_error_of_one_half_ends_the_other_and_is_raised(half: int, layer: int) -> None:
    seen: list[tuple[int, int]] = []

    def compute(halves: Halves, part: Any, _: list[Any]) -> Tensor:
        me = int(part.token_slice.start > 0)
        for number in range(LAYERS):
            seen.append((me, number))
            if (me, number) == (half, layer):
                raise ValueError(f"half {me} in layer {number}")
            halves.hand_over()
        return torch.zeros(part.num_tokens)

    with pytest.raises(ValueError, match=f"half {half} in layer {layer}"):
        run(compute)
    assert state.running is None
    assert max(number for _, number in seen) <= layer, "the other half went on"
    assert run(layers)[0].tolist() == [0, 1, 2, 3, 4], "the next step is computed"


def test_where_requests_begin_is_the_same_for_whole_steps_and_halves() -> None:
    starts = torch.tensor([0, 3, 7, 12])
    between = [UBatchSlice(slice(0, 2), slice(0, 7)), UBatchSlice(slice(2, 3), slice(7, 12))]
    assert whole_starts(between, [torch.tensor([0, 3, 7]), torch.tensor([0, 5])]).equal(starts)
    inside = [UBatchSlice(slice(0, 2), slice(0, 6)), UBatchSlice(slice(1, 3), slice(6, 12))]
    assert whole_starts(inside, [torch.tensor([0, 3, 6]), torch.tensor([0, 1, 6])]).equal(starts)


def test_a_plan_cuts_from_its_size_on_and_never_a_single_token() -> None:
    assert [Plan(64).cuts(tokens) for tokens in (63, 64, 512)] == [False, True, True]
    assert [Plan(1).cuts(tokens) for tokens in (1, 2)] == [False, True]
    assert not Plan().cuts(512)


def test_costs_of_both_hops_are_added_up_and_the_plan_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def report(calls: int, pack: float) -> dict[str, Any]:
        return {"generation": 3, "calls": calls, "tokens": 10, "stages": {"pack": pack}}

    for each, values in ((hop, report(1, 10.0)), (second_hop, report(3, 30.0))):
        monkeypatch.setattr(type(each), "generation", 3)
        monkeypatch.setattr(each, "costs", HopCosts(calls=values["calls"], tokens=10))
    monkeypatch.setattr(type(hop), "report", lambda self: report(self.costs.calls, 10.0 * self.costs.calls))
    monkeypatch.setattr(state, "plan", Plan(64, (Measured(64, 10.0, 7.5),)))
    found = hop_report()
    assert (found["generation"], found["calls"], found["tokens"]) == (3, 4, 20)
    assert found["stages"] == {"pack": (1 * 10.0 + 3 * 30.0) / 4}
    assert found["micro_batches"] == {
        "from_tokens": 64, "measured": [{"tokens": 64, "whole_ms": 10.0, "halves_ms": 7.5}],
    }  # fmt: skip


def test_touch_point_runner_decides_whether_a_step_is_cut() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for caller in (GPUModelRunner.execute_model, GPUModelRunner._dummy_run):
        source = inspect.getsource(caller)
        assert "self._determine_batch_execution_and_padding(\n" in source
        assert "num_tokens=num_tokens_unpadded" in source
        assert "maybe_create_ubatch_slices(" in source
    names = list(inspect.signature(GPUModelRunner._determine_batch_execution_and_padding).parameters)
    assert {"num_tokens", "allow_microbatching"} <= set(names)
    assert "should_ubatch,\n" in inspect.getsource(GPUModelRunner._determine_batch_execution_and_padding)


def test_touch_point_runner_makes_metadata_for_halves() -> None:
    from vllm.v1.worker import gpu_model_runner, ubatch_utils

    source = inspect.getsource(gpu_model_runner.GPUModelRunner._build_attention_metadata)
    assert "split_attn_metadata(ubatch_slices, cm)" in source
    assert callable(gpu_model_runner.split_attn_metadata)
    names = list(inspect.signature(ubatch_utils.maybe_create_ubatch_slices).parameters)
    assert names[:5] == [
        "should_ubatch", "num_scheduled_tokens", "num_tokens_padded", "num_reqs_padded", "num_ubatches",
    ]  # fmt: skip
    assert "use_ubatching" in inspect.getsource(gpu_model_runner.GPUModelRunner.initialize_metadata_builders)
    # A prefix that one half reads before the other half writes it: then vLLM leaves the step whole.
    assert "written" in inspect.getsource(gpu_model_runner.GPUModelRunner._allow_microbatching)


def test_touch_point_forward_context_is_one_variable_of_a_module() -> None:
    assert "return _forward_context" in inspect.getsource(forward_context.get_forward_context)
    fields = set(forward_context.ForwardContext.__dataclass_fields__)
    assert {"attn_metadata", "slot_mapping", "ubatch_slices"} <= fields


def test_touch_point_shared_experts_keep_their_result_in_a_list() -> None:
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts

    assert "self._output: list[torch.Tensor | None] = [None, None]" in inspect.getsource(SharedExperts.__init__)


def test_steps_may_be_cut_only_where_the_settings_of_a_shard_ask_for_it() -> None:
    from moeray.vllm_hooks.settings import ADDITIONAL_CONFIG_KEY, ShardSettings

    def may(architecture: str = "DeepseekV4ForCausalLM", **settings: Any) -> bool:
        shard = ShardSettings(checkpoint=Path(), **settings)
        model = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))
        config = {ADDITIONAL_CONFIG_KEY: shard.to_json()}
        return micro_batches.may_cut(SimpleNamespace(additional_config=config, model_config=model))

    assert may(backend="gloo", micro_batches="measured") and may(backend="local", micro_batches="always")
    assert not may(backend="local", micro_batches="measured") and not may(backend="gloo", micro_batches="never")
    assert not may("DeepseekV3ForCausalLM", backend="gloo", micro_batches="always")
    assert not micro_batches.may_cut(SimpleNamespace(additional_config={})), "plain vLLM"


def test_vllms_own_setting_is_on_only_while_its_runner_is_asked() -> None:
    """vLLM checks its configuration again after the model was loaded, and would refuse it."""
    config = SimpleNamespace(ubatch_size=0)
    with micro_batches._two_halves(config, True):
        assert config.ubatch_size == 2
    assert config.ubatch_size == 0
    with micro_batches._two_halves(config, False):
        assert config.ubatch_size == 0


@pytest.fixture
def cutting_runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's runner module with our hooks for the length of one test."""
    from vllm.v1.worker import gpu_model_runner
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    for name in ("split_attn_metadata", "maybe_create_ubatch_slices"):
        monkeypatch.setattr(gpu_model_runner, name, getattr(gpu_model_runner, name))
    for name in ("_determine_batch_execution_and_padding", "initialize_metadata_builders", "_allow_microbatching"):
        monkeypatch.setattr(CPUModelRunner, name, getattr(CPUModelRunner, name))
    micro_batches.install()
    return gpu_model_runner


@pytest.mark.parametrize("cut", [5, 8])
def test_a_half_knows_the_positions_of_its_own_tokens_and_which_of_its_own_requests_prefill(
    cutting_runner: Any, cut: int
) -> None:
    """Requests of 4, 1 and 6 tokens, cut inside the last one or between the last two."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts, positions = torch.tensor([0, 4, 5, 11], dtype=torch.int32), torch.tensor([0, 1, 2, 3, 40, *range(10, 16)])
    lengths, is_prefilling = torch.tensor([4, 41, 16], dtype=torch.int32), torch.tensor([True, False, True])
    common = CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lengths, num_reqs=3, num_actual_tokens=11,
        max_query_len=6, max_seq_len=41, block_table_tensor=torch.zeros((3, 4), dtype=torch.int32),
        slot_mapping=torch.arange(11), positions=positions, is_prefilling=is_prefilling,
        seq_lens_cpu_upper_bound=lengths,
    )  # fmt: skip
    first_of_second = 2
    last_of_first = 3 if cut > 5 else 2
    slices = [
        UBatchSlice(slice(0, last_of_first), slice(0, cut)),
        UBatchSlice(slice(first_of_second, 3), slice(cut, 11)),
    ]
    halves = cutting_runner.split_attn_metadata(slices, common)
    assert [half.positions.tolist() for half in halves] == [positions[:cut].tolist(), positions[cut:].tolist()]
    assert [half.is_prefilling.tolist() for half in halves] == [[True, False, True][:last_of_first], [True]]
