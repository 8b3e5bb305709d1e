"""vLLM's tiering specification on every platform: its own copies on a GPU, ours on CPU, which it refuses.

The engine's *staging region* is vLLM's primary tier: memory of this engine through which every block passes, and its
own small host cache. What other engines share is behind it (`kv_tiers.py`).
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import OffloadingManager, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

SPEC = "KvTierSpec"


class KvTierSpec(TieringOffloadingSpec):  # type: ignore[misc, unused-ignore]
    """One block per chunk: a chunk of several would tie blocks of different use together."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._copies: MemoryCopies | None = None
        # Ingresses hear what engines have; that the stores have it, too, they know without being told.
        self.kv_events_config = replace(self.kv_events_config, enable_kv_cache_events=False)

    def get_manager(self) -> OffloadingManager:
        """The scheduler's side, made once all workers have mapped the region: its name can go.

        vLLM leaves the name until a clean end, so the memory of every engine that is killed would stay taken.
        """
        manager = super().get_manager()
        if (region := self._scheduler_mmap) is not None:
            region._creator = False
            with contextlib.suppress(FileNotFoundError):
                Path(region.mmap_path).unlink()
        return manager

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        if not current_platform.is_cpu():
            return super().get_worker(kv_caches)
        if self._copies is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=0 if self.replicated_layout else self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            region._creator = False  # whose name goes with the scheduler's side
            self._copies = MemoryCopies(kv_caches, region)
        return self._copies


class MemoryCopies(OffloadingWorker):  # type: ignore[misc, unused-ignore]
    """Copies blocks between the engine's KV cache and the region, at once: both are memory of this machine.

    Args:
        kv_caches: per tensor int8 [blocks, page bytes], and which of them each cache group uses.
        region: rows of chunks; this worker's part of a row has the pages of all tensors one after the other.
    """

    def __init__(self, kv_caches: Any, region: SharedOffloadRegion) -> None:
        self._groups = kv_caches.group_data_refs
        self._cache = [each.tensor for each in kv_caches.tensors]
        self._host = [region.create_next_worker_view(each.page_size_bytes) for each in kv_caches.tensors]
        self._region = region
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, src_spec, dst_spec, self._cache, self._host, from_cache=True)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, dst_spec, src_spec, self._host, self._cache, from_cache=False)

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Every copy has ended when it was submitted."""

    def shutdown(self) -> None:
        self._cache.clear()
        self._host.clear()
        self._region.cleanup()

    def _copy(
        self,
        job_id: int,
        blocks: Any,
        chunks: Any,
        source: list[torch.Tensor],
        target: list[torch.Tensor],
        *,
        from_cache: bool,
    ) -> bool:
        """`blocks.block_ids` and `chunks.block_ids` go together, group after group (`blocks.group_sizes`)."""
        started, num_bytes, first = perf_counter(), 0, 0
        for refs, size in zip(self._groups, blocks.group_sizes, strict=True):
            block_ids = torch.from_numpy(blocks.block_ids[first : first + size]).long()
            chunk_ids = torch.from_numpy(chunks.block_ids[first : first + size]).long()
            first += size
            if not size:
                continue
            from_ids, to_ids = (block_ids, chunk_ids) if from_cache else (chunk_ids, block_ids)
            for ref in refs:
                pages = source[ref.tensor_idx][:, : ref.page_size_bytes]
                for row, place in zip(from_ids.tolist(), to_ids.tolist(), strict=True):
                    target[ref.tensor_idx][place, : ref.page_size_bytes].copy_(pages[row])
                num_bytes += size * ref.page_size_bytes
        self._finished.append(TransferResult(job_id, True, num_bytes, perf_counter() - started))
        return True
