"""Every hash column is held by as many servers as there are copies, and by none twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeray.engram import Shares, shares_without


@st.composite
def some_shares(draw: st.DrawFn) -> Shares:
    num_columns = draw(st.integers(1, 64))
    num_servers = draw(st.integers(1, num_columns))
    return Shares(num_servers, draw(st.integers(1, num_servers)), num_columns)


@given(some_shares())
def test_every_column_is_in_exactly_one_share(shares: Shares) -> None:
    columns = [column for share in range(shares.num_servers) for column in shares.columns(share)]
    assert columns == list(range(shares.num_columns))


@given(some_shares())
def test_every_share_has_its_copies_on_different_servers(shares: Shares) -> None:
    for share in range(shares.num_servers):
        assert len(set(shares.holders(share))) == shares.copies
        assert {server for server in range(shares.num_servers) if share in shares.held_by(server)} == set(
            shares.holders(share)
        )


@given(some_shares())
def test_servers_hold_alike_and_are_asked_alike(shares: Shares) -> None:
    sizes = [len(shares.columns(share)) for share in range(shares.num_servers)]
    assert max(sizes) - min(sizes) <= 1
    assert {len(shares.held_by(server)) for server in range(shares.num_servers)} == {shares.copies}
    assert sorted(shares.holders(share)[0] for share in range(shares.num_servers)) == list(range(shares.num_servers))


@given(some_shares(), st.data())
def test_shares_are_lacking_as_long_as_nobody_holds_them(shares: Shares, data: st.DataObject) -> None:
    there = data.draw(st.sets(st.integers(0, shares.num_servers - 1)))
    held = {share for server in there for share in shares.held_by(server)}
    lacking = shares_without(there, shares.num_servers, shares.copies)
    assert set(lacking) == set(range(shares.num_servers)) - held


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [((3, 1, 2), "3 row servers for 2 hash columns"), ((2, 3, 8), "3 copies on 2"), ((0, 1, 8), "0 row servers")],
)
def test_counts_that_do_not_fit_are_refused_with_the_arithmetic(arguments: tuple[int, int, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Shares(*arguments)
