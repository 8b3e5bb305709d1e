"""The words between ingress and shard."""

from __future__ import annotations

import msgspec
import pytest

from moeray.attention_shard import link as wire

OURS = wire.Hello(wire.PROTOCOL_VERSION, "0.32.0", "abc/2048", "attention shard s0")


@pytest.mark.parametrize(
    ("field", "value"), [("protocol", wire.PROTOCOL_VERSION + 1), ("vllm", "0.31.0"), ("model", "abd/2048")]
)
def test_a_mismatch_names_the_field_and_both_sides(field: str, value: object) -> None:
    theirs = msgspec.structs.replace(OURS, name="ingress i0", **{field: value})

    why = wire.mismatch(OURS, theirs)

    assert why is not None
    for part in (field, "attention shard s0", "ingress i0", str(value), str(getattr(OURS, field))):
        assert part in why


def test_names_may_differ() -> None:
    assert wire.mismatch(OURS, msgspec.structs.replace(OURS, name="ingress i0")) is None


@pytest.mark.parametrize("frame", [OURS, wire.Add([b"a", b""]), wire.Abort(["r1", "r2"])])
def test_frames_to_the_shard_survive_the_wire(frame: wire.ToShard) -> None:
    assert wire.decode_to_shard(wire.encode(frame)) == frame


@pytest.mark.parametrize(
    "frame", [OURS, wire.Outputs([b"x"]), wire.Failed(["r"], wire.ENGINE_DEAD, "why"), wire.Draining("why")]
)
def test_frames_from_the_shard_survive_the_wire(frame: wire.FromShard) -> None:
    assert wire.decode_from_shard(wire.encode(frame)) == frame


def test_a_frame_of_the_other_direction_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        wire.decode_to_shard(wire.encode(wire.Outputs([b"x"])))
