"""gRPC calls at the door: counted and named. A server that stops takes none by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import grpc

from moeray.ingress.arrivals import Arrival, Arrivals, checked_request_id
from moeray.ingress.errors import REQUEST_ID, abort
from moeray.ingress.grpc_calls import AroundCalls, Context, Handler
from moeray.vllm_hooks.admission import Refused
from moeray.vllm_hooks.openai_app import refusal


class GrpcArrivals(AroundCalls):
    """Stands before everything else that looks at a call of `service`."""

    def __init__(self, service: str, arrivals: Arrivals) -> None:
        self._prefix, self._arrivals = f"/{service}/", arrivals

    def is_for(self, method: str, _: Handler) -> bool:
        return method.startswith(self._prefix)

    @asynccontextmanager
    async def around(self, method: str, _: Any, context: Context) -> AsyncIterator[None]:
        arrival = Arrival("grpc", method.removeprefix(self._prefix), grpc.StatusCode.CANCELLED.name)
        with self._arrivals.counted(arrival):
            try:
                await _name(context)
                with self._arrivals.taken():
                    yield
            except Exception:
                arrival.code = _code(context, grpc.StatusCode.UNKNOWN)
                raise
            arrival.code = _code(context, grpc.StatusCode.OK)


def _code(context: Context, otherwise: grpc.StatusCode) -> str:
    """What the call is answered with."""
    given = context.code()
    if isinstance(given, int):
        given = next((each for each in grpc.StatusCode if each.value[0] == given), None)
    name: str = (given if given not in (None, grpc.StatusCode.OK) else otherwise).name
    return name


def given_id(context: Context) -> str | None:
    """What the client calls this call, None if nothing."""
    return next((value for name, value in context.invocation_metadata() or () if name == REQUEST_ID), None)


async def _name(context: Context) -> None:
    """Every answer carries the call's name, in its trailing metadata: sent first, it would forbid the client's gRPC to
    try again by itself.
    """
    try:
        given = given_id(context)
        context.set_trailing_metadata(((REQUEST_ID, uuid4().hex if given is None else checked_request_id(given)),))
    except Refused as error:
        await abort(context, refusal(error)["error"])
