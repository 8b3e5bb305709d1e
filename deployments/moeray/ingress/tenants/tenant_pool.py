"""The shard pool as tenants see it: no request without a tenant, each by its limits, its share and its own cache."""

from __future__ import annotations

from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING

from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest

from moeray.ingress.tenants.call import TenantPlace, current_call
from moeray.vllm_hooks.admission import Need, Place, Refused, place_being_filled
from moeray.vllm_hooks.engine_core import RequestFailed, RequestPool

if TYPE_CHECKING:
    from moeray.ingress.tenants.tenants import Tenants


class TenantPool:
    """A `RequestPool` in front of another one. Single event loop."""

    def __init__(self, pool: RequestPool, tenants: Tenants) -> None:
        self._pool, self._tenants = pool, tenants
        self._places: dict[str, TenantPlace] = {}

    def check_ready(self) -> None:
        self._pool.check_ready()

    def admit(self, need: Need) -> Place:
        """As the pool's; also Refused: 401 without a tenant, 403 for what it may not have."""
        call = current_call()
        if call is None:  # a way in that has no door: closed
            raise Refused("nobody showed who asks for this", HTTPStatus.UNAUTHORIZED)
        call.check(need)
        own = replace(
            need,
            priority=self._tenants.priority(call.tenant, need),
            cache_salt=self._tenants.salt(call.tenant, need.cache_salt),
        )
        try:
            inner = self._pool.admit(own)
        except BaseException:
            self._tenants.give_back_share(call.tenant, own)
            raise
        return call.add(TenantPlace(inner, call, own))

    async def add(self, request: EngineCoreRequest) -> None:
        place = place_being_filled()
        if isinstance(place, TenantPlace):
            self._places[request.request_id] = place
        await self._pool.add(request)

    async def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._places.pop(request_id, None)
        await self._pool.abort(request_ids)

    async def next_event(self) -> EngineCoreOutputs | RequestFailed:
        event = await self._pool.next_event()
        if isinstance(event, RequestFailed):
            self._places.pop(event.request_id, None)
            return event
        for output in event.outputs:
            if (place := self._places.get(output.request_id)) is not None:
                place.record(output)
                if output.finish_reason is not None:
                    del self._places[output.request_id]
        return event
