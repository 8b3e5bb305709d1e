"""Which member has which cores, and where some share one."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from moeray.placement import CoreShare, Machine, Wanted, crowded, take_cores

logger = logging.getLogger(__name__)


class CoreLedger:
    """Attributes: crowding: a line for each place where members share cores."""

    def __init__(self) -> None:
        self._shares: dict[str, CoreShare] = {}
        self.crowding: list[str] = []

    def take(self, id: str, machine: Machine, wanted: Wanted) -> CoreShare:
        """Cores for a member, beside those that the others on its machine have."""
        share = take_cores(machine, wanted, [share for other, share in self._shares.items() if other != id])
        self.keep(id, share)
        return share

    def keep(self, id: str, share: CoreShare) -> None:
        """A member has these cores: it was given them now, or by this controller's predecessor."""
        self._shares[id] = share
        logger.info("%s runs on cores %s", share.name, share.cores)
        self._warn_of_crowding()

    def free_all_but(self, ids: Iterable[str]) -> None:
        """Take back the cores of members that are gone."""
        alive = set(ids)
        kept = {id: share for id, share in self._shares.items() if id in alive}
        if len(kept) < len(self._shares):
            self._shares = kept
            self._warn_of_crowding()

    def _warn_of_crowding(self) -> None:
        before, self.crowding = self.crowding, crowded(self._shares.values())
        for text in self.crowding:
            if text not in before:
                logger.warning("%s", text)
