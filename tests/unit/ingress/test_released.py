"""Clients that were built against a released proto go on working."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from moeray.ingress.released import RELEASED, breaks, describe
from moeray.v1 import inference_pb2

CHAT, USAGE, SERVICE = "moeray.v1.ChatRequest", "moeray.v1.Usage", "moeray.v1.Inference"


def test_nothing_that_was_released_has_changed() -> None:
    assert breaks(json.loads(RELEASED.read_text()), describe(inference_pb2.DESCRIPTOR)) == []


def removed_field(proto: dict[str, Any]) -> None:
    del proto["messages"][CHAT]["5"]


def renamed_field(proto: dict[str, Any]) -> None:
    proto["messages"][CHAT]["5"] = proto["messages"][CHAT]["5"].replace("temperature", "heat")


def swapped_numbers(proto: dict[str, Any]) -> None:
    usage = proto["messages"][USAGE]
    usage["1"], usage["2"] = usage["2"], usage["1"]


def removed_message(proto: dict[str, Any]) -> None:
    del proto["messages"][USAGE]


def removed_method(proto: dict[str, Any]) -> None:
    del proto["services"][SERVICE]["Chat"]


def unary_made_streaming(proto: dict[str, Any]) -> None:
    methods = proto["services"][SERVICE]
    methods["Chat"] = methods["ChatStream"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (removed_field, f"{CHAT}.5: was optional type 1 temperature, is gone"),
        (renamed_field, f"{CHAT}.5"),
        (swapped_numbers, f"{USAGE}.1"),
        (removed_message, f"{USAGE}.3"),
        (removed_method, f"{SERVICE}.Chat"),
        (unary_made_streaming, f"{SERVICE}.Chat"),
    ],
)
def test_what_would_break_a_client_is_named(change: Callable[[dict[str, Any]], None], named: str) -> None:
    current = describe(inference_pb2.DESCRIPTOR)
    changed = copy.deepcopy(current)
    change(changed)
    assert named in "\n".join(breaks(current, changed))


def test_what_is_new_breaks_nobody() -> None:
    current = describe(inference_pb2.DESCRIPTOR)
    newer = copy.deepcopy(current)
    newer["messages"][CHAT]["999"] = "optional type 9 more"
    newer["services"][SERVICE]["More"] = "(a) -> (b)"
    assert breaks(current, newer) == []
