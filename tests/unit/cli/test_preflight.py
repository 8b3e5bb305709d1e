"""What is found wrong before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from published_checkpoints import V4_FLASH, write_published

from moeray.cli import preflight
from moeray.cli.errors import CommandError
from moeray.config import ConfigError, parse_config
from moeray.deepseek_v4 import Checkpoint
from moeray.deepseek_v4.inspection import value_bytes
from moeray.engram import FileRange

GIB = 2**30


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A dense model's directory without weights."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def config(model: Path, num_groups: int = 0, **engine_args: Any) -> Any:
    attention = {"num_shards": 1, "engine_args": engine_args}
    return parse_config({"model": str(model), "attention": attention, "experts": {"num_groups": num_groups}})


@pytest.fixture(autouse=True)
def _free_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_check_ports", lambda _: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_model_that_only_vllm_reads_needs_no_checkpoint_of_the_family(llama: Path) -> None:
    preflight.preflight(config(llama))


def test_a_model_without_experts_is_not_split(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"experts\.num_groups: .*no routed experts; set 0"):
        preflight.preflight(config(llama, num_groups=2))


def sharded(num_servers: int, **others: Any) -> Any:
    return parse_config({"engram": {"placement": "sharded", "num_servers": num_servers}, **others})


def test_row_servers_are_refused_where_no_table_can_be_cut_for_them(llama: Path) -> None:
    preflight.preflight(sharded(6))
    with pytest.raises(ConfigError, match=r"engram\.num_servers: 7 row servers for 6 hash columns"):
        preflight.preflight(sharded(7))
    with pytest.raises(ConfigError, match=r"engram\.placement: sharded, but .* has no Engram tables"):
        preflight.preflight(sharded(2, model=str(llama), experts={"num_groups": 0}))


def test_a_missing_tokenizer_is_named(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        preflight.preflight(config(llama))


def test_every_worker_of_a_shard_has_a_kv_cache(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_available_bytes", lambda: 10 * GIB)
    preflight.preflight(config(llama, kv_cache_memory_bytes=4 * GIB))
    with pytest.raises(CommandError, match="too little memory"):
        preflight.preflight(config(llama, kv_cache_memory_bytes=4 * GIB, tensor_parallel_size=2))


@pytest.mark.parametrize("size", [0, "2", None])
def test_a_parallel_size_that_is_no_count_is_refused(llama: Path, size: Any) -> None:
    with pytest.raises(ConfigError, match="parallel sizes must be whole numbers"):
        preflight.preflight(config(llama, tensor_parallel_size=size))


def test_quantised_experts_need_room_for_their_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """V4-Flash: 137 GiB of FP4 experts are 516 GiB of bf16 values, in the groups; FP8 doubles in every shard."""
    directory = write_published(tmp_path, V4_FLASH)
    rest, experts = value_bytes(Checkpoint.open(directory))
    assert experts == 2 * 43 * 256 * 3 * 4096 * 2048
    monkeypatch.setattr(preflight, "_available_bytes", lambda: 400 * GIB)
    with pytest.raises(
        CommandError, match=rf"{rest / GIB:.1f} GiB weights each.*with {experts / GIB:.1f} GiB weights in all"
    ):
        preflight.preflight(config(directory, num_groups=2))
    monkeypatch.setattr(preflight, "_available_bytes", lambda: 600 * GIB)
    preflight.preflight(config(directory, num_groups=2))


def test_tables_that_do_not_fit_beside_the_rest_are_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preflight, "table_ranges", lambda _: [FileRange(Path("t"), 0, 100 * GIB)])
    monkeypatch.setattr(preflight, "_available_bytes", lambda: 64 * GIB)
    with pytest.raises(
        CommandError, match=r"engram\.prefault: 100\.0 GiB of Engram tables do not fit: 64\.0 GiB are free"
    ):
        preflight.preflight(parse_config({}))
    preflight.preflight(parse_config({"engram": {"prefault": False}}))
    with pytest.raises(CommandError, match="too little memory"):
        preflight.preflight(parse_config({"engram": {"placement": "device"}}))
