"""Is it the call, or the groups that refuse it? Rows of the shard's own, to the same experts, tell them apart.

A call that has bad numbers in it fails wherever it goes; to let it go round would end one group after the other. Groups
that are broken fail at anything. So what was refused often is followed by rows that are known to be good: who fails at
these is broken, and only a call that is refused by groups which are not has itself to blame.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moeray.transport.errors import ExpertsMissing, GroupFailed, PeerLost
from moeray.transport.interface import Transport


def broken_groups(
    connect: Callable[[frozenset[int]], Transport], layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
) -> dict[int, GroupFailed | PeerLost]:
    """The groups that cannot compute rows of ours either, and how they failed.

    Args:
        connect: a transport without these groups, beside those that it leaves out anyway.
        x_TD, expert_ids_TK, weights_TK: the call. Of x its shape and dtype count, so the same experts get as many rows.
    Raises:
        TransportError: nothing can be said: the groups are on another generation, or cannot be connected.
    """
    ours_TD = torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(layer)).to(x_TD.device, x_TD.dtype)
    found: dict[int, GroupFailed | PeerLost] = {}
    while True:
        transport = None
        try:
            transport = connect(frozenset(found))
            transport.combine(transport.dispatch(layer, ours_TD, expert_ids_TK, weights_TK))
        except (GroupFailed, PeerLost) as error:
            found[error.group] = error
        except ExpertsMissing:
            return found  # nobody is left to ask
        else:
            return found
        finally:
            if transport is not None:
                transport.close()
