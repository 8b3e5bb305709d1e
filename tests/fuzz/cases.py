"""What is sent: requests made from the served OpenAPI document and the proto's descriptors, and bytes that are neither.

Each case is one request and one check (`Judge.saw`).
"""

from __future__ import annotations

import json
import socket
from typing import Any

import grpc
from front_process import MODEL, chat
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.rpc import status_pb2
from hypothesis import strategies as st
from judge import ANSWER_S
from target import Target

from moeray.v1 import inference_pb2 as pb

TOKENS = [
    "<|User|>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜begin▁of▁sentence｜>",
    "<think>",
    "</think>",
    "<｜DSML｜function_calls>",
    "\x00",
]
_texts = st.text(max_size=40) | st.sampled_from(
    [*TOKENS, "(a+)+$", "{" * 50, "%s%n", "../../etc/passwd", "a" * 5000, "\ud800"]
)
_numbers = st.integers() | st.floats() | st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**30, 1e308])
_json = st.recursive(
    st.none() | st.booleans() | _numbers | _texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4),
    max_leaves=8,
)
_crowds = st.sampled_from(
    [[{}] * 3_000, [{}] * 20_000, [0] * 50_000, [["a"]] * 9_000, dict.fromkeys(map(str, range(9_000)), 1)]
)
"""More of something than anybody means to send."""
BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": chat(max_tokens=2),
    "/v1/completions": {"model": MODEL, "prompt": "hi", "max_tokens": 2},
    "/v1/responses": {"model": MODEL, "input": "hi", "max_output_tokens": 2, "store": False},
    "/v1/messages": {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/messages/count_tokens": {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]},
    "/tokenize": {"model": MODEL, "prompt": "hi"},
    "/detokenize": {"model": MODEL, "tokens": [1, 2]},
}
BOUNDED = {"max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of", "min_tokens"}
"""Left small: a case must end."""


def json_bodies(document: dict[str, Any]) -> st.SearchStrategy[tuple[str, bytes]]:
    """(path, body): a valid request of which the document's own fields hold something else."""
    paths = [path for path in BASES if path in document["paths"]]
    return st.sampled_from(paths).flatmap(lambda path: _changed(path, document))


def _changed(path: str, document: dict[str, Any]) -> st.SearchStrategy[tuple[str, bytes]]:
    content = document["paths"][path]["post"].get("requestBody", {}).get("content", {})
    schema = _resolved(content.get("application/json", {}).get("schema", {}), document)
    options = [_resolved(each, document) for each in schema.get("anyOf", [schema])]
    fields = {name: field for each in options for name, field in each.get("properties", {}).items()} or BASES[path]
    changes = st.lists(
        st.sampled_from(sorted(fields)).flatmap(lambda name: _value(name, fields[name], document)),
        min_size=1,
        max_size=3,
    )
    return changes.map(lambda pairs: (path, json.dumps(BASES[path] | dict(pairs)).encode()))


def _value(name: str, field: Any, document: dict[str, Any]) -> st.SearchStrategy[tuple[str, Any]]:
    fitting = _fitting(field, document, 3) if isinstance(field, dict) else _json
    values = st.integers(-2, 4) | _texts if name in BOUNDED else fitting | _json
    return st.tuples(st.just(name), st.integers(0, 19).flatmap(lambda number: values if number else _crowds))


def _fitting(schema: dict[str, Any], document: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
    """Values that the schema may take, more or less."""
    schema = _resolved(schema, document)
    if depth == 0:
        return _json
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return st.one_of(*(_fitting(each, document, depth - 1) for each in schema[key][:12]))
    kind = schema.get("type")
    if kind == "array":
        return st.lists(_fitting(schema.get("items", {}), document, depth - 1), max_size=3)
    if kind == "object" and schema.get("properties"):
        required = set(schema.get("required", ()))
        parts = {name: _fitting(each, document, depth - 1) for name, each in schema["properties"].items()}
        return st.fixed_dictionaries(
            {name: parts[name] for name in parts if name in required},
            optional={name: parts[name] for name in parts if name not in required},
        )
    simple = {"string": _texts, "integer": _numbers, "number": _numbers, "boolean": st.booleans(), "null": st.none()}
    return simple.get(str(kind), _json)


def _resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def send_json(target: Target, path: str, body: bytes) -> None:
    connection, kind = target.connection(), f"json {path}"
    try:
        connection.request("POST", path, body, {**target.headers, "content-type": "application/json"})
        answer = connection.getresponse()
        got = answer.read() + str(answer.headers).encode()
    except TimeoutError:
        target.judge.hung(kind)
    finally:
        connection.close()
    target.judge.saw(kind, str(answer.status), got)


@st.composite
def batches(draw: st.DrawFn) -> tuple[bytes, dict[str, Any], bool]:
    """(input file, the batch but for its file's id, whether the file is deleted before its turn)."""
    path = draw(st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/responses"]))
    line = {"custom_id": "a", "method": "POST", "url": path, "body": BASES[path]}
    changed = st.dictionaries(st.sampled_from(sorted(line)), _json, max_size=2).map(lambda change: line | change)
    whole = st.lists(changed, max_size=3).map(lambda lines: b"\n".join(json.dumps(each).encode() for each in lines))
    content = draw(whole | st.binary(max_size=200) | st.sampled_from([b"{" * 9_000, b'{"body":{"a":' + b"[" * 9_000]))
    endpoint = draw(st.sampled_from([path, path, "/v1/models", ""]))
    asked = {"endpoint": endpoint, "completion_window": "24h"} | draw(st.dictionaries(_texts, _json, max_size=1))
    return content, asked, draw(st.booleans())


def send_batch(target: Target, content: bytes, asked: dict[str, Any], is_deleted: bool) -> None:
    """Upload, start, perhaps delete the file, cancel: whatever came of it, no batch may be left in the end."""
    form = b'--a\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    body = form % (b"purpose", b"", b"batch") + form % (b"file", b'; filename="a"', content) + b"--a--\r\n"
    stored = _ask(target, "POST", "/v1/files", body, "multipart/form-data; boundary=a")
    if stored is None:
        return
    started = _ask(target, "POST", "/v1/batches", json.dumps(asked | {"input_file_id": stored["id"]}).encode())
    if is_deleted:
        _ask(target, "DELETE", f"/v1/files/{stored['id']}")
    if started is not None:
        _ask(target, "POST", f"/v1/batches/{started['id']}/cancel")


def _ask(target: Target, method: str, path: str, body: bytes = b"", form: str = "application/json") -> Any:
    """The answer, judged; None if it is a refusal."""
    connection, kind = target.connection(), f"batch {'/'.join(path.split('/')[:3])} {method}"
    try:
        connection.request(method, path, body, {**target.headers, "content-type": form})
        answer = connection.getresponse()
        got = answer.read()
    except TimeoutError:
        target.judge.hung(kind)
    finally:
        connection.close()
    target.judge.saw(kind, str(answer.status), got + str(answer.headers).encode())
    return json.loads(got) if answer.status == 200 else None


def _head(request_line: bytes, key: str, body: bytes, *more: bytes) -> bytes:
    lines = [
        request_line, b"host: a", b"connection: close", b"authorization: Bearer " + key.encode(),
        b"content-type: application/json", b"content-length: %d" % len(body), *more,
    ]  # fmt: skip
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


@st.composite
def raw_http(draw: st.DrawFn, key: str) -> bytes:
    """A valid request with a few bytes that are not its own, or bytes alone."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.binary(max_size=200)) + b"\r\n\r\n"
    path = draw(st.sampled_from(sorted(BASES)))
    raw = bytearray(_head(b"POST " + path.encode() + b" HTTP/1.1", key, json.dumps(BASES[path]).encode()))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(raw)))
        raw[at : at + draw(st.integers(0, 4))] = draw(
            st.binary(max_size=6) | st.sampled_from([b"\r\n", b"\0", b": ", b"\xff" * 9])
        )
    return bytes(raw)


_NAMES = ["content-length", "transfer-encoding", "content-encoding", "expect", "upgrade", "accept", "range", "host",
          "x-request-id", "authorization", "cookie", "te", "trailer", "x-forwarded-for", "content-type"]  # fmt: skip
_VALUES = ["0", "-1", "99999999999999999999", "chunked", "chunked, chunked", "gzip", "100-continue", "websocket", "h2c",
           "Bearer ", "Bearer " + "x" * 4000, "multipart/form-data", "multipart/form-data; boundary=a", "*/*",
           "bytes=0-", "text/plain; charset=utf-7", "\t", "a" * 40_000]  # fmt: skip


def shapes(document: dict[str, Any], key: str) -> st.SearchStrategy[bytes]:
    """Any method at any path, with headers that mean something else than they say, or far too many of them."""
    methods = st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "CONNECT", "PRI", "post"])
    known = sorted({*document["paths"], *BASES, "/health", "/ready", "/v1/files", "/v1/batches/x", "*", "/"})
    paths = st.sampled_from(known) | st.sampled_from(known).map(lambda path: f"/..//%2e%2e{path}?a=%00&a[]=b#c")
    header = st.tuples(st.sampled_from(_NAMES), st.sampled_from(_VALUES)).map(lambda pair: ": ".join(pair).encode())
    headers = st.lists(header, max_size=4) | st.just([b"x-a: b"] * 200)
    bodies = st.sampled_from([b"", b"{}", b"[]", b"null", b"5\r\nhello\r\n0\r\n\r\n", b"--a\r\n\r\n--a--"])
    bodies |= st.just(json.dumps(BASES["/v1/completions"]).encode())

    def request(method: str, path: str, body: bytes, more: list[bytes]) -> bytes:
        return _head(f"{method} {path} HTTP/1.1".encode(), key, body, *more)

    return st.builds(request, methods, paths, bodies, headers)


@st.composite
def goings(draw: st.DrawFn, key: str) -> tuple[bytes, int]:
    """(request, bytes of its answer after which its client goes): whole, streamed, or not even sent to its end."""
    path = draw(st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"]))
    length = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body = json.dumps(BASES[path] | {"stream": draw(st.booleans()), length: draw(st.integers(1, 48))}).encode()
    raw = _head(b"POST " + path.encode() + b" HTTP/1.1", key, body)
    return raw[: len(raw) - draw(st.sampled_from([0, 0, 0, 1, len(body)]))], draw(st.sampled_from([0, 1, 200, 900]))


def send_raw(target: Target, raw: bytes, kind: str = "raw http") -> None:
    with socket.create_connection(("127.0.0.1", target.http_port), timeout=ANSWER_S) as peer:
        got = b""
        try:
            peer.sendall(raw)
            peer.shutdown(socket.SHUT_WR)
            while part := peer.recv(65536):
                got += part
        except TimeoutError:
            target.judge.hung(kind)
        except OSError:  # it was reset, perhaps before all was sent
            pass
    final = got.partition(b"\r\n\r\n")[2] if got.startswith(b"HTTP/1.1 100 ") else got
    target.judge.saw(kind, final[9:12].decode("latin-1") if final.startswith(b"HTTP/1.1 ") else "closed", got)


def send_and_go(target: Target, raw: bytes, num_bytes: int) -> None:
    """What was read by then is the answer; that nothing is left of the request shows at the end."""
    got = b""
    with socket.create_connection(("127.0.0.1", target.http_port), timeout=0.5) as peer:
        try:
            peer.sendall(raw)
            while len(got) < num_bytes and (part := peer.recv(256)):
                got += part
        except OSError:  # it waits for the engine, or was reset
            pass
    target.judge.saw("gone", got[9:12].decode("latin-1") if got else "gone", got)


METHODS = {"Chat": pb.ChatRequest, "ChatStream": pb.ChatRequest, "Complete": pb.CompletionRequest,
           "CompleteStream": pb.CompletionRequest, "ListModels": pb.ListModelsRequest,
           "Tokenize": pb.TokenizeRequest, "Detokenize": pb.DetokenizeRequest}  # fmt: skip
_BASE_OF = {"Chat": "/v1/chat/completions", "ChatStream": "/v1/chat/completions", "Complete": "/v1/completions",
            "CompleteStream": "/v1/completions", "Tokenize": "/tokenize", "Detokenize": "/detokenize"}  # fmt: skip
_INTS = {FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1), FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1)}


@st.composite
def fill(draw: st.DrawFn, message: Message, depth: int = 4) -> Message:
    """Set a few of its fields to whatever their types allow."""
    known = [field for field in message.DESCRIPTOR.fields if depth or field.message_type is None]
    for field in draw(st.lists(st.sampled_from(known), min_size=1, max_size=3)) if known else ():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        into = getattr(message, field.name)
        if field.message_type is not None and field.is_repeated:
            for _ in range(draw(st.integers(0, 2))):
                draw(fill(into.add(), depth - 1))
        elif field.message_type is not None:
            into.SetInParent()
            draw(fill(into, depth - 1))
        elif field.name in BOUNDED:
            setattr(message, field.name, draw(st.integers(-2, 4)))
        elif field.is_repeated:
            into.extend(draw(st.lists(_scalar(field), max_size=3)))
        else:
            setattr(message, field.name, draw(_scalar(field)))
    return message


def _scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.cpp_type in _INTS:
        least, most = _INTS[field.cpp_type]
        return st.integers(least, most) | st.integers(-3, 30)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
        return st.floats() | st.floats(0, 1)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return st.text(max_size=30) | st.sampled_from([*TOKENS, "user", "text", "json_object", "json_schema", MODEL])
    return st.integers(0, 2)  # an enum


@st.composite
def messages(draw: st.DrawFn) -> tuple[str, bytes]:
    """(method, message): of the method's type."""
    method = draw(st.sampled_from(sorted(METHODS)))
    message = METHODS[method]()
    if (path := _BASE_OF.get(method)) is not None:
        ParseDict(BASES[path] | ({"prompt": ["hi"]} if "Complete" in method else {}), message)
    return method, draw(fill(message)).SerializeToString()


@st.composite
def message_bytes(draw: st.DrawFn) -> tuple[str, bytes]:
    """(method, message): bytes that are perhaps no message."""
    method, raw = draw(messages())
    if draw(st.booleans()):
        return method, draw(st.binary(max_size=300))
    changed = bytearray(raw)
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(changed)))
        changed[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return draw(st.sampled_from([method, method, method, "Nothing", "../Chat", ""])), bytes(changed)


def call(target: Target, channel: grpc.Channel, kind: str, method: str, raw: bytes) -> None:
    metadata = tuple((name.lower(), value) for name, value in target.headers.items())
    stub = channel.unary_stream(f"/moeray.v1.Inference/{method}")
    got = b""
    try:
        for part in stub(raw, metadata=metadata, timeout=ANSWER_S):
            got += part
        status = "OK"
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            target.judge.hung(kind)
        status, got = error.code().name, got + f"{error.details()} {error.trailing_metadata()}".encode()
        if status in ("INTERNAL", "UNKNOWN"):
            rich = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
            got += str(status_pb2.Status.FromString(rich)).encode()
    target.judge.saw(kind, status, got)
