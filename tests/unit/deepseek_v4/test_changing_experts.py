"""Weights come and go while others are computed: nobody waits, no bit changes, nothing stays behind."""

from __future__ import annotations

import errno
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeray.deepseek_v4 import Checkpoint, CheckpointError, ExpertError, RoutedExperts
from moeray.deepseek_v4.packed_experts import PackedExperts

Write = Callable[..., Path]
HIDDEN, NUM_EXPERTS, NUM_LAYERS = 48, 6, 3
ALL = dict.fromkeys(range(NUM_LAYERS), range(NUM_EXPERTS))
STAYING = {0: (1, 4), 2: (3,)}


@pytest.fixture
def checkpoint(write: Write) -> Checkpoint:
    return Checkpoint.open(write())


def batch(experts: Sequence[int], num_tokens: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(experts))
    ids_TK = torch.tensor([list(experts)] * num_tokens, dtype=torch.int32)
    return torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16(), ids_TK


def bytes_of(checkpoint: Checkpoint, held: Mapping[int, Sequence[int]]) -> int:
    return checkpoint.bytes_of(name for layer, ids in held.items() for name in checkpoint.expert_names(layer, ids))


@contextmanager
def hammering(experts: RoutedExperts, expected: Mapping[int, Tensor], num_threads: int = 2) -> Iterator[list[int]]:
    """Threads that compute what stays, all the time; yields the number of calls, checks every row's bits at the end."""
    calls, errors, stop = [0] * num_threads, [], threading.Event()

    def work(at: int) -> None:
        while not stop.is_set():
            for layer, ids in STAYING.items():
                try:
                    if not torch.equal(experts(layer, *batch(ids)), expected[layer]):
                        errors.append(f"layer {layer}: other bits")
                except ExpertError as error:
                    errors.append(str(error))
                calls[at] += 1

    threads = [threading.Thread(target=work, args=(at,)) for at in range(num_threads)]
    for thread in threads:
        thread.start()
    try:
        yield calls
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors, errors[:3]
    assert all(calls)


@pytest.mark.parametrize("compiled", [True, False])
def test_rows_of_what_stays_keep_their_bits_while_everything_else_comes_and_goes(
    checkpoint: Checkpoint, compiled: bool
) -> None:
    whole = RoutedExperts.load(checkpoint, ALL, compiled=compiled)
    expected = {layer: whole(layer, *batch(ids)) for layer, ids in STAYING.items()}
    experts = RoutedExperts.load(checkpoint, STAYING, compiled=compiled)
    with hammering(experts, expected) as calls:
        done, rounds = list(calls), 0
        while rounds < 10 or any(now < before + 20 for now, before in zip(calls, done, strict=True)):
            experts.hold(ALL)
            assert experts.held == {layer: tuple(ids) for layer, ids in ALL.items()}
            for layer in ALL:
                assert torch.equal(experts(layer, *batch(range(6))), whole(layer, *batch(range(6))))
            experts.release(STAYING)
            assert experts.held == STAYING
            rounds += 1


def test_only_what_is_missing_is_read_and_bytes_add_up(checkpoint: Checkpoint) -> None:
    experts = RoutedExperts(checkpoint)
    assert (experts.held, experts.bytes_read, experts.weight_bytes) == ({}, 0, 0)
    experts.hold(STAYING)
    first = bytes_of(checkpoint, STAYING)
    assert experts.bytes_read == first
    seen: list[tuple[int, int]] = []
    experts.hold({0: (0, 1, 4), 1: (5,)}, lambda done, total: seen.append((done, total)))
    added = bytes_of(checkpoint, {0: (0,), 1: (5,)})
    assert experts.bytes_read == first + added
    assert seen == [(added // 2, added), (added, added)]
    assert experts.held == {0: (0, 1, 4), 1: (5,), 2: (3,)}
    seen.clear()
    experts.hold(STAYING, lambda done, total: seen.append((done, total)))
    assert not seen and experts.bytes_read == first + added


@pytest.mark.parametrize("compiled", [True, False])
def test_what_is_released_is_an_error_by_name_and_its_memory_is_free(checkpoint: Checkpoint, compiled: bool) -> None:
    experts = RoutedExperts.load(checkpoint, ALL, compiled=compiled)
    one = experts.weight_bytes // (NUM_LAYERS * NUM_EXPERTS)
    experts.release({**STAYING, 1: ()})
    assert experts.held == STAYING
    assert experts.weight_bytes == 3 * one
    with pytest.raises(ExpertError, match="expert 0 of layer 0 is not held here"):
        experts(0, *batch((1, 0)))
    with pytest.raises(ExpertError, match="expert 3 of layer 1 is not held here"):
        experts.weights(1, 3)
    experts.hold({1: (3,)})
    assert experts(1, *batch((3,))).shape == (5, HIDDEN)


def test_matrices_that_are_released_live_until_the_calls_that_use_them_end(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = RoutedExperts.load(checkpoint, {0: (0, 1)})
    store = experts._store
    assert isinstance(store, PackedExperts)
    expected = experts(0, *batch((0, 1)))
    matrices = weakref.ref(store._layers[0].experts[0].w13)
    inside, released = threading.Event(), threading.Event()
    down = store._products.down

    def slow_down(*arguments: object) -> int:
        inside.set()
        assert released.wait(60)
        gc.collect()
        assert matrices() is not None, "a call's weights were freed under it"
        return int(down(*arguments))

    store._products = store._products._replace(down=slow_down)
    found: list[Tensor] = []
    call = threading.Thread(target=lambda: found.append(experts(0, *batch((0, 1)))))
    call.start()
    assert inside.wait(60)
    experts.release({})
    assert experts.held == {} and experts.weight_bytes == 0
    released.set()
    call.join()
    assert torch.equal(found[0], expected)
    gc.collect()
    assert matrices() is None, "nothing keeps them"


@pytest.mark.parametrize("compiled", [True, False])
def test_a_file_that_fails_leaves_what_was_held_and_trying_again_reads_the_rest(
    checkpoint: Checkpoint, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = RoutedExperts.load(checkpoint, STAYING, compiled=compiled)
    expected = {layer: experts(layer, *batch(ids)) for layer, ids in STAYING.items()}
    missing = bytes_of(checkpoint, ALL) - bytes_of(checkpoint, STAYING)
    half, preadv = (checkpoint.path / "model.safetensors").stat().st_size // 2, os.preadv

    def broken_disk(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset > half:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(descriptor, buffers, offset)

    with hammering(experts, expected):
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", broken_disk)
            with pytest.raises(CheckpointError, match="Input/output error"):
                experts.hold(ALL)
        assert all(set(ids) <= set(experts.held[layer]) for layer, ids in STAYING.items())
        assert len(experts.held[0]) == NUM_EXPERTS, "what had been read is there"
        experts.hold(ALL)
    assert experts.held == {layer: tuple(ids) for layer, ids in ALL.items()}
    again = RoutedExperts.load(checkpoint, ALL, compiled=compiled)
    for layer in ALL:
        assert torch.equal(experts(layer, *batch(range(6))), again(layer, *batch(range(6))))
    assert missing <= experts.bytes_read - bytes_of(checkpoint, STAYING) <= missing + bytes_of(checkpoint, {0: (0,)})


@pytest.mark.parametrize("replaced", [True, False])
def test_weights_of_a_file_that_changed_since_it_was_identified_do_not_come_beside_those_that_are_held(
    checkpoint: Checkpoint, replaced: bool
) -> None:
    experts = RoutedExperts.load(checkpoint, STAYING)
    expected = experts(0, *batch(STAYING[0]))
    file = checkpoint.path / "model.safetensors"
    if replaced:
        other = file.with_name("other")
        other.write_bytes(file.read_bytes())
        other.replace(file)
    else:
        file.write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="was replaced or changed"):
        experts.hold(ALL)
    assert experts.held == STAYING
    assert torch.equal(experts(0, *batch(STAYING[0])), expected)


def test_whoever_watches_the_progress_can_end_a_load_that_is_no_longer_wanted(checkpoint: Checkpoint) -> None:
    class NotWanted(Exception):
        pass

    def watch(done: int, total: int) -> None:
        if done > total // 2:
            raise NotWanted

    experts = RoutedExperts(checkpoint)
    with pytest.raises(NotWanted):
        experts.hold(ALL, watch)
    num_held = sum(map(len, experts.held.values()))
    assert num_held == NUM_LAYERS * NUM_EXPERTS // 2 + 1
    experts.hold(ALL)
    assert experts.bytes_read == bytes_of(checkpoint, ALL), "nothing is read twice"


def test_layers_and_experts_that_do_not_exist_are_refused_before_anything_is_read(checkpoint: Checkpoint) -> None:
    experts = RoutedExperts(checkpoint)
    for wanted in ({0: (0,), 7: (0,)}, {0: (0, NUM_EXPERTS)}):
        with pytest.raises(CheckpointError, match="is in no weight file"):
            experts.hold(wanted)
    assert experts.bytes_read == 0


def test_rows_counted_do_not_go_with_the_weights(checkpoint: Checkpoint) -> None:
    experts = RoutedExperts.load(checkpoint, ALL)
    experts(0, *batch((1, 5)))
    experts.release({0: (1,)})
    experts(0, *batch((1,)))
    assert experts.tokens()[0].tolist() == [0, 10, 0, 0, 0, 5]


held_per_layer = st.dictionaries(st.integers(0, NUM_LAYERS - 1), st.sets(st.integers(0, NUM_EXPERTS - 1)))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])  # it is only read
@given(steps=st.lists(st.tuples(st.booleans(), held_per_layer), max_size=6))
@pytest.mark.parametrize("compiled", [True, False])
def test_any_order_of_coming_and_going_holds_what_sets_would(
    checkpoint: Checkpoint, compiled: bool, steps: list[tuple[bool, dict[int, set[int]]]]
) -> None:
    experts = RoutedExperts(checkpoint, compiled=compiled)
    model: set[tuple[int, int]] = set()
    for is_hold, per_layer in steps:
        named = {(layer, expert) for layer, ids in per_layer.items() for expert in ids}
        (experts.hold if is_hold else experts.release)(per_layer)
        model = model | named if is_hold else model & named
        assert {(layer, expert) for layer, ids in experts.held.items() for expert in ids} == model
        assert all(experts.held.values())
    assert experts.weight_bytes == len(model) * (3 * 2 * 20 * 48 if not compiled else 2 * (2 * 32 * 48 + 64 * 20))
