"""Which prefixes of a prompt the stores have: what a hit needs, over any number of stores (pure).

A prefix can be used if every cache group has what attention will read: all chunks of a group of full attention, and the
last window of a group of sliding window, state or indexer. Windows exist only where a request has left them: at the end
of prompts and answers, at junctions of prefixes, and every `prefix_cache_retention_interval` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moeray.kv_cache.choice import Option

FIRST_LOOK = 2
"""Boundaries that are looked up at once, from the longest; twice as many each time."""

Has = Callable[[Sequence[bytes]], list[bool]]


@dataclass(frozen=True, slots=True)
class GroupKeys:
    """One cache group of one request.

    Attributes:
        keys: of its chunks, from the first token on.
        chunk_tokens: tokens of a chunk.
        window_of: end of a prefix -> chunks that are needed before it; None: full attention needs all.
    """

    keys: Sequence[bytes]
    chunk_tokens: int
    window_of: Callable[[int], int] | None


@dataclass(frozen=True, slots=True)
class Prefixes:
    """What was found.

    Attributes:
        options: longest of each set of stores, nearest stores first; none twice.
        names: what must come from each store for any of the options.
        longest_full: where the prefix ends that all groups of full attention have; a later request with the same
            beginning could use it if the other groups kept a window there.
    """

    options: list[Option]
    names: dict[str, set[bytes]]
    longest_full: int


class _Known:
    """Where each key is: asked once, in the nearest store first."""

    def __init__(self, resident: Callable[[bytes], bool], stores: Mapping[str, Has]) -> None:
        self._resident, self._stores = resident, stores
        self.at: dict[bytes, str | None] = {}

    def look(self, keys: Sequence[bytes]) -> None:
        new = [key for key in dict.fromkeys(keys) if key not in self.at]
        for key in new:
            self.at[key] = "" if self._resident(key) else None
        for store, has in self._stores.items():
            missing = [key for key in new if self.at[key] is None]
            if not missing:
                return
            for key, found in zip(missing, has(missing), strict=True):
                if found:
                    self.at[key] = store


def probe(
    groups: Sequence[GroupKeys],
    num_computed: int,
    num_tokens: int,
    resident: Callable[[bytes], bool],
    stores: Mapping[str, Has],
    block_bytes: int,
    room_blocks: int,
) -> Prefixes:
    """Ask the stores, in this order, what they have of a prompt.

    Args:
        groups: of the request.
        num_computed: tokens that the device has; a multiple of every full group's chunk.
        num_tokens: of the prompt; the last one is always computed.
        resident: whether the engine's own host memory has a block.
        stores: name -> which of these keys it has.
        block_bytes: of every block.
        room_blocks: of the engine's own host memory. A prefix passes through it whole, so a longer one is none.
    """
    known = _Known(resident, stores)
    full = [group for group in groups if group.window_of is None]
    align = max((group.chunk_tokens for group in full), default=max(group.chunk_tokens for group in groups))
    last = (num_tokens - 1) // align * align
    known.look([key for group in full for key in _span(group, num_computed, last)])
    options: list[Option] = []
    names: dict[str, set[bytes]] = {}
    reachable = [""]
    longest = num_computed
    for store in ("", *stores):
        reachable.append(store)
        allowed = set(reachable)
        end = min((_unbroken(group, num_computed, last, known, allowed) for group in full), default=last)
        end = end // align * align
        longest = max(longest, end)
        end = _with_windows(groups, num_computed, end, align, known, allowed)
        while _num_needed(groups, num_computed, end) > room_blocks:
            end = _with_windows(groups, num_computed, end - align, align, known, allowed)
        if end <= num_computed or (options and end <= options[-1].tokens):
            continue
        needed = [key for group in groups for key in _needed(group, num_computed, end)]
        bytes_from = {
            each: count * block_bytes for each in stores if (count := sum(known.at[key] == each for key in needed))
        }
        options.append(Option(end, bytes_from))
        for each in bytes_from:
            names.setdefault(each, set()).update(key for key in needed if known.at[key] == each)
    return Prefixes(options, names, longest)


def _span(group: GroupKeys, start: int, end: int) -> Sequence[bytes]:
    return group.keys[start // group.chunk_tokens : end // group.chunk_tokens]


def _unbroken(group: GroupKeys, start: int, end: int, known: _Known, allowed: set[str]) -> int:
    """Where the group's chunks from `start` on end to be in one of these places."""
    for index, key in enumerate(_span(group, start, end)):
        if known.at[key] not in allowed:
            return start + index * group.chunk_tokens
    return end


def _needed(group: GroupKeys, start: int, end: int) -> Sequence[bytes]:
    """Keys of a prefix that ends at `end`, without what the device has."""
    last = -(-end // group.chunk_tokens)
    first = start // group.chunk_tokens
    if group.window_of is not None:
        first = max(first, last - group.window_of(end))
    return group.keys[first:last]


def _num_needed(groups: Sequence[GroupKeys], start: int, end: int) -> int:
    """Blocks of a prefix that ends at `end`, without what the device has; 0 if that is all of it."""
    return sum(len(_needed(group, start, end)) for group in groups) if end > start else 0


def _with_windows(
    groups: Sequence[GroupKeys], start: int, end: int, align: int, known: _Known, allowed: set[str]
) -> int:
    """The last boundary up to `end` at which every other group has its window; `start` if none has."""
    windowed = [group for group in groups if group.window_of is not None]
    boundary, look = end, FIRST_LOOK
    while boundary > start:
        tried = range(boundary, max(start, boundary - look * align), -align)
        known.look([key for group in windowed for each in tried for key in _needed(group, start, each)])
        for each in tried:
            if all(known.at[key] in allowed for group in windowed for key in _needed(group, start, each)):
                return each
        boundary -= look * align
        look *= 2
    return start
