"""What a user may say in `attention.engine_args`, and what reaches vLLM."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vllm.multimodal.media import MediaConnector

from moeray.config import ConfigError, KvCacheConfig
from moeray.tiny import checkpoint_path
from moeray.vllm_hooks.engine_args import EXECUTOR, _defaults, engine_config, front_engine_args, shard_engine_args
from moeray.vllm_hooks.front import front_dialect
from moeray.vllm_hooks.openai_app import _NO_LOCAL_FILES
from moeray.vllm_hooks.served_model import ExpertsIn, describe_model
from moeray.vllm_hooks.settings import ShardSettings, shard_settings

SETTINGS = ShardSettings(shard="s1", backend="gloo", checkpoint=Path("/models/x"), timeout_s=3.0, host="127.0.0.2")
V4 = checkpoint_path()


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def shard(**wanted: Any) -> Any:
    return shard_engine_args(model=V4, model_name="x", engine_args=wanted, moeray=SETTINGS)


def plain(model: Path, **wanted: Any) -> Any:
    return shard_engine_args(model=model, model_name="x", engine_args=wanted, moeray=None)


def plain_front(model: Path, **wanted: Any) -> Any:
    return front_engine_args(model=model, model_name="x", engine_args=wanted, experts_in=ExpertsIn.VLLM)


def test_the_users_arguments_win_over_our_defaults() -> None:
    assert (shard().max_model_len, shard(max_model_len=128).max_model_len) == (4096, 128)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.png", "https://169.254.169.254/latest", "HTTP://[::1]/a"])
def test_no_url_is_fetched_for_a_client_unless_its_host_was_named(url: str) -> None:
    connector = MediaConnector(allowed_media_domains=plain_front(V4).allowed_media_domains)
    with pytest.raises(ValueError, match=r"allowed domains: .*attention.engine_args.allowed_media_domains"):
        connector.fetch_image(url)
    assert plain_front(V4, allowed_media_domains=["images.example"]).allowed_media_domains == ["images.example"]


def test_a_file_of_the_ingress_is_not_read_for_a_client() -> None:
    front = plain_front(V4)
    connector = MediaConnector(
        allowed_media_domains=front.allowed_media_domains, allowed_local_media_path=front.allowed_local_media_path
    )
    with pytest.raises(RuntimeError, match=_NO_LOCAL_FILES):
        connector.fetch_image("file:///etc/hostname")


def test_an_image_in_the_request_needs_no_host() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, "PNG")
    connector = MediaConnector(allowed_media_domains=plain_front(V4).allowed_media_domains)
    image = connector.fetch_image(f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}")
    assert getattr(image, "media", image).size == (3, 2)


def test_shard_and_front_agree_on_every_limit_the_front_checks() -> None:
    wanted = {"max_model_len": 777, "max_logprobs": 5}
    front = front_engine_args(model=V4, model_name="x", engine_args=wanted)
    names = (
        "model",
        "served_model_name",
        "max_model_len",
        "max_logprobs",
        "tokenizer_mode",
        "reasoning_parser",
        "seed",
    )
    assert [getattr(front, name) for name in names] == [getattr(shard(**wanted), name) for name in names]


def test_the_front_carries_nothing_of_a_shard() -> None:
    front = front_engine_args(model=V4, model_name="x", engine_args={})
    assert not front.additional_config
    assert not front.worker_extension_cls


@pytest.mark.parametrize(
    "build", [shard, lambda **wanted: front_engine_args(model=V4, model_name="x", engine_args=wanted)]
)
def test_an_unknown_argument_is_named_with_the_nearest_one(build: Any) -> None:
    with pytest.raises(ConfigError, match=r"attention\.engine_args\.max_model_length: .*did you mean max_model_len\?"):
        build(max_model_length=1)


def test_an_argument_that_is_ours_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"attention\.engine_args\.data_parallel_size: .*attention\.num_shards"):
        shard(data_parallel_size=2)


@pytest.mark.parametrize(
    ("key", "attribute", "value"),
    [("structured_outputs_config", "backend", "guidance"), ("reasoning_config", "reasoning_end_str", "</think>")],
)
def test_a_mapping_of_cluster_yaml_becomes_vllms_own_configuration(key: str, attribute: str, value: str) -> None:
    front = front_engine_args(model=V4, model_name="x", engine_args={key: {attribute: value}})
    for arguments in (front, shard(**{key: {attribute: value}})):
        assert getattr(getattr(arguments, key), attribute) == value
        assert getattr(getattr(engine_config(arguments), key), attribute) == value


@pytest.mark.parametrize("given", [{"backnd": "guidance"}, {"backend": "nobodys"}])
def test_a_mapping_that_vllm_does_not_accept_is_an_error_of_the_users(given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=rf"attention\.engine_args.*{next(iter(given))}"):
        shard(structured_outputs_config=given)


@pytest.mark.parametrize("mode", ["FULL", "full_and_piecewise"])
def test_graphs_that_would_skip_the_hop_are_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match="without the hop"):
        shard(compilation_config={"cudagraph_mode": mode})


def test_settings_survive_the_way_through_json() -> None:
    arguments = shard()
    again = shard_settings(
        type("VllmConfig", (), {"additional_config": json.loads(json.dumps(arguments.additional_config))})
    )
    assert again == SETTINGS


def test_settings_may_come_as_a_mapping_with_defaults_left_out() -> None:
    given = {"backend": "local", "checkpoint": "/models/x"}
    arguments = shard_engine_args(model=V4, model_name="x", engine_args={}, moeray=given)
    assert (
        arguments.additional_config["moeray"] == ShardSettings(backend="local", checkpoint=Path("/models/x")).to_json()
    )


def test_vllm_without_our_settings_has_none() -> None:
    assert shard_settings(type("VllmConfig", (), {"additional_config": {}})) is None


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'tcp' is none of gloo, nccl, local"):
        ShardSettings(backend="tcp", checkpoint=Path("x"))


def test_a_plain_shard_carries_nothing_of_the_hop_and_nothing_of_deepseek(llama: Path) -> None:
    arguments = plain(llama)
    assert shard_settings(type("VllmConfig", (), {"additional_config": arguments.additional_config})) is None
    assert (arguments.load_format, arguments.tokenizer_mode, arguments.reasoning_parser) == ("auto", "auto", "")
    assert arguments.dtype == "auto"


def test_the_default_context_is_no_longer_than_the_models(llama: Path) -> None:
    assert [plain(llama).max_model_len, plain_front(llama).max_model_len, shard().max_model_len] == [2048, 2048, 4096]


def test_vllms_own_parallelism_is_the_users_where_experts_stay_in_vllm(llama: Path) -> None:
    arguments = plain(llama, tensor_parallel_size=2)
    assert arguments.tensor_parallel_size == 2
    assert arguments.distributed_executor_backend is None, "vLLM chooses the executor of several workers"
    assert plain(llama).distributed_executor_backend == EXECUTOR


@pytest.mark.parametrize(
    "key", ["tensor_parallel_size", "load_format", "enable_expert_parallel", "dtype", "hf_overrides"]
)
def test_vllms_own_parallelism_is_refused_where_experts_leave_it(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"attention\.engine_args\.{key}: may not be set"):
        shard(**{key: 2})


@pytest.mark.parametrize("key", ["data_parallel_size", "tokenizer", "additional_config"])
def test_what_makes_a_shard_is_never_the_users(llama: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"attention\.engine_args\.{key}: may not be set"):
        plain(llama, **{key: 2})


def test_expert_parallelism_that_crashes_vllm_on_cpu_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"enable_expert_parallel: .*CPU"):
        plain(llama, enable_expert_parallel=True)


def test_an_architecture_that_vllm_does_not_know_is_one_short_error(llama: Path) -> None:
    file = llama / "config.json"
    file.write_text(file.read_text().replace("LlamaForCausalLM", "NobodysForCausalLM"))
    with pytest.raises(
        ConfigError, match=r"model: vLLM does not serve .*NobodysForCausalLM.* not supported"
    ) as refused:
        engine_config(plain_front(llama))
    assert len(str(refused.value)) < 600


def test_an_option_that_is_switched_off_is_nobodys() -> None:
    assert shard(enable_expert_parallel=False, enable_eplb=False).enable_eplb is False
    with pytest.raises(ConfigError, match="no such engine argument"):
        shard(enable_expert_paralel=False)


def test_the_front_has_no_processes_to_lay_out(llama: Path) -> None:
    arguments = plain_front(llama, tensor_parallel_size=2, load_format="dummy", max_model_len=100)
    assert (arguments.tensor_parallel_size, arguments.load_format, arguments.max_model_len) == (1, "auto", 100)


def test_the_tool_parser_is_the_fronts_and_not_an_engine_argument(llama: Path) -> None:
    wanted = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
    arguments = plain_front(llama, **wanted)
    settings = {"model": str(llama), "engine_args": wanted}
    dialect = front_dialect(settings, arguments)
    assert (dialect.tool_parser, dialect.reasoning_parser) == ("hermes", "qwen3")
    assert plain(llama, **wanted).reasoning_parser == "qwen3"


@pytest.mark.parametrize(
    ("architecture", "eager"), [("DeepseekV3ForCausalLM", True), ("DeepseekV32ForCausalLM", False)]
)
def test_on_a_gpu_models_whose_graphs_cannot_break_at_the_hop_run_eager(
    architecture: str, eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"architectures": [architecture], "model_type": "deepseek_v3", "n_routed_experts": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("vllm.platforms.current_platform", GPU())
    chosen = _defaults(describe_model(tmp_path), ExpertsIn.GROUPS)
    assert chosen["enforce_eager"] is eager
    assert chosen["compilation_config"] == {"cudagraph_mode": "PIECEWISE"}
    assert "enforce_eager" not in _defaults(describe_model(tmp_path), ExpertsIn.VLLM), "plain vLLM decides for itself"


class GPU:
    """What of a CUDA platform is asked here."""

    def is_cpu(self) -> bool:
        return False

    def is_rocm(self) -> bool:
        return False


def test_a_shard_shares_its_blocks_and_the_front_has_none() -> None:
    shared = shard_engine_args(model=V4, model_name="x", engine_args={}, moeray=SETTINGS, kv_cache=KvCacheConfig())
    tiers = shared.kv_transfer_config.kv_connector_extra_config["secondary_tiers"]
    assert [tier["type"] for tier in tiers] == ["NodeTier"] and shared.prefix_caching_hash_algo == "sha256_cbor"
    both = KvCacheConfig(redis_url="redis://h:1/0")
    found = shard_engine_args(model=V4, model_name="x", engine_args={}, moeray=SETTINGS, kv_cache=both)
    tiers = found.kv_transfer_config.kv_connector_extra_config["secondary_tiers"]
    assert [tier["type"] for tier in tiers] == ["NodeTier", "RedisTier"]
    assert front_engine_args(model=V4, model_name="x", engine_args={}).kv_transfer_config is None


@pytest.mark.parametrize("wanted", [{"enable_prefix_caching": False}, {"kv_transfer_config": {"kv_connector": "X"}}])
def test_without_a_prefix_cache_or_with_a_connector_of_the_users_nothing_is_shared(wanted: dict[str, Any]) -> None:
    found = shard_engine_args(model=V4, model_name="x", engine_args=wanted, moeray=SETTINGS, kv_cache=KvCacheConfig())
    assert found.kv_transfer_config == wanted.get("kv_transfer_config")


@pytest.mark.parametrize(
    ("engine_args", "is_shared"),
    [
        ({"max_num_seqs": 3, "max_num_batched_tokens": 512}, True),
        ({"hf_overrides": {"rope_theta": 5.0}}, False),
        ({"attention_backend": "TORCH_SDPA"}, False),
        ({"max_model_len": 1024}, False),
    ],
)
def test_blocks_are_shared_only_where_engine_arguments_cannot_change_their_bytes(
    engine_args: dict[str, Any], is_shared: bool
) -> None:
    def content(engine_args: dict[str, Any]) -> Any:
        """With vLLM's own experts, where most arguments are the user's."""
        found = shard_engine_args(
            model=V4, model_name="x", engine_args=engine_args, moeray=None, kv_cache=KvCacheConfig()
        )
        return found.kv_transfer_config.kv_connector_extra_config["secondary_tiers"][0]["content"]

    assert (content(engine_args) == content({})) is is_shared


def test_weights_of_unknown_content_are_not_shared(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = shard_engine_args(model=llama, model_name="x", engine_args={}, moeray=None, kv_cache=KvCacheConfig())
    assert found.kv_transfer_config is None and "KV blocks are not shared" in caplog.text


def test_too_little_shared_memory_shares_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    much = KvCacheConfig(staging_bytes=1 << 50)
    found = shard_engine_args(model=V4, model_name="x", engine_args={}, moeray=SETTINGS, kv_cache=much)
    assert found.kv_transfer_config is None and "/dev/shm" in caplog.text
