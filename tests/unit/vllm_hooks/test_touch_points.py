"""One test per place where we rely on vLLM's internals; the test's name says which one moved.

The table in model_plugins/moeray/vllm_hooks/README.md says what each is for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moeray.vllm_hooks import architecture, cpu_kernels, engine_args, plugin


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    plugin.register()


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_touch_point_entry_point_group() -> None:
    from vllm import plugins

    assert plugins.DEFAULT_PLUGINS_GROUP == "vllm.general_plugins"


@pytest.fixture(params=architecture.MODEL_MODULES)
def known(request: pytest.FixtureRequest) -> Any:
    """What vLLM's registry holds for one of our architectures."""
    from vllm.model_executor.models.registry import ModelRegistry

    return ModelRegistry.models[request.param]


def test_touch_point_architecture_registry(known: Any) -> None:
    from vllm.model_executor.models.registry import _LazyRegisteredModel

    assert parameters(_LazyRegisteredModel) == ["module_name", "class_name"]
    assert known.module_name.startswith("moeray.")
    assert isinstance(known, _LazyRegisteredModel)
    assert {known: "vLLM caches by the registered model, so it must be hashable"}


def test_touch_point_architecture_interfaces(known: Any) -> None:
    """What the skeleton claims is what vLLM finds in the real class."""
    from vllm.model_executor.models.registry import _ModelInfo

    assert known.inspect_model_cls() == _ModelInfo.from_model_cls(known.load_model_cls())


def test_touch_point_inspection_starts_no_process(known: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.models import registry

    def refuse(_: Any) -> None:
        raise AssertionError("model inspection in a subprocess")

    monkeypatch.setattr(registry, "_run_in_subprocess", refuse)
    known.inspect_model_cls()


def test_touch_point_cpu_platform_check() -> None:
    """The wrapped check keeps what was asked for V4, and only for V4."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.__dict__["check_and_update_config"]
    assert isinstance(check, classmethod)
    assert parameters(check.__func__) == ["cls", "vllm_config"]
    assert check.__func__.keeps_scheduler_features


@pytest.fixture
def overridden() -> dict[str, Any]:
    from vllm.triton_utils import dispatcher

    from moeray.vllm_hooks import model  # noqa: F401  installs the kernels

    return dispatcher._registry


@pytest.mark.parametrize("name", cpu_kernels.OVERRIDES)
def test_touch_point_kernel_overrides(overridden: dict[str, Any], name: str) -> None:
    """Each kernel still exists under its name and has the parameters that our version takes."""
    from vllm.triton_utils.dispatcher import _kernel_arg_names

    original, _ = overridden[name]
    ours = cpu_kernels.OVERRIDES[name]
    if ours is not cpu_kernels.window_indices:
        assert tuple(parameters(ours)) == _kernel_arg_names(original)


def test_touch_point_swa_indices_are_not_read_on_cpu() -> None:
    """`window_indices` does nothing because V4's CPU attention has no use for what it would write."""
    from vllm.models.deepseek_v4.cpu import cpu_sparse

    assert "swa_indices" not in inspect.getsource(cpu_sparse)


def test_touch_point_tile_scheduler_layer_types(overridden: dict[str, Any]) -> None:
    from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUSparseSWAMetadataBuilder as Builder
    from vllm.v1.attention.backends.mla import sparse_swa

    found = Builder.build_tile_scheduler(SimpleNamespace(), 1)
    assert {"c1a", "c2a"} <= set(found)
    assert parameters(Builder.build_tile_scheduler) == parameters(
        sparse_swa.DeepseekSparseSWAMetadataBuilder.build_tile_scheduler
    )


def test_touch_point_cpu_router(overridden: dict[str, Any]) -> None:
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    from moeray.vllm_hooks import cpu_routing

    assert cpu_router._sqrtsoftplus_bias_topk is cpu_routing.route
    call = inspect.getsource(cpu_router.CPURouter._compute_routing)
    assert all(f"{name}=" in call for name in parameters(cpu_routing.route))


def test_touch_point_routed_experts_container() -> None:
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from moeray.vllm_hooks.remote_experts import RemoteRoutedExperts

    assert op_registry_oot["RoutedExperts"] is RemoteRoutedExperts
    assert parameters(RoutedExperts._get_quant_method) == ["self", "prefix", "quant_config", "moe_config"]


def test_touch_point_fused_moe_method() -> None:
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

    from moeray.vllm_hooks.remote_experts import RemoteExpertsMethod

    assert parameters(FusedMoEMethodBase.apply) == parameters(RemoteExpertsMethod.apply)
    assert not inspect.isabstract(RemoteExpertsMethod)
    method = RemoteExpertsMethod(SimpleNamespace())  # type: ignore[arg-type]
    assert not method.is_monolithic, "a monolithic method would route inside"
    assert not method.supports_internal_mk
    assert not method.skip_forward_padding


def test_touch_point_shared_expert_order() -> None:
    """The runner leaves the shared expert to the method when it can overlap."""
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts, SharedExpertsOrder

    assert parameters(SharedExperts.forward) == ["self", "shared_experts_input", "order"]
    parallel = SimpleNamespace(enable_eplb=False, all2all_backend="", use_fi_nvl_two_sided_kernels=False)
    shared = SharedExperts(
        torch.nn.Identity(),
        SimpleNamespace(moe_parallel_config=parallel),
        False,
        mk_can_overlap_shared_experts=lambda: True,
    )
    x = torch.ones(2, 2)
    assert shared(x, SharedExpertsOrder.NO_OVERLAP) is None
    shared(x, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
    assert torch.equal(shared.output, x)


def test_touch_point_dummy_runs_have_no_attention_metadata() -> None:
    from vllm.forward_context import ForwardContext

    assert "attn_metadata" in ForwardContext.__dataclass_fields__


def test_touch_point_graph_breaks() -> None:
    from vllm.compilation.breakable_cudagraph import eager_break_during_capture
    from vllm.config.vllm import DEFAULT_BREAKABLE_CUDAGRAPH_ARCHITECTURES

    assert parameters(eager_break_during_capture) == ["fn"]
    assert {"DeepseekV4ForCausalLM", "DeepseekV32ForCausalLM"} <= DEFAULT_BREAKABLE_CUDAGRAPH_ARCHITECTURES


def test_touch_point_runner_token_table() -> None:
    """Names of the CPU runner that `lookback` reads, and the call that hands arguments to the model."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from moeray.vllm_hooks import model  # noqa: F401  installs the wrapper

    assert CPUModelRunner._init_model_kwargs.hands_lookback
    assert parameters(GPUModelRunner._init_model_kwargs) == ["self", "num_reqs"]
    assert "self.use_async_scheduling =" in inspect.getsource(GPUModelRunner.__init__)
    assert "**self._init_model_kwargs()" in inspect.getsource(GPUModelRunner._preprocess)
    batch = inspect.getsource(InputBatch)
    assert all(f"self.{name}" in batch for name in ("token_ids_cpu", "num_computed_tokens_cpu", "num_reqs"))


def test_touch_point_cpu_scheduling_is_synchronous() -> None:
    from vllm.platforms.cpu import CpuPlatform

    original = inspect.getclosurevars(CpuPlatform.check_and_update_config.__func__).nonlocals["original"]
    assert "async_scheduling = False" in inspect.getsource(original)


def test_touch_point_model_body() -> None:
    """Where Engram enters: first argument of a decoder layer that runs mHC unfused, so that it is the streams."""
    from vllm.model_executor.layers.mhc import HAS_TILELANG_MHC
    from vllm.models.deepseek_v4.cpu.cpu_sparse import DeepseekV4CPUAttention
    from vllm.models.deepseek_v4.cpu.model import DeepseekV4DecoderLayer, DeepseekV4ForCausalLM
    from vllm.v1.attention.backends.mla.sparse_swa import DeepseekSparseSWAMetadata

    assert parameters(DeepseekV4DecoderLayer.forward)[:4] == ["self", "x", "positions", "input_ids"]
    assert not HAS_TILELANG_MHC
    forward = parameters(DeepseekV4ForCausalLM.forward)
    assert forward == ["self", "input_ids", "positions", "intermediate_tensors", "inputs_embeds"]
    assert "self.swa_cache_layer.prefix" in inspect.getsource(DeepseekV4CPUAttention)
    assert "query_start_loc" in DeepseekSparseSWAMetadata.__dataclass_fields__


def test_touch_point_model_loader() -> None:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from moeray.vllm_hooks.loader import LOAD_FORMAT, ShardLoader

    assert BaseModelLoader.__abstractmethods__ == {"download_model", "load_weights"}
    assert isinstance(get_model_loader(LoadConfig(load_format=LOAD_FORMAT)), ShardLoader)
    assert engine_args.LOAD_FORMAT == LOAD_FORMAT


def test_touch_point_worker_extension() -> None:
    """vLLM refuses an extension whose names its worker already has."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    from moeray.vllm_hooks.worker import WorkerExtension

    names = [name for name in vars(WorkerExtension) if not name.startswith("__")]
    assert names == [
        "moeray_guard", "moeray_warm_up", "moeray_follow_routes", "moeray_connect", "moeray_choose_micro_batches",
        "moeray_tensors", "moeray_hop", "moeray_kv_cache",
    ]  # fmt: skip
    inherited = [base for base in CPUWorker.__mro__ if base is not WorkerExtension]
    assert not [name for name in names for base in inherited if name in vars(base)]


def test_touch_point_in_process_executor() -> None:
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    parallel = SimpleNamespace(distributed_executor_backend=engine_args.EXECUTOR)
    found = Executor.get_class(SimpleNamespace(parallel_config=parallel))  # type: ignore[arg-type]
    assert issubclass(found, UniProcExecutor)


def test_touch_point_engine_arguments() -> None:
    """Every argument that we set or forbid still exists."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    tables = [value for name, value in vars(engine_args).items() if name.endswith("_DEFAULTS") or "_OURS" in name]
    named = {*engine_args._ONLY_OF_SHARDS, *engine_args._NOT_ON_CPU}.union(*tables)
    assert len(tables) == 6
    assert named <= set(AsyncEngineArgs.__dataclass_fields__)


def test_touch_point_settings_reach_the_engine(tmp_path: Path) -> None:
    from vllm.config import VllmConfig

    assert "additional_config" in VllmConfig.__dataclass_fields__


def test_touch_point_fatal_errors_are_logged_before_the_death_is_announced() -> None:
    from vllm.v1.engine import core

    from moeray.vllm_hooks.engine_child import ENGINE_CORE_LOGGER

    assert core.logger.name == ENGINE_CORE_LOGGER
    source = inspect.getsource(core.EngineCoreProc.run_engine_core)
    fatal = source.index('logger.exception("EngineCore encountered a fatal error.")')
    assert fatal < source.index("_send_engine_dead()")
    assert 'logger.exception("EngineCore failed to start.")' in source
