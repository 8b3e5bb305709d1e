"""How an ingress stops: nothing new comes, what is there is answered, what takes too long is told so.

At once: not ready, no new connections (another ingress of this node takes them, if there is one), GOAWAY to gRPC's
clients, and `Connection: close` on every HTTP answer that begins. A connection that has asked nothing yet has SETTLE_S
to do it; what comes later is refused (503). Idle connections close. Streams end by themselves within the drain time;
the others get an error that says why and that another try is worth it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grpc
    from grpc_health.v1 import health

    from moeray.ingress.arrivals import Arrivals
    from moeray.ingress.http_server import HttpServer
    from moeray.ingress.shard_pool import ShardPool

logger = logging.getLogger(__name__)

SETTLE_S, SETTLE_STEP_S = 5.0, 0.02
SEEN_S = 0.2
"""Until the loop has made a connection of every one that it has accepted."""
FLUSH_S = 2.0
"""How long an answer that is complete may take to its client."""


async def drain(
    arrivals: Arrivals,
    pool: ShardPool,
    drain_s: float,
    *,
    http: HttpServer | None,
    grpc_server: grpc.aio.Server | None,
    health: health.aio.HealthServicer | None,
) -> None:
    """Returns when both servers have ended; whatever of them has not begun is None."""
    loop = asyncio.get_running_loop()
    ends = loop.time() + drain_s
    arrivals.leave()
    if health is not None:
        await health.enter_graceful_shutdown()
    grpc_end = None
    if grpc_server is not None:  # its own time must not run out before ours: it ends streams without a word
        grpc_end = asyncio.create_task(grpc_server.stop(drain_s + 2 * FLUSH_S))
    if http is not None:
        http.leave()
        settled = loop.time() + min(SETTLE_S, drain_s)
        seen = loop.time() + min(SEEN_S, drain_s)
        while loop.time() < seen or (http.num_unasked and loop.time() < settled):
            await asyncio.sleep(SETTLE_STEP_S)
        arrivals.close()
        http.close_idle()
    if not await arrivals.all_answered(max(ends - loop.time(), 0.0)):
        logger.warning("%d requests did not end within %g s; they are told so", arrivals.num_in_hand, drain_s)
    arrivals.close()
    await pool.close()
    await arrivals.all_answered(FLUSH_S)
    if http is not None:
        await http.end(FLUSH_S)
    if grpc_server is not None and grpc_end is not None:
        await grpc_server.stop(None)
        await grpc_end
