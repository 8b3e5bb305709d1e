"""What of a prompt can be used, held to a search through every boundary and every set of stores."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import pytest

from moeray.kv_cache import GroupKeys, Option, probe

BLOCK, ROOM = 1000, 10_000


def group(name: str, num_tokens: int, chunk: int, window: int | None = None) -> GroupKeys:
    keys = [f"{name}{index}".encode() for index in range(num_tokens // chunk)]
    return GroupKeys(keys, chunk, None if window is None else lambda end: window)


def store(have: set[bytes], asked: list[bytes] | None = None) -> Callable[[Sequence[bytes]], list[bool]]:
    def has(keys: Sequence[bytes]) -> list[bool]:
        if asked is not None:
            asked.extend(keys)
        return [key in have for key in keys]

    return has


def usable(groups: Sequence[GroupKeys], start: int, end: int, have: set[bytes], room: int) -> bool:
    """By the definition: full groups need every chunk from the device's on, the others the window before the end."""
    needed: list[bytes] = []
    for each in groups:
        last = -(-end // each.chunk_tokens)
        first = start // each.chunk_tokens
        if each.window_of is not None:
            first = max(first, last - each.window_of(end))
        needed += each.keys[first:last]
    return len(needed) <= room and set(needed) <= have


def test_a_prefix_needs_every_chunk_of_full_attention_and_the_last_window_of_the_others() -> None:
    groups = [group("f", 1024, 256), group("w", 1024, 64, window=2)]
    have = {b"f0", b"f1", b"f2", b"w10", b"w11", b"w6", b"w7"}
    found = probe(groups, 0, 1024, lambda key: False, {"node": store(have)}, BLOCK, ROOM)
    assert found.options == [Option(768, {"node": 5 * BLOCK})]
    assert found.names == {"node": {b"f0", b"f1", b"f2", b"w10", b"w11"}}


def test_without_its_last_window_an_earlier_one_is_used_and_the_longer_beginning_is_told() -> None:
    groups = [group("f", 1024, 256), group("w", 1024, 64, window=2)]
    have = {b"f0", b"f1", b"f2", b"w6", b"w7"}
    found = probe(groups, 0, 1024, lambda key: False, {"node": store(have)}, BLOCK, ROOM)
    assert [option.tokens for option in found.options] == [512] and found.longest_full == 768


def test_the_last_token_is_never_taken_from_a_store() -> None:
    groups = [group("f", 512, 256)]
    found = probe(groups, 0, 512, lambda key: False, {"node": store({b"f0", b"f1"})}, BLOCK, ROOM)
    assert [option.tokens for option in found.options] == [256]


def test_a_far_store_is_not_asked_for_what_a_near_one_has() -> None:
    asked: list[bytes] = []
    groups = [group("f", 1024, 256)]
    found = probe(
        groups, 0, 1024, {b"f0"}.__contains__, {"node": store({b"f1"}), "redis": store({b"f2"}, asked)}, BLOCK, ROOM
    )
    assert asked == [b"f2"]
    assert found.options == [
        Option(256, {}),
        Option(512, {"node": BLOCK}),
        Option(768, {"node": BLOCK, "redis": BLOCK}),
    ]


@pytest.mark.parametrize("seed", range(200))
def test_options_are_the_longest_usable_prefixes(seed: int) -> None:
    random_ = random.Random(seed)
    num_tokens = random_.randint(1, 4096)
    window, state = group("w", num_tokens, 64, random_.randint(1, 4)), 4 << random_.randint(0, 6)
    groups = [group("f", num_tokens, 256), group("i", num_tokens, 128), window, group("s", num_tokens, state, 3)]
    keys = [key for each in groups for key in each.keys]
    share = random_.choice([0.5, 0.97, 1.0])
    places: Mapping[str, set[bytes]] = {
        place: {key for key in keys if random_.random() < share}
        for place in ("", "node", "redis")
        if random_.random() < 0.8
    }
    start = random_.randrange(0, num_tokens, 256)
    room = random_.choice([ROOM, random_.randint(1, 40)])
    resident = places.get("", set())
    stores = {place: store(have) for place, have in places.items() if place}

    found = probe(groups, start, num_tokens, resident.__contains__, stores, BLOCK, room)

    expected: list[int] = []
    have = set(resident)
    for place in ("", *stores):
        have |= places.get(place, set())
        ends = [end for end in range(start + 256, num_tokens, 256) if usable(groups, start, end, have, room)]
        if ends and (not expected or ends[-1] > expected[-1]):
            expected.append(ends[-1])
    assert [option.tokens for option in found.options] == expected
    for option in found.options:
        brought = set().union(*(found.names[place] for place in option.bytes_from)) if option.bytes_from else set()
        assert usable(groups, start, option.tokens, brought | resident, room)
    assert all(found.names[place] <= places[place] for place in found.names)
