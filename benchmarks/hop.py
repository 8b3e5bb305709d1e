"""What one layer call costs on the hop, beside what the bytes alone cost.

    python benchmarks/hop.py [--quick] [--json FILE] [--network]

Shard and group are pinned to a core each; the group answers with rows that are ready, so that the hop is all there is.
In every round all transports and floors take their turn, so that they see the same noise.

`p50_us` and `p99_us` are of the time in which the bytes are on their way: from the end of packing until the last row
is there, which is what a floor does. `call_us` is the p50 of the whole layer call, packing and reduction included, and
`stages_us` are its parts. All are medians over the rounds; `ratio` is the median of the rounds' ratios to the floor
(`call_ratio`: of the whole call to the floor), `ratio_min` and `ratio_max` its noise. `local` has no way: its time is
that of the whole call. The floors are described in floors.py.

`--network` measures between two network namespaces instead, over links of given delay and loss (two_nodes.py says what
such a link is); it needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, perf_counter_ns, sleep
from typing import Any

import plots
import records
import torch
from contenders import Case, Contender, LayerCalls
from far_end import Answerer
from floors import GlooFloor, MemcpyFloor, SocketFloor
from pinned import Process, pin, two_cores

from moeray.config import ClusterTlsConfig
from moeray.vllm_hooks.settings import SPIN_S

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from certificates import cluster_certificate

BATCHES, HIDDENS = (1, 8, 32, 128), (256, 1024, 4096)
TRANSPORTS: dict[str, dict[str, Any]] = {
    "channel": {"backend": "gloo", "channel": "same_user", "spin_s": SPIN_S},
    "channel_sleeping": {"backend": "gloo", "channel": "same_user"},
    "gloo": {"backend": "gloo", "channel": "off"},
    "tls": {"backend": "gloo", "channel": "off"},
}
"""Fields of `TransportSpec`; `channel` as a shard with a core of its own has it, `channel_sleeping` on a shared one."""
FLOOR_OF = {
    "channel": "socket", "channel_sleeping": "socket", "gloo": "gloo_p2p", "tls": "gloo_p2p", "local": "memcpy",
    "gloo_p2p": "socket", "socket": "socket",
}  # fmt: skip
WARM_UP = 20


@dataclass(frozen=True)
class Effort:
    """How long one contender is timed, and how often."""

    rounds: int
    round_s: float
    min_calls: int = 30
    max_calls: int = 2000


QUICK, THOROUGH = Effort(5, 0.05), Effort(9, 0.25)


@dataclass
class Timed:
    """Per round: p50 and p99 of the way in microseconds, p50 of the whole call, and the stages."""

    p50: list[float] = field(default_factory=list)
    call_p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    stages: list[dict[str, float]] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds (under three minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there, facts and plot beside it")
    parser.add_argument("--network", action="store_true", help="between two network namespaces")
    parser.add_argument("--gap-us", type=float, default=0.0, help="pause before every call, as an engine makes one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    effort = QUICK if options.quick else THOROUGH
    if options.network:
        import network

        found = network.measure(options.quick)
    else:
        found = measure(effort, options.gap_us)
    if options.json:
        records.write(options.json, found, rounds=effort.rounds, gap_us=options.gap_us)
        if not options.network:
            plots.hop(found, options.json.with_suffix(".svg"))


def measure(effort: Effort, gap_us: float) -> list[records.Record]:
    """Every batch and width over every transport of this machine."""
    found: list[records.Record] = []
    shard_core, group_core = two_cores()
    pin([shard_core])
    print(f"shard on core {shard_core}, group on core {group_core}", flush=True)
    for hidden in HIDDENS:
        with contenders_of(hidden, group_core) as contenders:
            for batch in BATCHES:
                case = Case(batch, hidden)
                timed = rounds_of(contenders, case, effort, gap_us)
                new = [record_of(name, FLOOR_OF[name], case, timed) for name in FLOOR_OF if name in timed]
                print("\n".join(map(describe, new)), flush=True)
                found += new
    return found


@contextlib.contextmanager
def contenders_of(hidden: int, core: int) -> Iterator[list[Contender]]:
    """Each with a far end in a process of its own, so that none has another one's threads beside it."""
    with contextlib.ExitStack() as stack:

        def far_end() -> Process:
            process = Process(Answerer, [core])
            stack.callback(process.end)
            return process

        ends = {name: far_end() for name in ("socket", "gloo_p2p", *TRANSPORTS)}
        local = "127.0.0.1"
        contenders: list[Contender] = [
            MemcpyFloor(),
            SocketFloor(ends["socket"]),
            GlooFloor(ends["gloo_p2p"], local, local),
            LayerCalls.local(hidden),
        ]
        certificate = cluster_certificate(Path(stack.enter_context(TemporaryDirectory())))
        for name, spec in TRANSPORTS.items():
            tls = certificate if name == "tls" else ClusterTlsConfig()
            address = ends[name].ask("serve", hidden, local, tls)
            contenders.append(LayerCalls.to_group(name, hidden, address, tls=tls, **spec))
        for contender in contenders:
            stack.callback(contender.close)
        yield contenders


def rounds_of(contenders: Sequence[Contender], case: Case, effort: Effort, gap_us: float = 0.0) -> dict[str, Timed]:
    """Time all of them in turn, round after round."""
    calls = {each.name: _calls_in(each, case, effort) for each in contenders}
    timed = {each.name: Timed() for each in contenders}
    for _ in range(effort.rounds):
        for each in contenders:
            ways, wholes = time_calls(each, case, calls[each.name], gap_us)
            found = timed[each.name]
            found.p50.append(statistics.median(ways))
            found.p99.append(records.percentile(ways, 99))
            found.call_p50.append(statistics.median(wholes))
            found.stages.append(each.stages())
    return timed


def time_calls(contender: Contender, case: Case, calls: int, gap_us: float = 0.0) -> tuple[list[float], list[float]]:
    """Microseconds of each call: its bytes on their way, and the whole of it."""
    ways, wholes = [], []
    contender.begin(case, calls)
    for _ in range(calls):
        if gap_us:
            sleep(gap_us / 1e6)
        started = perf_counter_ns()
        way_ns = contender.call()
        wholes.append((perf_counter_ns() - started) / 1e3)  # the reading of the stages included: 2 us
        ways.append(way_ns / 1e3)
    contender.end()
    return ways, wholes


def _calls_in(contender: Contender, case: Case, effort: Effort) -> int:
    started = perf_counter()
    time_calls(contender, case, WARM_UP)
    one_s = (perf_counter() - started) / WARM_UP
    return max(effort.min_calls, min(effort.max_calls, int(effort.round_s / one_s)))


def record_of(name: str, floor: str, case: Case, timed: dict[str, Timed], **keys: Any) -> records.Record:
    """One line of the result; the stages are medians over the rounds."""
    own, base = timed[name], timed[floor]
    stages = {
        stage: round(statistics.median(each[stage] for each in own.stages), 1)
        for stage in own.stages[0]
        if stage != "shared"  # nothing runs between dispatch and combine here
    }
    return {
        "transport": name,
        "batch": case.batch,
        "hidden": case.hidden,
        "p50_us": round(statistics.median(own.p50), 1),
        "p99_us": round(statistics.median(own.p99), 1),
        "floor_us": round(statistics.median(base.p50), 1),
        **records.spread([ours / theirs for ours, theirs in zip(own.p50, base.p50, strict=True)]),
        "floor": floor,
        "call_us": round(statistics.median(own.call_p50), 1),
        "call_ratio": round(statistics.median(a / b for a, b in zip(own.call_p50, base.p50, strict=True)), 3),
        "stages_us": stages,
        **keys,
    }


def describe(record: records.Record) -> str:
    stages = ", ".join(f"{name} {value:.0f}" for name, value in record["stages_us"].items())
    return (
        f"{record['transport']:>8} hidden {record['hidden']:4} batch {record['batch']:3}: "
        f"p50 {record['p50_us']:8.1f} p99 {record['p99_us']:8.1f} us, {record['ratio']:6.2f} x {record['floor']}"
        f" ({record['ratio_min']:.2f}..{record['ratio_max']:.2f})"
        + (f"; whole call {record['call_us']:.0f}: {stages}" if stages else "")
    )


if __name__ == "__main__":
    main()
