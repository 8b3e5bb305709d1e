"""The worker's end of the route feed: new routes come in beside the engine's steps, and accusations go out.

EngineCore answers calls only between steps, and a step that waits for a lost expert does not end. So routes come over
a connection of their own, an AF_UNIX socket of the shard process (attention_shard/routes.py), read by a thread of
their own. The wire is one JSON object per line:

    shard process -> worker   {"route": Route, "number": n}
                              {"row_servers": {number: address}}, those of Engram that are there
    worker -> shard process   {"number": n, "generation": g} when the hop has moved, with "error" instead if it cannot
                              {"accuse": group id, "reason": text, "charge": Charge}
                              {"waiting": bool}: whether a layer call waits for experts, or Engram rows, that nobody has
"""

from __future__ import annotations

import json
import logging
import queue
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moeray.membership import Charge
from moeray.transport.errors import TransportError
from moeray.vllm_hooks.hop import HEAL_S, Hop
from moeray.vllm_hooks.route import Route

logger = logging.getLogger(__name__)


class RouteFeed:
    """Reads routes in one thread, moves the hops in another: a route that cannot be reached must not hide the next."""

    def __init__(
        self,
        address: str,
        hops: Callable[[], Sequence[Hop]],
        on_row_servers: Callable[[Mapping[int, str]], None] = lambda _: None,
    ) -> None:
        """Connect and start.

        Args:
            address: abstract AF_UNIX name of the shard process' listener.
            hops: those that are to follow, at this moment.
            on_row_servers: told where the row servers are; in the reading thread, so it must not wait.
        Raises:
            OSError: nobody listens there.
        """
        self._hops, self._on_row_servers = hops, on_row_servers
        self._routes: queue.Queue[tuple[int, Route] | None] = queue.Queue()
        self._sending = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(f"\0{address}")
        for work in (self._read, self._follow):
            threading.Thread(target=work, name=f"moeray-route{work.__name__}", daemon=True).start()

    def accuse(self, group_id: str, reason: str, charge: Charge) -> None:
        """See `hop.Accuse`; never blocks for long, never raises."""
        self._say({"accuse": group_id, "reason": reason, "charge": charge})

    def waiting(self, waits: bool) -> None:
        """See `hop.OnWaiting`; never blocks for long, never raises."""
        self._say({"waiting": waits})

    def close(self) -> None:
        """Both threads end; idempotent."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def _read(self) -> None:
        last: Route | None = None
        try:
            with self._socket.makefile("rb") as lines:
                for line in lines:
                    data = json.loads(line)
                    if "row_servers" in data:
                        self._on_row_servers({int(number): each for number, each in data["row_servers"].items()})
                        continue
                    route = _same(Route.from_json(data["route"]), last)
                    last = route
                    for each in self._hops():
                        each.announce(route)
                    self._routes.put((int(data["number"]), route))
        except Exception:  # whatever it was, the next line may be as bad
            logger.exception("route feed: ends")
        finally:
            self.close()  # the shard process must not believe that this worker follows routes
            self._routes.put(None)

    def _follow(self) -> None:
        while True:
            try:
                item = self._routes.get(timeout=HEAL_S)
            except queue.Empty:
                self._heal()
                continue
            if item is None:
                return
            number, route = item
            if self._routes.empty():  # otherwise a newer one is here already
                self._say({"number": number, **self._move(route)})

    def _move(self, route: Route) -> dict[str, Any]:
        try:
            for each in self._hops():
                each.follow(route)
        except TransportError as error:
            return {"error": str(error)}
        except Exception as error:  # the thread must live: a later route may be better
            logger.exception("route feed: generation %d", route.generation)
            return {"error": f"{type(error).__name__}: {error}"}
        moved = [each.route is route for each in self._hops()]
        return {"generation": route.generation} if all(moved) else {"error": "a newer route has come"}

    def _heal(self) -> None:
        for each in self._hops():
            try:
                each.heal()
            except TransportError as error:
                logger.info("still left out: %s", error)
            except Exception:  # the thread must live, as in `_move`
                logger.exception("route feed: trying groups again that were left out")

    def _say(self, message: dict[str, Any]) -> None:
        try:
            with self._sending:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            logger.warning("route feed: %s was not told: %s", message, error)


def _same(route: Route, last: Route | None) -> Route:
    """The last one, if it says the same: then there is nothing to move to."""
    return last if last is not None and route == last else route
