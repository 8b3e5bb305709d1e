"""`moeray chat`: one question, the answer as it comes; gRPC by default, the OpenAI API with --http."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeray.cli.connection import endpoints
from moeray.cli.errors import CommandError

if TYPE_CHECKING:
    import grpc

TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks, and whom to believe.

    Attributes:
        api_key: sent as a bearer token.
        ca_file: PEM of who signed the server's certificate; None trusts the system's authorities.
        cert_file, key_file: PEM of a client certificate, where the server asks for one.
    """

    api_key: str | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    def context(self) -> ssl.SSLContext:
        """For HTTPS.

        Raises:
            CommandError: a file cannot be used.
        """
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            if self.cert_file is not None:
                context.load_cert_chain(self.cert_file, self.key_file)
        except OSError as error:
            raise CommandError(f"--ca-file, --cert, --key: {error.strerror or error}") from error
        return context

    def credentials(self) -> grpc.ChannelCredentials:
        """For gRPC. Raises as `context`."""
        import grpc

        self.context()  # its errors name what is wrong; gRPC would only fail to connect
        read = [path.read_bytes() if path else None for path in (self.ca_file, self.key_file, self.cert_file)]
        return grpc.ssl_channel_credentials(*read)


ANYBODY = Identity()


def chat(question: str, *, http: bool, identity: Identity, max_tokens: int, thinking: bool) -> int:
    url, target = endpoints()
    if http:
        pieces = ask_http(url, question, identity=identity, max_tokens=max_tokens, thinking=thinking)
    else:
        is_tls = url.startswith("https:")
        pieces = ask_grpc(target, question, tls=is_tls, identity=identity, max_tokens=max_tokens, thinking=thinking)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def ask_http(
    url: str, question: str, *, identity: Identity = ANYBODY, max_tokens: int = 256, thinking: bool = False
) -> Iterator[str]:
    """Stream one answer of `POST {url}/v1/chat/completions`, piece by piece (reasoning first, if any).

    Raises:
        CommandError: the server does not answer, or answers with an error object.
    """
    model = _get(f"{url}/v1/models", identity)["data"][0]["id"]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
        "chat_template_kwargs": {"thinking": thinking},
    }
    with open_url(f"{url}/v1/chat/completions", identity, json.dumps(body).encode()) as answer:
        for line in answer:
            text = line.decode().removeprefix("data: ").strip()
            if not text or text == "[DONE]":
                continue
            event = json.loads(text)
            if "error" in event:
                raise CommandError(event["error"]["message"])
            for choice in event["choices"]:
                delta = choice["delta"]
                if piece := (delta.get("reasoning") or "") + (delta.get("content") or ""):
                    yield piece


def ask_grpc(
    target: str,
    question: str,
    *,
    tls: bool = False,
    identity: Identity = ANYBODY,
    max_tokens: int = 256,
    thinking: bool = False,
) -> Iterator[str]:
    """Stream one answer of `moeray.v1.Inference/ChatStream`, piece by piece (reasoning first, if any).

    Raises:
        CommandError: the server does not answer, or answers with a status other than OK.
    """
    import grpc

    from moeray.v1 import inference_pb2, inference_pb2_grpc

    metadata = [("authorization", f"Bearer {identity.api_key}")] if identity.api_key else []
    try:
        with grpc.secure_channel(target, identity.credentials()) if tls else grpc.insecure_channel(target) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            models = stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata, timeout=TIMEOUT_S)
            request = inference_pb2.ChatRequest(
                model=models.data[0].id,
                messages=[inference_pb2.ChatMessage(role="user", content=question)],
                temperature=0,
                max_tokens=max_tokens,
            )
            request.chat_template_kwargs["thinking"] = thinking
            for chunk in stub.ChatStream(request, metadata=metadata, timeout=TIMEOUT_S):
                for choice in chunk.choices:
                    if piece := choice.delta.reasoning + choice.delta.content:
                        yield piece
    except grpc.RpcError as error:
        raise CommandError(f"gRPC {target}: {error.code().name}: {error.details()}") from error


def _get(url: str, identity: Identity) -> Any:
    with open_url(url, identity, None) as answer:
        return json.loads(answer.read())


def open_url(url: str, identity: Identity, body: bytes | None) -> Any:
    """The answer of a GET, or of a POST of this JSON, to be read as it comes. Raises CommandError."""
    headers = {"content-type": "application/json"}
    if identity.api_key:
        headers["authorization"] = f"Bearer {identity.api_key}"
    context = identity.context() if url.startswith("https:") else None
    request = urllib.request.Request(url, body, headers)  # noqa: S310 the endpoint is the cluster's own
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context)  # noqa: S310
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            message = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = text[:500]
        raise CommandError(f"HTTP {error.code}: {message}") from error
    except urllib.error.URLError as error:
        raise CommandError(f"{url} does not answer: {error.reason}") from error
