"""`moeray plan --calibrate`: the running cluster's times per step, and how far predictions are from them."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from http.client import HTTPException
from pathlib import Path
from typing import Any

from moeray.cli.chat import Identity, open_url
from moeray.cli.connection import cluster_state, ray_connection
from moeray.cli.errors import CommandError
from moeray.planning import Efficiency, Task, Topology
from moeray.planning.calibration import Compared, Measured, Setting, calibrate, compare

PROMPT = "What does an expert group do?"
SETTLE_S, WINDOW_S = 2.0, 6.0
"""Until every request decodes and the reports say so; and what is measured then."""
FIRST_TOKEN_S = 120.0
COUNTED = ("steps", "step_tokens", "at_us", "calls", "dispatch_us", "overlap_us", "combine_us")
FITTED = 3
"""Of the batches so many, the others are predicted only."""


def calibrate_cluster(
    task: Task,
    batches: Sequence[int],
    *,
    efficiency: Efficiency | None,
    identity: Identity,
    out: Path | None,
    as_json: bool,
) -> int:
    """Measure, find the numbers (unless `efficiency` gives them), print predictions beside what was measured.

    Args:
        batches: requests beside each other per shard.
        out: where to write the numbers that were found.
    """
    found = measure(task, batches, identity)
    setting = Setting(task.shape, task.formats, task.attention, task.experts, task.shared_cores)
    fitted: Sequence[Measured] = ()
    if efficiency is None:
        fitted = spread(found, FITTED)
        try:
            efficiency = calibrate(setting, fitted)
        except ValueError as error:
            hint = "run it with more --batches, on a cluster with experts.num_groups"
            raise CommandError(f"{error}: {hint}", status=2) from error
    compared = compare(setting, efficiency, found, fitted)
    print(json.dumps([asdict(each) for each in compared], indent=1) if as_json else table(compared))
    if out is not None:
        try:
            out.write_text(efficiency.to_json(), encoding="utf-8")
        except OSError as error:
            raise CommandError(f"{out}: cannot be written: {error.strerror}") from error
        print(f"written to {out}: moeray plan -f PLAN.YAML --efficiency {out}", file=sys.stderr)
    return 0


def measure(task: Task, batches: Sequence[int], identity: Identity) -> list[Measured]:
    """Each batch in the steady state.

    Raises:
        CommandError: there is no cluster, it has another model, or it does not decode.
    """
    found = []
    with ray_connection():
        state = cluster_state()
        if not state["endpoints"]:
            raise CommandError("no ingress is ready yet (`moeray status`)")
        if (layers := _layers(state)) and layers != task.shape.moe_layers:
            raise CommandError(
                f"model.config: {task.shape.name} has {task.shape.moe_layers} layers with experts, the cluster's "
                f"model {state['model']} has {layers}", status=2,
            )  # fmt: skip
        for number, batch in enumerate(batches):
            print(f"measuring {number + 1} of {len(batches)}: {batch} requests per shard", file=sys.stderr, flush=True)
            found.append(_measured(state, batch, identity))
    return found


def _layers(state: Mapping[str, Any]) -> int:
    return max((each["experts"]["num_layers"] for each in _processes(state, "expert_group")), default=0)


def _processes(state: Mapping[str, Any], role: str) -> list[Mapping[str, Any]]:
    key = "experts" if role == "expert_group" else "hop"
    return [each for each in state["processes"] if each["role"] == role and each["state"] == "ready" and each.get(key)]


def _measured(state: Mapping[str, Any], batch: int, identity: Identity) -> Measured:
    """What shards and groups count before and after a time in which all requests decode."""
    shards = len(_processes(state, "attention_shard"))
    if not shards:
        raise CommandError("no attention shard that is ready counts its steps; is the cluster up? (`moeray status`)")
    first = cluster_state()
    with _streams(state["endpoints"]["http"], state["model"], batch * shards, identity):
        time.sleep(SETTLE_S)
        before = cluster_state()
        time.sleep(WINDOW_S)
        after = cluster_state()
    return measured_between(first, before, after)


def measured_between(first: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> Measured:
    """Means over shards, and over groups, of what was counted between two states.

    Args:
        first: before the requests came, which says how long they are by now.
    Raises:
        CommandError: nothing was computed.
    """
    shards, groups = (
        _grown(before, after, role, part, names)
        for role, part, names in (
            ("attention_shard", "hop", COUNTED),
            ("expert_group", "experts", ("calls", "calls_us")),
        )
    )
    working = [each for each in shards if each["steps"] > 0]
    if not working:
        raise CommandError(
            "no shard has counted a step: either nothing is computed, or vLLM's workers are processes of their own "
            "(tensor_parallel_size), which count none"
        )
    steps, calls = sum(each["steps"] for each in working), sum(each["calls"] for each in working)
    apart = bool(groups)
    generated = [each["steps"] for each in _grown(first, after, "attention_shard", "hop", ("steps",))]
    group_calls = sum(each["calls"] for each in groups)
    waited = sum(each["dispatch_us"] + each["overlap_us"] + each["combine_us"] for each in working)
    return Measured(
        topology=Topology("split", len(shards), len(groups)) if apart else Topology("tensor", 1),
        tokens=sum(each["step_tokens"] for each in working) / steps,
        context=len(PROMPT.split()) + round(max(generated) - steps / len(working) / 2),
        step=sum(each["at_us"] for each in working) / steps,
        call=waited / calls if apart and calls else 0.0,
        shared=sum(each["overlap_us"] for each in working) / calls if apart and calls else 0.0,
        expert=sum(each["calls_us"] for each in groups) / group_calls if group_calls else 0.0,
    )


def _grown(
    before: Mapping[str, Any], after: Mapping[str, Any], role: str, part: str, names: Sequence[str]
) -> list[dict[str, float]]:
    """By how much each process' counters have grown; of those that are in both."""
    known = {each["id"]: each[part] for each in _processes(before, role)}
    return [
        {name: each[part].get(name, 0) - known[each["id"]].get(name, 0) for name in names}
        for each in _processes(after, role)
        if each["id"] in known
    ]


@contextmanager
def _streams(url: str, model: str, number: int, identity: Identity) -> Iterator[None]:
    """So many answers without an end, read and forgotten; they all have begun when the block begins.

    Raises:
        CommandError: not all had a first token in time.
    """
    begun, stop = [threading.Event() for _ in range(number)], threading.Event()
    body = {
        "model": model, "prompt": PROMPT, "max_tokens": 3000, "temperature": 0, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    refused: list[str] = []

    def read(mine: threading.Event) -> None:
        try:
            with open_url(f"{url}/v1/completions", identity, json.dumps(body).encode()) as answer:
                for line in answer:
                    if line.startswith(b"data:"):
                        mine.set()
                    if stop.is_set():
                        return
        except (OSError, HTTPException, CommandError) as error:
            refused.append(str(error))

    threads = [threading.Thread(target=read, args=(each,), daemon=True) for each in begun]
    for thread in threads:
        thread.start()
    try:
        until = time.monotonic() + FIRST_TOKEN_S
        while not all(each.is_set() for each in begun):
            if refused or time.monotonic() > until:
                why = refused[0] if refused else f"{FIRST_TOKEN_S:g} s have passed"
                raise CommandError(f"not all of {number} requests had a first token: {why}")
            time.sleep(0.1)
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(5.0)


def spread(found: Sequence[Measured], number: int) -> list[Measured]:
    """The smallest, the largest, and those between, evenly."""
    ordered = sorted(found, key=lambda each: each.tokens)
    if len(ordered) <= number:
        return ordered
    return [ordered[round(place * (len(ordered) - 1) / (number - 1))] for place in range(number)]


def table(compared: Sequence[Compared]) -> str:
    """A line per batch (a layer call is the hop with what it waits for), and the largest error of what was not used."""
    lines = [
        "topology      tokens  context  layer call  shared  experts  step measured  predicted   error",
        "                                       us      us       us",
    ]
    for each in compared:
        measured, note = each.measured, "  (fitted)" if each.is_fitted else ""
        size = f"{measured.topology.name:12}  {measured.tokens:6.1f}  {measured.context:7d}"
        size += f"  {measured.call:10.0f}  {measured.shared:6.0f}  {measured.expert:7.0f}"
        times = f"{measured.step / 1e3:10.2f} ms  {each.predicted.total / 1e3:6.2f} ms"
        lines.append(f"{size}  {times}  {100 * each.error:+5.1f} %{note}")
    rest = [abs(each.error) for each in compared if not each.is_fitted]
    if rest:
        lines.append(f"largest error of those that were predicted only: {100 * max(rest):.1f} %")
    return "\n".join(lines)
