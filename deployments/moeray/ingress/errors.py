"""Typed errors of the ingress, and OpenAI errors as gRPC statuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message

_DETAILS, _PUSHBACK = "grpc-status-details-bin", "grpc-retry-pushback-ms"
REQUEST_ID = "x-request-id"
"""HTTP header, and gRPC metadata: what a client calls its request."""
_BY_HTTP = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    409: grpc.StatusCode.ABORTED,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
MAX_MESSAGE_CHARS = 2000
"""gRPC carries the text in a header, which proxies limit."""


class IngressError(RuntimeError):
    """Base of what keeps an ingress from starting."""


class PortInUse(IngressError):
    """Names the port and the configuration key that sets it."""

    def __init__(self, key: str, host: str, port: int, reason: str) -> None:
        super().__init__(f"{key}: cannot listen on {host}:{port}: {reason}; choose another port or stop what uses it")
        self.key, self.host, self.port = key, host, port


class BadCertificate(IngressError):
    """Names the configuration key and the file."""

    def __init__(self, key: str, path: str, reason: str) -> None:
        super().__init__(f"{key}: {path}: {reason}")
        self.key, self.path = key, path


async def abort(
    context: grpc.aio.ServicerContext[Any, Any],
    error: Mapping[str, Any],
    retry_after_s: int | None = 1,
    *,
    limit: str = "",
) -> NoReturn:
    """End a call with an OpenAI error object: `{"message", "type", "param", "code"}`, code being the HTTP status.

    Args:
        retry_after_s: when another try is worth it, told with codes that mean so; None if never.
        limit: of the tenant, that was reached.
    """
    code = _BY_HTTP.get(int(error.get("code") or 500), grpc.StatusCode.INTERNAL)
    message = str(error.get("message", ""))[:MAX_MESSAGE_CHARS]
    details: list[Message] = []
    names_field = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED)
    if code is grpc.StatusCode.INVALID_ARGUMENT or (error.get("param") and code in names_field):
        field = error_details_pb2.BadRequest.FieldViolation(field=error.get("param") or "", description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[field]))
    trailing: list[tuple[str, str | bytes]] = list(context.trailing_metadata() or ())
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
        if retry_after_s is not None:
            details.append(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=retry_after_s)))
        # What a client's gRPC with a retry policy obeys; -1: do not try again. At 0, grpcio 1.85 never does.
        trailing.append((_PUSHBACK, str(-1 if retry_after_s is None else max(retry_after_s * 1000, 1))))
    if limit:
        violation = error_details_pb2.QuotaFailure.Violation(subject=limit, description=message)
        details.append(error_details_pb2.QuotaFailure(violations=[violation]))
    details += [error_details_pb2.RequestInfo(request_id=value) for name, value in trailing if name == REQUEST_ID]
    status = status_pb2.Status(code=code_pb2.Code.Value(code.name), message=message)
    for detail in details:
        status.details.add().Pack(detail)
    context.set_trailing_metadata((*trailing, (_DETAILS, status.SerializeToString())))
    await context.abort(code, message)
    raise AssertionError("abort returned")
