"""Processes share cores evenly and never race for all of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moeray.placement.cores import cores_of


@given(num_processes=st.integers(1, 12), num_cores=st.integers(1, 32))
def test_every_process_gets_a_core_and_shares_are_disjoint_while_there_are_enough(
    num_processes: int, num_cores: int
) -> None:
    cores = list(range(100, 100 + num_cores))
    shares = [cores_of(process, num_processes, cores) for process in range(num_processes)]
    assert all(share and set(share) <= set(cores) for share in shares)
    if num_cores >= num_processes:
        together = [core for share in shares for core in share]
        assert len(together) == len(set(together))
        assert len({len(share) for share in shares}) == 1
    else:
        assert all(len(share) == 1 for share in shares)
        loads = [sum(core in share for share in shares) for core in cores]
        assert max(loads) - min(loads) <= 1


def test_a_shard_and_its_group_do_not_share_one_of_two_cores() -> None:
    assert [cores_of(process, 2, [0, 1]) for process in range(2)] == [[0], [1]]
