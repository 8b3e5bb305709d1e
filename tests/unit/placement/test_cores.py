"""Processes get cores of their own while there are any, near one memory, whatever order and node they come from."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from moeray.placement import CoreShare, Cpu, Machine, Wanted, crowded, take_cores


def machine(num_cores: int, *, sockets: int = 1, smt: int = 1, quota: float | None = None, id: str = "m") -> Machine:
    """`num_cores` physical cores in all; SMT siblings are numbered after all first ones, as Linux does on x86."""
    cpus = [
        Cpu(number, number % num_cores, number % num_cores * sockets // num_cores) for number in range(num_cores * smt)
    ]
    return Machine(id, tuple(cpus), quota)


def shard(index: int, threads: int = 1, *, node: str = "n", cluster_threads: int = 10**6) -> Wanted:
    return Wanted(f"attention shard {index}", "attention_shard", node, threads, True, cluster_threads)


def group(index: int, threads: int = 1, *, node: str = "n") -> Wanted:
    return Wanted(f"expert group {index}", "expert_group", node, threads)


def placed(on: Machine, *wanted: Wanted) -> list[CoreShare]:
    shares: list[CoreShare] = []
    for each in wanted:
        shares.append(take_cores(on, each, shares))
    return shares


def cores(shares: list[CoreShare]) -> list[list[int]]:
    return [share.cores for share in shares]


def test_a_shard_and_its_group_do_not_share_one_of_two_cores() -> None:
    assert cores(placed(machine(2), shard(0), group(0))) == [[0], [1]]


def test_on_too_few_cores_a_shard_shares_with_a_group_and_not_with_a_shard() -> None:
    assert cores(placed(machine(2), shard(0), shard(1), group(0), group(1))) == [[0], [1], [0], [1]]


@given(
    num_cores=st.integers(1, 24), sockets=st.integers(1, 2), smt=st.integers(1, 2),
    threads=st.lists(st.integers(1, 6), min_size=1, max_size=10), quota=st.none() | st.floats(0.5, 30),
)  # fmt: skip
def test_threads_take_cores_of_the_machine_within_the_quota_and_share_none_while_any_is_idle(
    num_cores: int, sockets: int, smt: int, threads: list[int], quota: float | None
) -> None:
    on = machine(num_cores, sockets=sockets, smt=smt, quota=quota)
    shares = placed(on, *(shard(index, number) for index, number in enumerate(threads)))
    assert all(share.cpus and set(share.cpus) <= set(on.cpus) for share in shares)
    assert all(len(set(share.cores)) == len(share.cores) <= share.num_threads for share in shares)
    load = Counter(cpu for share in shares for cpu in share.threads())
    assert sum(load.values()) == sum(threads)
    assert len(load) <= (len(on.cpus) if quota is None else max(1, int(quota)))
    if sum(threads) <= on.num_usable and sockets == 1:
        assert max(load.values()) == 1
        assert len({cpu.core for cpu in load}) == len(load), "a sibling was taken while a core was idle"
        assert not crowded(shares)
    if max(Counter(cpu.core for cpu in load.elements()).values()) > 1:
        assert crowded(shares)


def test_a_process_stays_on_one_numa_node_and_the_next_goes_to_the_other() -> None:
    shares = placed(machine(16, sockets=2), shard(0, 4), group(0, 4), shard(1, 4), group(1, 4))
    assert [share.numa_node for share in shares] == [0, 1, 0, 1]
    assert sorted(core for share in shares for core in share.cores) == list(range(16))


def test_a_process_larger_than_a_numa_node_is_on_several() -> None:
    (share,) = placed(machine(8, sockets=2), group(0, 6))
    assert (len(share.cores), share.numa_node) == (6, None)


def test_a_numa_node_that_is_full_is_shared_only_when_the_other_is() -> None:
    shares = placed(machine(4, sockets=2), group(0, 2), group(1, 1), group(2, 2))
    assert cores(shares)[:2] == [[0, 1], [2]]
    assert shares[2].cores == [2, 3]


def test_siblings_of_busy_cores_are_taken_after_idle_cores_and_before_busy_cpus() -> None:
    shares = placed(machine(2, smt=2), *(group(index) for index in range(5)))
    assert cores(shares) == [[0], [1], [2], [3], [0]]
    assert not crowded(shares[:2])
    assert "core 0: expert group 0, expert group 2" in crowded(shares[:3])[0]


def test_a_quota_bounds_the_cores_of_a_node() -> None:
    on = machine(64, quota=2.5)
    assert on.num_usable == 2
    shares = placed(on, shard(0), group(0), group(1), group(2, 3))
    assert cores(shares) == [[0], [1], [0], [0, 1]]
    assert "6 compute threads share 2 cores" in crowded(shares)[0]
    assert machine(64, quota=0.1).num_usable == 1


def test_containers_of_one_machine_do_not_take_the_same_cores_and_other_machines_do_not_matter() -> None:
    one, other = machine(8, quota=2), machine(8, id="other")
    shares = placed(one, shard(0, node="a"), shard(1, node="a"), group(0, node="b"), group(1, node="b"))
    assert cores(shares) == [[0], [1], [2], [3]]
    assert take_cores(other, group(2, node="c"), shares).cores == [0]
    assert not crowded(shares)


def test_a_relay_has_a_core_of_its_own_only_where_the_whole_cluster_would_fit() -> None:
    fits, barely = (placed(machine(6), shard(0, cluster_threads=number))[0] for number in (6, 7))
    assert (fits.cores, fits.relay.number) == ([0], 1)
    assert (barely.cores, barely.relay.number) == ([0], 0)
    everyone = placed(machine(6), *(shard(i, cluster_threads=6) for i in range(2)), group(0), group(1))
    taken = [core for share in everyone for core in {*share.cores, share.relay.number}]
    assert sorted(taken) == list(range(6))


def test_cores_of_a_process_that_is_gone_are_taken_again() -> None:
    shares = placed(machine(4), shard(0), group(0), group(1))
    del shares[1]
    assert take_cores(machine(4), group(0), shares).cores in ([1], [3])


def test_the_warning_names_who_shares_which_core_and_what_to_change() -> None:
    (text,) = crowded(placed(machine(2), shard(0, node="f" * 56), group(0, node="f" * 56), group(1, node="f" * 56)))
    assert text.startswith("node ffffffff: 3 compute threads share 2 cores")
    assert "(core 0: attention shard 0, expert group 1)" in text
    assert "experts.num_groups" in text


def test_a_process_whose_cpuset_leaves_nothing_of_the_quota_still_gets_a_core() -> None:
    shares = placed(machine(4, quota=1), group(0))
    elsewhere = Machine("m", (Cpu(3, 3),), 1.0)
    assert take_cores(elsewhere, group(1), shares).cores == [3]


ADJACENT = Machine("m", tuple(Cpu(number, number // 2 * 2) for number in range(4)))
"""Two cores whose SMT siblings follow each other, as some machines number them."""


def test_a_sibling_is_taken_after_an_idle_core_however_siblings_are_numbered() -> None:
    assert cores(placed(ADJACENT, group(0), shard(0), group(1))) == [[0], [2], [3]]


def test_of_two_equally_busy_cores_a_group_takes_the_one_without_a_group() -> None:
    assert cores(placed(machine(2), group(0), shard(0), group(1), shard(1))) == [[0], [1], [1], [0]]


def test_a_relay_takes_no_core_beyond_the_quota() -> None:
    """A shard that is there twice for a moment (its replacement starts before it has gone) was not counted twice."""
    shares = placed(machine(8, quota=2), shard(0, cluster_threads=2), shard(1, cluster_threads=2))
    assert (shares[0].cores, shares[0].relay.number) == ([0], 1)
    assert {core for share in shares for core in (*share.cores, share.relay.number)} == {0, 1}


def test_a_relay_is_near_the_memory_of_its_shard_though_other_cores_are_idle() -> None:
    first, second = placed(machine(8, sockets=2), group(0), shard(0, cluster_threads=3))
    assert (first.numa_node, second.numa_node) == (0, 1)
    assert second.relay.numa_node == 1
