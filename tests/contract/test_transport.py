"""The contract of every transport: same bits for every backend and placement, and a typed error for every fault.

The groups are real processes. `oracle` is the local transport over a single group.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transport_peers import (
    NUM_LAYERS,
    Model,
    Peer,
    ServerSettings,
    eventually,
    links_between,
    resources,
    spec_of,
    spread,
    users_of,
)

from moeray.transport import (
    GroupFailed,
    HandshakeRefused,
    LocalTransport,
    StaleGeneration,
    Transport,
    TransportError,
    connect,
)
from moeray.transport.all_to_all import AllToAllTransport
from moeray.transport.gloo import GlooCommunicator

SMALL = Model()
WIDE = Model(hidden_size=48, num_experts=7, top_k=6)
PLAIN = Model(hidden_size=33, num_experts=5, top_k=1, dtype="float32")
TOPOLOGIES = [
    pytest.param(SMALL, (8,), id="1-group"),
    pytest.param(SMALL, (4, 4), id="2-even"),
    pytest.param(SMALL, (1, 5, 2), id="3-uneven"),
    pytest.param(WIDE, (3, 4), id="2-top6"),
    pytest.param(WIDE, (1, 1, 1, 4), id="4-top6"),
    pytest.param(PLAIN, (2, 3), id="2-fp32-top1"),
]
# None, one, a few, exactly inline, just above, far above.
TOKENS = (0, 1, 3, 64, 65, 700)
_keys = itertools.count()


def serve(peers: list[Peer], model: Model, slots: tuple[int, ...], **settings: object) -> tuple[str, list[str]]:
    """Start one server per group; returns their key and addresses."""
    key, placement = str(next(_keys)), spread(model, slots)
    common = ServerSettings(model, placement, 0, **settings)  # type: ignore[arg-type]
    return key, [
        peers[g].ask("serve", key, replace(common, group=g, channel=users_of(g))) for g in range(placement.num_groups)
    ]


@contextmanager
def connected(
    peers: list[Peer], model: Model, slots: tuple[int, ...], **changes: object
) -> Iterator[tuple[AllToAllTransport, str]]:
    key, addresses = serve(peers, model, slots)
    transport = connect(spec_of(model, **changes), spread(model, slots), addresses)
    assert isinstance(transport, AllToAllTransport)
    assert transport.links == links_between(len(slots))
    try:
        yield transport, key
    finally:
        transport.close()
        for peer in peers[: len(slots)]:
            peer.ask("stop", key)


def assert_equals_oracle(transport: Transport, model: Model, token_counts: tuple[int, ...] = TOKENS) -> None:
    oracle = model.oracle()
    for layer, num_tokens in itertools.product(range(NUM_LAYERS), token_counts):
        batch = model.batch(num_tokens, seed=layer)
        expected = oracle.combine(oracle.dispatch(layer, *batch))
        y_TD = transport.combine(transport.dispatch(layer, *batch))
        assert y_TD.dtype == expected.dtype
        assert torch.equal(y_TD, expected), (layer, num_tokens)
    x_TD, ids_TK, weights_TK = model.batch(9)
    assert oracle.combine(oracle.dispatch(0, x_TD, ids_TK, weights_TK)).abs().max() > 0.1


# ---- results


@pytest.mark.parametrize(("model", "slots"), TOPOLOGIES)
def test_local_gives_the_oracles_bits_for_every_placement(model: Model, slots: tuple[int, ...]) -> None:
    everything = model.experts(dict.fromkeys(range(NUM_LAYERS), tuple(range(model.num_experts))))
    assert_equals_oracle(LocalTransport(spread(model, slots), everything), model)


@pytest.mark.parametrize(("model", "slots"), TOPOLOGIES)
def test_every_link_gives_the_oracles_bits_for_every_placement(
    groups: list[Peer], links: str, model: Model, slots: tuple[int, ...]
) -> None:
    with connected(groups, model, slots) as (transport, _):
        assert_equals_oracle(transport, model)


@pytest.mark.parametrize(("model", "slots"), [TOPOLOGIES[2], TOPOLOGIES[3]])
def test_bucketed_sizes_give_the_oracles_bits(
    groups: list[Peer], gloo_links: None, model: Model, slots: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a device does: packing without the host reading a size, replies with unused room."""
    monkeypatch.setattr(GlooCommunicator, "bucketed", True)
    with connected(groups, model, slots) as (transport, _):
        assert_equals_oracle(transport, model)


@pytest.mark.gpu
def test_nccl_gives_the_oracles_bits() -> None:
    """NOT RUN so far: it needs two GPUs, one for the shard and one for the group."""
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL is not covered here: it needs two CUDA devices")
    model, placement = SMALL, spread(SMALL, (8,))
    each = {(layer, e): model.weights(layer, e) for layer in range(NUM_LAYERS) for e in range(8)}
    on_device = {
        layer: {e: type(w)(w.w13.to("cuda:1"), w.w2.to("cuda:1")) for (at, e), w in each.items() if at == layer}
        for layer in range(NUM_LAYERS)
    }
    from moeray.deepseek_v4.experts import given_experts
    from moeray.transport import GroupServer

    compute = given_experts(on_device, num_layers=NUM_LAYERS, num_experts=8, swiglu_limit=1.0)
    server = GroupServer(compute, model.identity, positions={1: 0}, backend="nccl", device="cuda:1")
    transport = connect(spec_of(model, backend="nccl", device="cuda:0"), placement, [server.start()])
    reference = connect(spec_of(model, backend="local", device="cuda:1"), placement, [], compute)
    for num_tokens in TOKENS:
        batch = model.batch(num_tokens)
        expected = reference.combine(reference.dispatch(0, *(each.to("cuda:1") for each in batch)))
        y_TD = transport.combine(transport.dispatch(0, *(each.to("cuda:0") for each in batch)))
        assert torch.equal(y_TD.cpu(), expected.cpu())
    transport.close()
    server.stop()


def test_a_batch_routed_to_one_group_only_overflows_there_alone(groups: list[Peer], links: str) -> None:
    with connected(groups, SMALL, (2, 2, 4)) as (transport, _):
        x_TD, ids_TK, weights_TK = SMALL.batch(300)
        ids_TK[:] = torch.tensor([1, 0], dtype=torch.int32)
        ids_TK[:3] = torch.tensor([6, 3], dtype=torch.int32)
        oracle = SMALL.oracle()
        expected = oracle.combine(oracle.dispatch(0, x_TD, ids_TK, weights_TK))
        assert torch.equal(transport.combine(transport.dispatch(0, x_TD, ids_TK, weights_TK)), expected)
        assert transport.timings().pairs_per_group == [594, 3, 3]


def test_two_shards_are_not_in_lock_step(groups: list[Peer], links: str) -> None:
    """One shard makes many calls of other sizes while the other has one in flight and does not fetch it."""
    slots = (3, 5)
    _, addresses = serve(groups, SMALL, slots)
    idle, busy = (connect(spec_of(SMALL, name), spread(SMALL, slots), addresses) for name in ("idle", "busy"))
    batch, oracle = SMALL.batch(100, seed=5), SMALL.oracle()
    handle = idle.dispatch(1, *batch)
    assert_equals_oracle(busy, SMALL)
    assert torch.equal(idle.combine(handle), oracle.combine(oracle.dispatch(1, *batch)))
    idle.close()
    assert_equals_oracle(busy, SMALL, (2, 66))
    busy.close()


def test_two_shards_at_once_do_not_disturb_each_other(groups: list[Peer], links: str) -> None:
    slots = (3, 5)
    _, addresses = serve(groups, SMALL, slots)
    shards = [connect(spec_of(SMALL, f"s{i}"), spread(SMALL, slots), addresses) for i in range(2)]
    errors: list[Exception] = []

    def run(transport: Transport) -> None:
        try:
            for _ in range(5):
                assert_equals_oracle(transport, SMALL)
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run, args=(shard,)) for shard in shards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for shard in shards:
        shard.close()


def test_the_caller_may_reuse_its_tensors_after_dispatch(groups: list[Peer], links: str) -> None:
    oracle = SMALL.oracle()
    with connected(groups, SMALL, (4, 4)) as (transport, _):
        for subject in (transport, oracle):
            batch = SMALL.batch(100)
            handle = subject.dispatch(0, *batch)
            for tensor in batch:
                tensor.zero_()
            again = oracle.dispatch(0, *SMALL.batch(100))
            assert torch.equal(subject.combine(handle), oracle.combine(again))


def test_results_do_not_change_when_the_next_call_reuses_buffers(groups: list[Peer], links: str) -> None:
    with connected(groups, SMALL, (4, 4)) as (transport, _):
        first = transport.combine(transport.dispatch(0, *SMALL.batch(20, seed=1)))
        kept = first.clone()
        transport.combine(transport.dispatch(0, *SMALL.batch(20, seed=2)))
        assert torch.equal(first, kept)


def test_timings_add_up_and_name_each_groups_share(groups: list[Peer], links: str) -> None:
    with connected(groups, SMALL, (4, 4)) as (transport, _):
        for _ in range(3):
            transport.combine(transport.dispatch(0, *SMALL.batch(8)))
        timings = transport.timings()
        assert (timings.calls, timings.tokens, sum(timings.pairs_per_group)) == (3, 24, 48)
        assert all(cost > 0 for cost in timings.per_layer_us().values())


# ---- misuse


def test_a_handle_is_good_for_one_combine(groups: list[Peer], links: str) -> None:
    with connected(groups, SMALL, (4, 4)) as (transport, _):
        for subject in (transport, SMALL.oracle()):
            handle = subject.dispatch(0, *SMALL.batch(2))
            subject.combine(handle)
            with pytest.raises(TransportError, match="combine"):
                subject.combine(handle)
        assert_equals_oracle(transport, SMALL, (3,))


def test_a_call_that_was_never_combined_does_not_reach_the_next(groups: list[Peer], links: str) -> None:
    with connected(groups, SMALL, (4, 4)) as (transport, _):
        abandoned = transport.dispatch(0, *SMALL.batch(100, seed=9))
        assert_equals_oracle(transport, SMALL, (1, 70))
        with pytest.raises(TransportError, match="last dispatch"):
            transport.combine(abandoned)


def test_input_that_does_not_fit_is_refused_and_does_no_harm(groups: list[Peer], links: str) -> None:
    x_TD, ids_TK, weights_TK = SMALL.batch(2)
    wrong = torch.tensor([[0, 8], [1, 2]], dtype=torch.int32)
    with connected(groups, SMALL, (4, 4), max_tokens=700) as (transport, _):
        for call in (
            (0, x_TD.float(), ids_TK, weights_TK),
            (0, x_TD[:, :10], ids_TK, weights_TK),
            (0, x_TD, ids_TK.long(), weights_TK),
            (0, x_TD, ids_TK[:1], weights_TK),
            (0, x_TD, wrong, weights_TK),
            (0, x_TD, -wrong, weights_TK),
            (NUM_LAYERS, x_TD, ids_TK, weights_TK),
            (0, *SMALL.batch(701)),
        ):
            with pytest.raises(TransportError):
                transport.dispatch(*call)
        assert_equals_oracle(transport, SMALL, (2,))


def test_a_closed_transport_says_so(groups: list[Peer], links: str) -> None:
    with connected(groups, SMALL, (4, 4)) as (transport, _):
        transport.close()
        transport.close()
        with pytest.raises(TransportError, match="closed"):
            transport.dispatch(0, *SMALL.batch(1))


# ---- errors of a group


def test_a_groups_nan_is_that_calls_error_and_the_next_call_is_clean(groups: list[Peer], links: str) -> None:
    x_TD, ids_TK, weights_TK = SMALL.batch(4)
    ids_TK[:] = torch.tensor([0, 7], dtype=torch.int32)
    ids_TK[2] = torch.tensor([6, 7], dtype=torch.int32)
    x_TD[2] = 3e38  # finite, but not what comes of it
    with connected(groups, SMALL, (4, 4)) as (transport, key):
        with pytest.raises(
            GroupFailed, match=r"expert group 1 failed: ExpertError: layer 0: experts \[6, 7\] gave NaN"
        ):
            transport.combine(transport.dispatch(0, x_TD, ids_TK, weights_TK))
        x_TD[2, 3] = float("nan")
        with pytest.raises(GroupFailed, match="layer 0: the shard sent activations that hold NaN or Inf"):
            transport.combine(transport.dispatch(0, x_TD, ids_TK, weights_TK))
        assert_equals_oracle(transport, SMALL, (4, 90))
        assert groups[1].ask("shards", key)[0][2] == 2


@pytest.mark.parametrize("lie", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bucketed", [False, True])
def test_nan_that_a_group_does_not_notice_is_that_groups_error_and_the_next_call_is_clean(
    groups: list[Peer], gloo_links: None, lie: float, bucketed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GlooCommunicator, "bucketed", bucketed)
    _, addresses = serve(groups, SMALL, (4, 4), lies_about=6, lie=lie)
    transport = connect(spec_of(SMALL), spread(SMALL, (4, 4)), addresses)
    for num_tokens in (1, 5, 100):
        x_TD, ids_TK, weights_TK = SMALL.batch(num_tokens)
        ids_TK[:] = torch.tensor([0, 5], dtype=torch.int32)
        transport.combine(transport.dispatch(0, x_TD, ids_TK, weights_TK))
        ids_TK[-1, 1] = 6
        weights_TK[-1, 1] = 0.0  # not even an expert without weight may lie
        with pytest.raises(GroupFailed, match=r"group 1 failed: layer 0: experts \[6\] gave NaN or Inf"):
            transport.combine(transport.dispatch(0, x_TD, ids_TK, weights_TK))
    transport.close()


def test_nan_of_the_shards_own_router_is_not_blamed_on_a_group(groups: list[Peer], links: str) -> None:
    x_TD, ids_TK, weights_TK = SMALL.batch(3)
    weights_TK[1, 0] = float("nan")
    with connected(groups, SMALL, (4, 4)) as (transport, _):
        for subject in (transport, SMALL.oracle()):
            with pytest.raises(TransportError, match="router's weights of this shard") as caught:
                subject.combine(subject.dispatch(1, x_TD, ids_TK, weights_TK))
            assert not isinstance(caught.value, GroupFailed)
        assert_equals_oracle(transport, SMALL, (4, 90))


def test_an_expert_that_its_group_lost_is_that_calls_error(groups: list[Peer], links: str) -> None:
    _, addresses = serve(groups, SMALL, (4, 4), without=(5,))
    transport = connect(spec_of(SMALL), spread(SMALL, (4, 4)), addresses)
    x_TD, ids_TK, weights_TK = SMALL.batch(1)
    ids_TK[:] = torch.tensor([5, 0], dtype=torch.int32)
    with pytest.raises(GroupFailed, match="group 1 failed: ExpertError: expert 5 of layer 0 is not held"):
        transport.combine(transport.dispatch(0, x_TD, ids_TK, weights_TK))
    ids_TK[:] = torch.tensor([6, 0], dtype=torch.int32)
    transport.combine(transport.dispatch(0, x_TD, ids_TK, weights_TK))
    transport.close()


def test_a_local_groups_error_has_the_same_type() -> None:
    transport = LocalTransport(spread(SMALL, (4, 4)), SMALL.experts({0: (0,), 1: (0,)}))
    with pytest.raises(GroupFailed, match="is not held here"):
        transport.combine(transport.dispatch(0, *SMALL.batch(6)))


# ---- generations and identities


def test_a_group_of_a_newer_generation_refuses_calls_and_shards_of_the_old(groups: list[Peer], links: str) -> None:
    slots = (4, 4)
    key, addresses = serve(groups, SMALL, slots)
    transport = connect(spec_of(SMALL), spread(SMALL, slots), addresses)
    groups[1].ask("serve_generations", key, {2: 1})
    for _ in range(2):
        with pytest.raises(StaleGeneration, match="expert group 1 is on generation 2, this shard on 1"):
            transport.combine(transport.dispatch(0, *SMALL.batch(5)))
    with pytest.raises(
        HandshakeRefused, match=r"expert group 1 at .*generation is 2 at expert group 1, 1 at shard test"
    ):
        connect(spec_of(SMALL), spread(SMALL, slots), addresses)
    groups[0].ask("serve_generations", key, {2: 0})
    renewed = connect(spec_of(SMALL), spread(SMALL, slots, generation=2), addresses)
    assert renewed.generation == 2
    assert_equals_oracle(renewed, SMALL, (5,))
    renewed.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "other"}, "fingerprint is .* at expert group 0, 'other' at shard test"),
        ({"hidden_size": 128}, "hidden_size is 64 at expert group 0, 128 at shard test"),
        ({"rows_version": 9}, "rows_version is 1 at expert group 0, 9 at shard test"),
    ],
)
def test_a_shard_of_another_model_is_refused(
    groups: list[Peer], links: str, changes: dict[str, object], message: str
) -> None:
    _, addresses = serve(groups, SMALL, (8,))
    with pytest.raises(HandshakeRefused, match=message):
        connect(spec_of(SMALL, identity=replace(SMALL.identity, **changes)), spread(SMALL, (8,)), addresses)
    right = connect(spec_of(SMALL), spread(SMALL, (8,)), addresses)
    assert_equals_oracle(right, SMALL, (5,))
    right.close()


def test_swapped_addresses_are_refused(groups: list[Peer], links: str) -> None:
    _, addresses = serve(groups, SMALL, (4, 4))
    with pytest.raises(HandshakeRefused, match="group is 1 at expert group 1, 0 at shard test"):
        connect(spec_of(SMALL), spread(SMALL, (4, 4)), addresses[::-1])


def test_a_placement_over_other_groups_than_addresses_is_refused(groups: list[Peer], links: str) -> None:
    _, addresses = serve(groups, SMALL, (4, 4))
    with pytest.raises(TransportError, match="1 addresses for a placement over 2"):
        connect(spec_of(SMALL), spread(SMALL, (4, 4)), addresses[:1])


# ---- resources


THREADS_OF_A_GROUP = """
import ctypes, torch
from transport_peers import Model, spec_of, spread
from moeray.transport import GroupServer, connect
maps = open("/proc/self/maps").read().split()
openmp = ctypes.CDLL(next(word for word in maps if "libgomp" in word))
model, seen = Model(), []
placement = spread(model, (8,))
def compute(layer, x_TD, ids_TK):
    seen.append(openmp.omp_get_max_threads())
    return x_TD.new_zeros((int((ids_TK >= 0).sum()), x_TD.shape[1]))
torch.set_num_threads(7)  # neither the default nor the number of cores
server = GroupServer(compute, model.identity, positions={placement.generation: 0})
transport = connect(spec_of(model), placement, [server.start()])
transport.combine(transport.dispatch(0, *model.batch(3)))
transport.close()
print(seen)
"""


def test_a_group_computes_with_the_threads_its_process_has_set() -> None:
    """OpenMP keeps the count per thread, so a setting made where the weights were loaded does not reach the others."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS_OF_A_GROUP], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "[7]", done.stderr


def test_connecting_and_closing_leaks_neither_descriptors_nor_threads(groups: list[Peer], links: str) -> None:
    key, addresses = serve(groups, SMALL, (4, 4))

    def once() -> None:
        transport = connect(spec_of(SMALL), spread(SMALL, (4, 4)), addresses)
        assert_equals_oracle(transport, SMALL, (3,))
        transport.close()

    def settled() -> list[tuple[int, int]]:
        for peer in groups[:2]:
            assert eventually(lambda peer=peer: not peer.ask("shards", key))
        return [resources(), *(peer.ask("resources") for peer in groups[:2])]

    once()
    before = settled()
    for _ in range(20):
        once()
    after = before

    def no_more_than_before() -> bool:
        nonlocal after
        after = settled()
        return all(now[0] <= then[0] and now[1] <= then[1] for now, then in zip(after, before, strict=True))

    # A thread that has just ended may still be listed for a moment.
    assert eventually(no_more_than_before), (before, after)
