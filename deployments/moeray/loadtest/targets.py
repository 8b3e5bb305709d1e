"""Servers: any that speaks OpenAI's HTTP, and moeray's gRPC. One request each, streamed."""

from __future__ import annotations

import json
import ssl
import time
from abc import ABC, abstractmethod
from typing import Any

import aiohttp

from moeray.loadtest.outcome import Outcome


class Target(ABC):
    """`name` in reports. Errors of a request are in its outcome; nothing that a server does raises."""

    name: str

    @abstractmethod
    async def ask(self, outcome: Outcome, prompt: str, answer_tokens: int) -> None:
        """Send, read to the end, fill `outcome` in."""

    @abstractmethod
    async def close(self) -> None: ...


class HttpTarget(Target):
    """`POST {url}/v1/completions`, streamed.

    Args:
        url: without `/v1`.
        timeout_s: of a whole answer.
        ignore_eos: answers have exactly as many tokens as were asked for, where the server knows this field.
    """

    def __init__(
        self, url: str, model: str, *, api_key: str | None = None, tls: ssl.SSLContext | None = None,
        timeout_s: float = 600.0, ignore_eos: bool = True, connections: int = 0,
    ) -> None:  # fmt: skip
        self.name, self._model, self._ignore_eos, self._tls = url, model, ignore_eos, tls
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        connector = aiohttp.TCPConnector(limit=connections, ssl=tls or True)
        self._session = aiohttp.ClientSession(
            connector=connector, headers=headers, timeout=aiohttp.ClientTimeout(total=timeout_s)
        )

    async def ask(self, outcome: Outcome, prompt: str, answer_tokens: int) -> None:
        body = {
            "model": self._model, "prompt": prompt, "max_tokens": answer_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        if self._ignore_eos:
            body["ignore_eos"] = True
        outcome.sent_s = time.perf_counter()
        try:
            async with self._session.post(f"{self.name}/v1/completions", json=body) as answer:
                if answer.status != 200:
                    outcome.error, outcome.detail = f"HTTP {answer.status}", (await answer.text())[:500]
                    return
                await self._read(answer, outcome)
        except TimeoutError:
            outcome.error = "timeout"
        except (aiohttp.ClientError, OSError) as error:
            outcome.error, outcome.detail = _kind(error, begun=outcome.first_s == outcome.first_s), str(error)

    async def _read(self, answer: aiohttp.ClientResponse, outcome: Outcome) -> None:
        """Server-sent events to [DONE]."""
        pieces, is_done = list[str](), False
        async for line in answer.content:
            now_s = time.perf_counter()
            data = line.removeprefix(b"data: ").strip()
            if not data or data.startswith(b":"):
                continue
            if data == b"[DONE]":
                is_done = True
                continue
            try:
                event: dict[str, Any] = json.loads(data)
            except ValueError:
                outcome.error, outcome.detail = "not JSON", data[:200].decode(errors="replace")
                return
            if "error" in event:
                outcome.error, outcome.detail = "error in the stream", str(event["error"])[:500]
                return
            if (choices := event.get("choices")) and (text := choices[0].get("text")):
                pieces.append(text)
                _piece(outcome, now_s)
            if usage := event.get("usage"):
                outcome.answer_tokens = int(usage.get("completion_tokens") or 0)
                outcome.prompt_tokens = int(usage.get("prompt_tokens") or 0)
        outcome.text = "".join(pieces)
        if not is_done:
            outcome.error = "cut stream"
        elif not pieces:
            outcome.error = "no token"
        outcome.answer_tokens = outcome.answer_tokens or len(pieces)

    async def close(self) -> None:
        await self._session.close()


class GrpcTarget(Target):
    """`moeray.v1.Inference/CompleteStream`."""

    def __init__(self, address: str, model: str, *, api_key: str | None = None, credentials: Any = None,
                 timeout_s: float = 600.0, ignore_eos: bool = True) -> None:  # fmt: skip
        import grpc

        from moeray.v1.inference_pb2_grpc import InferenceStub

        self.name, self._model, self._timeout_s, self._ignore_eos = address, model, timeout_s, ignore_eos
        make = grpc.aio.insecure_channel if credentials is None else grpc.aio.secure_channel
        self._channel = make(address) if credentials is None else make(address, credentials)
        self._stub = InferenceStub(self._channel)
        self._metadata = [("authorization", f"Bearer {api_key}")] if api_key else []

    async def ask(self, outcome: Outcome, prompt: str, answer_tokens: int) -> None:
        import grpc

        from moeray.v1 import inference_pb2 as pb

        request = pb.CompletionRequest(
            model=self._model, prompt=[prompt], max_tokens=answer_tokens, temperature=0, ignore_eos=self._ignore_eos,
            stream_options=pb.StreamOptions(include_usage=True),
        )  # fmt: skip
        pieces: list[str] = []
        outcome.sent_s = time.perf_counter()
        try:
            async for chunk in self._stub.CompleteStream(request, metadata=self._metadata, timeout=self._timeout_s):
                now_s = time.perf_counter()
                for choice in chunk.choices:
                    if choice.text:
                        pieces.append(choice.text)
                        _piece(outcome, now_s)
                if chunk.HasField("usage"):
                    outcome.answer_tokens = chunk.usage.completion_tokens
                    outcome.prompt_tokens = chunk.usage.prompt_tokens
        except grpc.aio.AioRpcError as error:
            outcome.error, outcome.detail = error.code().name, str(error.details())[:500]
        outcome.text = "".join(pieces)
        outcome.answer_tokens = outcome.answer_tokens or len(pieces)
        if not pieces and not outcome.error:
            outcome.error = "no token"

    async def close(self) -> None:
        await self._channel.close()


def _piece(outcome: Outcome, now_s: float) -> None:
    if outcome.first_s != outcome.first_s:  # nan: none yet
        outcome.first_s = now_s
    else:
        outcome.pieces_s.append(now_s - outcome.last_s)
    outcome.last_s = now_s


def _kind(error: Exception, *, begun: bool) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return "no connection"
    return "cut stream" if begun or isinstance(error, aiohttp.ClientPayloadError) else "cut connection"


async def model_of(url: str, api_key: str | None, tls: ssl.SSLContext | None, timeout_s: float = 30.0) -> str:
    """The first model that `GET {url}/v1/models` names.

    Raises:
        OSError: nobody answers so.
    """
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=timeout_s)) as session,
            session.get(f"{url}/v1/models", ssl=tls or True) as answer,
        ):
            if answer.status != 200:
                raise OSError(f"{url}/v1/models: HTTP {answer.status}: {(await answer.text())[:300]}")
            return str((await answer.json())["data"][0]["id"])
    except (TimeoutError, aiohttp.ClientError, KeyError, IndexError, ValueError) as error:
        raise OSError(f"{url}/v1/models: {str(error) or type(error).__name__}") from error
