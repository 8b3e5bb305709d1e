"""Which row server holds which hash columns: pure arithmetic that server and client do alike.

The columns are cut into as many shares as there are servers. Share s is held by servers s, s + 1, ... s + copies - 1,
counted around, so that the loss of one server falls on its neighbours and not all on one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


def holders_of(share: int, num_servers: int, copies: int) -> tuple[int, ...]:
    """Servers that hold a share, the one that is asked first at the front."""
    return tuple((share + copy) % num_servers for copy in range(copies))


def shares_without(servers: Collection[int], num_servers: int, copies: int) -> tuple[int, ...]:
    """Those that none of these servers holds."""
    shares = range(num_servers)
    return tuple(share for share in shares if not any(s in servers for s in holders_of(share, num_servers, copies)))


@dataclass(frozen=True, slots=True)
class Shares:
    """See module docstring.

    Raises:
        ValueError: the counts do not fit together.
    """

    num_servers: int
    copies: int
    num_columns: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_servers <= self.num_columns:
            raise ValueError(
                f"{self.num_servers} row servers for {self.num_columns} hash columns: each must hold one at least"
            )
        if not 1 <= self.copies <= self.num_servers:
            raise ValueError(f"{self.copies} copies on {self.num_servers} row servers: each holds one at most")

    def columns(self, share: int) -> range:
        """Hash columns of a share; sizes differ by one at most."""
        first, stop = (self.num_columns * each // self.num_servers for each in (share, share + 1))
        return range(first, stop)

    def holders(self, share: int) -> tuple[int, ...]:
        """See `holders_of`."""
        return holders_of(share, self.num_servers, self.copies)

    def held_by(self, server: int) -> tuple[int, ...]:
        """Shares of a server, ascending."""
        return tuple(share for share in range(self.num_servers) if server in self.holders(share))
