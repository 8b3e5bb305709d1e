"""`hop.py --network`: the hop between two nodes, beside a plain TCP exchange of the same bytes over the same link."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import records
from contenders import Case, Contender, LayerCalls
from far_end import Answerer
from floors import GlooFloor, SocketFloor
from hop import Effort, describe, record_of, rounds_of
from pinned import Process, pin, two_cores
from two_nodes import Link, TwoNodes, link_missing, missing, two_nodes

LINKS = {
    "veth": Link(),
    "forwarded": Link(forwarded=True),
    "1 ms": Link(delay_ms=1),
    "5 ms": Link(delay_ms=5),
    "1 ms, 1 % lost": Link(delay_ms=1, loss_percent=1),
}
"""Delays are of one direction. `forwarded` is what the process that delays costs when it does not."""
BATCHES, HIDDENS = (1, 8, 32, 128), (1024, 4096)
QUICK, THOROUGH = Effort(5, 0.2, min_calls=10, max_calls=500), Effort(5, 0.5, min_calls=20, max_calls=500)


class Unavailable(SystemExit):
    """This machine cannot show two nodes."""


def measure(quick: bool) -> list[records.Record]:
    """Every link that this machine can make.

    Raises:
        Unavailable: none.
    """
    reason = missing()
    if reason is not None:
        raise Unavailable(reason)
    found: list[records.Record] = []
    shard_core, group_core = two_cores()
    pin([shard_core])
    for name, link in LINKS.items():
        reason = link_missing(link)
        if reason is not None:
            print(f"{name}: not measured: {reason}", flush=True)
            continue
        with two_nodes(link) as nodes:
            print(f"link {name} ({nodes.how})", flush=True)
            for hidden in HIDDENS[:1] if quick else HIDDENS:
                with _contenders(nodes, hidden, group_core) as contenders:
                    for batch in BATCHES:
                        timed = rounds_of(contenders, Case(batch, hidden), QUICK if quick else THOROUGH)
                        keys = {"link": name, "made_by": nodes.how}
                        for transport, floor in (("gloo", "tcp"), ("gloo_p2p", "tcp"), ("tcp", "tcp")):
                            found.append(record_of(transport, floor, Case(batch, hidden), timed, **keys))
                            print(describe(found[-1]), flush=True)
    return found


@contextlib.contextmanager
def _contenders(nodes: TwoNodes, hidden: int, core: int) -> Iterator[list[Contender]]:
    """This process is on node a for as long as the context lasts, the far ends are on node b."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(nodes.a.inside())
        ends = []
        for _ in range(3):
            ends.append(Process(Answerer, [core]))
            stack.callback(ends[-1].end)
            ends[-1].ask("enter", nodes.b)
        a, b = nodes.a.host, nodes.b.host
        address = ends[2].ask("serve", hidden, b)
        contenders: list[Contender] = [
            SocketFloor(ends[0], b, source=a),
            GlooFloor(ends[1], a, b),
            LayerCalls.to_group("gloo", hidden, address, host=a, backend="gloo"),
        ]
        for contender in contenders:
            stack.callback(contender.close)
        yield contenders
