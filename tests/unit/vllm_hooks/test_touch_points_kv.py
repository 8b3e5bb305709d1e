"""What the KV tier uses of vLLM's offloading: fails by name when vLLM moves it."""

from __future__ import annotations

import inspect

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.offloading import scheduler as offloading
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.core.kv_cache_utils import get_none_hash_seed
from vllm.v1.kv_offload.base import OffloadingKVEventsConfig, ReqContext
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec
from vllm.v1.request import Request

from moeray.vllm_hooks.kv_connector import KvTierConnector
from moeray.vllm_hooks.kv_tiers import NodeTier, RedisTier


def test_touch_point_connector_is_asked_for_each_prompt_and_may_say_later() -> None:
    parameters = inspect.signature(OffloadingConnector.get_num_new_matched_tokens).parameters
    assert list(parameters) == ["self", "request", "num_computed_tokens"]
    assert inspect.signature(KvTierConnector.get_num_new_matched_tokens).parameters.keys() == parameters.keys()
    parameters = inspect.signature(OffloadingConnector.update_state_after_alloc).parameters
    assert inspect.signature(KvTierConnector.update_state_after_alloc).parameters.keys() == parameters.keys()
    source = inspect.getsource(offloading.OffloadingConnectorScheduler._lookup_complete_chunks)
    assert "max_load_tokens" in source and "max_hit_size_tokens -= 1" in source


def test_touch_point_scheduler_state_of_a_request() -> None:
    fields = offloading.RequestOffloadState.__dataclass_fields__
    assert {"group_states", "req_context", "max_load_tokens", "req"} <= fields.keys()
    assert callable(offloading.RequestOffloadState.update_offload_keys)
    groups = offloading.GroupOffloadConfig._fields
    assert {"tokens_per_chunk", "sliding_window_size_in_chunks"} <= set(groups)
    assert {"alignment_tokens", "kv_group_configs"} <= set(offloading.SchedulerOffloadConfig._fields)


def test_touch_point_which_windows_are_stored() -> None:
    mask = inspect.signature(offloading.OffloadingConnectorScheduler._reachable_store_block_mask).parameters
    assert list(mask)[1:] == [
        "group_config", "start_chunk_idx", "end_chunk_idx", "final_segment_end_chunk_idx", "reachable_boundaries",
    ]  # fmt: skip
    source = inspect.getsource(offloading.OffloadingConnectorScheduler._build_store_jobs)
    assert "reachable_boundaries = (req.num_prompt_tokens - 1,)" in source
    assert "group_config=group_config," in source, "it is called with keywords"
    assert "self.shared_prefix_boundary = 0" in inspect.getsource(Request.__init__)


@pytest.mark.parametrize("tier", [NodeTier, RedisTier])
def test_touch_point_secondary_tier(tier: type[SecondaryTierManager]) -> None:
    assert not tier.__abstractmethods__
    assert {"job_id", "success", "successful_keys"} <= JobResult.__dataclass_fields__.keys()
    assert hasattr(ReqContext, "get_state") and hasattr(ReqContext, "set_state")


def test_touch_point_tiering_manager_has_its_tiers_and_its_primary() -> None:
    source = inspect.getsource(TieringOffloadingManager.__init__)
    assert "self.primary_tier" in source and "self.secondary_tiers" in source
    assert "tier.submit_store(job_metadata)" in inspect.getsource(TieringOffloadingManager.complete_store)


def test_touch_point_staging_region() -> None:
    parameters = inspect.signature(SharedOffloadRegion).parameters
    assert list(parameters)[:5] == ["engine_id", "num_chunks", "rank", "kv_bytes_per_chunk", "cpu_page_size"]
    source = inspect.getsource(SharedOffloadRegion)
    assert "self._creator" in source and "self.mmap_path" in source
    assert "self._scheduler_mmap = scheduler_mmap" in inspect.getsource(TieringOffloadingSpec.get_manager)
    assert "enable_kv_cache_events" in OffloadingKVEventsConfig.__dataclass_fields__


def test_touch_point_root_of_block_names() -> None:
    assert get_none_hash_seed()
