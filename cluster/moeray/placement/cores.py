"""Which cores a compute process runs on: one thread per core, never two processes' threads racing for all of them."""

from __future__ import annotations

from collections.abc import Sequence


def cores_of(process: int, num_processes: int, cores: Sequence[int]) -> list[int]:
    """Equal, disjoint runs of cores while there are enough; else processes take turns on single cores.

    Args:
        process: 0 <= process; numbers beyond num_processes wrap around.
        num_processes: compute processes that share `cores` (attention shards first, then expert groups).
        cores: those this node offers, in order.
    Returns:
        At least one core.
    """
    share = len(cores) // num_processes
    if share == 0:
        return [cores[process % len(cores)]]
    start = (process % num_processes) * share
    return list(cores[start : start + share])
