"""The proxy: one chat completion in, the same dialect out, usage and cost to the ledger.

The request passes as it came but for the model's name, the key and, in a stream, the option that makes the provider report usage;
the report is taken out again when the client did not ask for it. A client that goes away cancels its upstream call.
No request or answer body is logged.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import msgspec

from agentd.core.errors import InvalidField, RequestError
from agentd.llm import scripted
from agentd.llm.prices import Price, Usage, built_in, cost_usd
from agentd.llm.settings import Kind, LlmSettings, Provider, Route, Routes

_ANSWER_LIMIT_BYTES = 32 << 20
_EVENT_LIMIT_BYTES = 8 << 20
_PASSED_HEADERS = ("retry-after", "x-request-id", "openai-processing-ms")


class Call(msgspec.Struct, frozen=True):
    """One finished call as the ledger keeps it. Bodies are not in it."""

    id: str
    time: float
    task: str
    epoch: int
    model: str
    provider: str
    status: int
    duration_s: float
    usage: Usage
    cost_usd: float | None
    scripted: bool = False
    streamed: bool = False
    error: str | None = None


class Answer(msgspec.Struct):
    """What goes back to the agent: a whole body, or a stream of ready-made SSE bytes. `close` must be awaited in the end."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    stream: AsyncIterator[bytes] | None = None


Record = Callable[[Call], Awaitable[None]]


def error_body(message: str, kind: str, code: str | None = None) -> bytes:
    """An error as the OpenAI API words it, so that its SDKs raise the right exception."""
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": code}})


class Proxy:
    """Carries chat completions to providers. `record` gets every finished call, durably, before the answer ends."""

    def __init__(
        self,
        settings: LlmSettings,
        credentials: Mapping[str, str],
        record: Record,
        clock: Callable[[], float] = time.time,
    ):
        self.routes = Routes(settings)
        self._prices: dict[str, Price] = built_in() | settings.prices
        self._credentials = credentials
        self._record = record
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None

    def reload(self, settings: LlmSettings, credentials: Mapping[str, str]) -> None:
        """Use other settings from the next call on; calls under way end as they began."""
        self.routes = Routes(settings)
        self._prices = built_in() | settings.prices
        self._credentials = credentials

    async def start(self) -> None:
        """Open the connection pool."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, limit_per_host=0, keepalive_timeout=60),
            auto_decompress=True,
            trust_env=False,
        )

    async def close(self) -> None:
        """Close the connection pool."""
        if self._session is not None:
            await self._session.close()

    def models(self) -> bytes:
        """The body of `GET /models`."""
        now = int(self._clock())
        return msgspec.json.encode(
            {
                "object": "list",
                "data": [
                    {"id": name, "object": "model", "created": now, "owned_by": "agentd"}
                    for name in self.routes.names()
                ],
            }
        )

    async def chat(self, raw: bytes, task: str, epoch: int, scope: AsyncExitStack) -> Answer:
        """Answer one chat completion request of a task. `scope` holds the upstream connection: leaving it cancels the call.

        Raises:
            RequestError: the body is not a chat completion request.
        """
        try:
            body = msgspec.json.decode(raw)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise RequestError(f"cannot read the request: {error}", code="invalid_json") from error
        if (
            not isinstance(body, dict)
            or not isinstance(body.get("model"), str)
            or not isinstance(body.get("messages"), list)
        ):
            raise InvalidField(
                "cannot read the request: it needs model (a string) and messages (a list)", field="model"
            )
        if not isinstance(body.get("stream_options") or {}, dict):
            raise InvalidField("cannot read the request: stream_options is not an object", field="stream_options")
        route = self.routes.choose(body["model"])
        call = _Running(
            uuid.uuid4().hex, task, epoch, route, self._clock(), time.monotonic(), streamed=bool(body.get("stream"))
        )
        if route.provider.kind is Kind.SCRIPTED:
            return await self._scripted(body, call)
        return await self._upstream(body, call, scope)

    # -- an OpenAI-compatible upstream ---------------------------------------------------------------------------------

    async def _upstream(self, body: dict[str, Any], call: _Running, scope: AsyncExitStack) -> Answer:
        assert self._session is not None
        provider = call.route.provider
        body["model"] = call.route.model
        wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        if call.streamed:
            body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
        headers = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream" if call.streamed else "application/json",
        }
        key = self._credentials.get(provider.credential) if provider.credential else None
        if provider.credential and key is None:
            await self._finish(call, 503, Usage(), error="no credential")
            return self._error(
                call,
                503,
                f"provider {provider.name} has no credential {provider.credential!r} on this host",
                "agentd_error",
                "no_credential",
            )
        if key:
            headers["Authorization"] = f"Bearer {key}"
        timeout = aiohttp.ClientTimeout(
            total=provider.total_timeout_s, sock_connect=10, sock_read=provider.first_byte_timeout_s
        )
        url = provider.base_url.rstrip("/") + "/chat/completions"
        try:
            response = await scope.enter_async_context(
                self._session.post(
                    url, data=msgspec.json.encode(body), headers=headers, timeout=timeout, allow_redirects=False
                )
            )
            if response.status == 200 and call.streamed and "event-stream" in response.headers.get("Content-Type", ""):
                passed = self._headers(call) | {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
                return Answer(200, passed, stream=self._relay(response, call, wants_usage))
            content = await response.content.read(_ANSWER_LIMIT_BYTES + 1)
            while not response.content.at_eof() and len(content) <= _ANSWER_LIMIT_BYTES:
                content += await response.content.read(_ANSWER_LIMIT_BYTES + 1 - len(content))
        except (aiohttp.ClientError, TimeoutError) as error:
            status = 504 if isinstance(error, TimeoutError) else 502
            sent = not isinstance(error, aiohttp.ClientConnectorError)
            await self._finish(call, status, Usage(), error=type(error).__name__, unknown=sent)
            return self._error(
                call,
                status,
                f"provider {provider.name} could not be reached: {_plain(error)}",
                "agentd_error",
                "upstream_unreachable",
            )
        except asyncio.CancelledError:
            await asyncio.shield(self._finish(call, 499, Usage(), error="cancelled", unknown=True))
            raise
        if len(content) > _ANSWER_LIMIT_BYTES:
            await self._finish(call, 502, Usage(), error="answer too large")
            return self._error(
                call,
                502,
                f"provider {provider.name} answered with over {_ANSWER_LIMIT_BYTES} bytes",
                "agentd_error",
                "upstream_too_large",
            )
        usage = _usage_in(content)
        cost = await self._finish(
            call,
            response.status,
            usage or Usage(),
            error=None if response.status < 400 else f"status {response.status}",
            unknown=usage is None and response.status < 400,
        )
        passed = {name: response.headers[name] for name in _PASSED_HEADERS if name in response.headers}
        return Answer(
            response.status,
            passed
            | self._headers(call, cost)
            | {"Content-Type": response.headers.get("Content-Type", "application/json")},
            content,
        )

    async def _relay(self, response: aiohttp.ClientResponse, call: _Running, wants_usage: bool) -> AsyncIterator[bytes]:
        """The upstream's events, each whole; its usage report is kept, and hidden where the client did not ask for it."""
        usage: Usage | None = None
        problem: str | None = "the stream ended without [DONE]"
        try:
            async for event in _events(response.content):
                data = _data(event)
                if data == b"[DONE]":
                    problem = None
                    await self._finish(call, 200, usage or Usage(), unknown=usage is None)
                    yield event
                    return
                if data is not None and b'"usage"' in data:
                    found, only_usage = _usage_event(data)
                    usage = found or usage
                    if only_usage and not wants_usage:
                        continue
                yield event
        except (aiohttp.ClientError, TimeoutError, RequestError) as error:
            problem = type(error).__name__
        except (asyncio.CancelledError, GeneratorExit):
            problem = "cancelled"
            raise
        finally:
            if not call.finished:
                await asyncio.shield(
                    self._finish(
                        call,
                        499 if problem == "cancelled" else 502,
                        usage or Usage(),
                        error=problem,
                        unknown=usage is None,
                    )
                )
        message = f"the stream of provider {call.route.provider.name} broke: {problem}"
        yield b"data: " + error_body(message, "agentd_error", "upstream_stream_broken") + b"\n\n"

    # -- the scripted provider -----------------------------------------------------------------------------------------

    async def _scripted(self, body: dict[str, Any], call: _Running) -> Answer:
        text, usage = scripted.answer(body)
        reported = {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.input_tokens + usage.output_tokens,
        }
        cost = await self._finish(call, 200, usage)
        head = {"id": f"chatcmpl-{call.id}", "created": int(call.time), "model": "scripted"}
        headers = self._headers(call, cost) | {"X-Agentd-Scripted": "true"}
        if not call.streamed:
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
                "logprobs": None,
            }
            whole = head | {"object": "chat.completion", "choices": [choice], "usage": reported}
            return Answer(200, headers | {"Content-Type": "application/json"}, msgspec.json.encode(whole))
        wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))

        async def stream() -> AsyncIterator[bytes]:
            for index, piece in enumerate(scripted.pieces(text)):
                delta = {"role": "assistant", "content": piece} if index == 0 else {"content": piece}
                yield _sse(
                    head
                    | {
                        "object": "chat.completion.chunk",
                        "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
                    }
                )
            yield _sse(
                head
                | {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
            )
            if wants_usage:
                yield _sse(head | {"object": "chat.completion.chunk", "choices": [], "usage": reported})
            yield b"data: [DONE]\n\n"

        return Answer(
            200, headers | {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}, stream=stream()
        )

    # -- the ledger ----------------------------------------------------------------------------------------------------

    def _price(self, call: _Running, usage: Usage) -> float | None:
        return cost_usd(
            usage,
            call.route.model,
            self._prices,
            free=call.route.provider.free or call.route.provider.kind is Kind.SCRIPTED,
        )

    async def _finish(
        self, call: _Running, status: int, usage: Usage, *, error: str | None = None, unknown: bool = False
    ) -> float | None:
        call.finished = True
        cost = None if unknown else self._price(call, usage)
        await self._record(
            Call(
                id=call.id,
                time=call.time,
                task=call.task,
                epoch=call.epoch,
                model=call.route.model,
                provider=call.route.provider.name,
                status=status,
                duration_s=time.monotonic() - call.started,
                usage=usage,
                cost_usd=cost,
                scripted=call.route.provider.kind is Kind.SCRIPTED,
                streamed=call.streamed,
                error=error,
            )
        )
        return cost

    @staticmethod
    def _headers(call: _Running, cost: float | None = None) -> dict[str, str]:
        found = {"X-Agentd-Request-Id": call.id, "X-Agentd-Route": f"{call.route.provider.name}/{call.route.model}"}
        return found | ({"X-Agentd-Cost-Usd": f"{cost:.8f}"} if cost is not None else {})

    def _error(self, call: _Running, status: int, message: str, kind: str, code: str) -> Answer:
        return Answer(
            status, self._headers(call) | {"Content-Type": "application/json"}, error_body(message, kind, code)
        )


class _Running(msgspec.Struct):
    """A call under way."""

    id: str
    task: str
    epoch: int
    route: Route
    time: float
    started: float
    streamed: bool = False
    finished: bool = False


def _plain(error: Exception) -> str:
    """What an operator may know of a connection error: never a URL with a query or a key."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"{error.host}:{error.port}: {error.os_error.strerror or type(error.os_error).__name__}"
    return type(error).__name__


def _sse(value: object) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Whole server-sent events with the blank line that ends each, however the network cut them; WHATWG HTML §9.2.

    Raises:
        RequestError: one event is over `_EVENT_LIMIT_BYTES`.
    """
    buffer = held = b""
    async for chunk in content.iter_any():
        if held or b"\r" in chunk:  # a line end of two bytes may be cut in two
            chunk = held + chunk
            held = b"\r" if chunk.endswith(b"\r") else b""
            chunk = chunk.removesuffix(b"\r").replace(b"\r\n", b"\n")
        buffer += chunk
        while (cut := buffer.find(b"\n\n")) >= 0:
            yield buffer[: cut + 2]
            buffer = buffer[cut + 2 :]
        if len(buffer) > _EVENT_LIMIT_BYTES:
            raise RequestError("an event of the provider's stream is too long")
    if buffer.strip():
        yield buffer + b"\n\n"


def _data(event: bytes) -> bytes | None:
    """The data of one event; None for a comment."""
    lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def _counts(raw: object) -> Usage | None:
    if not isinstance(raw, dict):
        return None
    details = raw.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    try:
        return Usage(int(raw.get("prompt_tokens") or 0), int(raw.get("completion_tokens") or 0), int(cached or 0))
    except (TypeError, ValueError):
        return None


def _usage_in(content: bytes) -> Usage | None:
    try:
        body = msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    return _counts(body.get("usage")) if isinstance(body, dict) else None


def _usage_event(data: bytes) -> tuple[Usage | None, bool]:
    """The usage in one stream event, and whether the event holds nothing else (no choices)."""
    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None, False
    if not isinstance(body, dict):
        return None, False
    usage = _counts(body.get("usage"))
    return usage, usage is not None and not body.get("choices")


__all__ = ["Answer", "Call", "Provider", "Proxy", "error_body"]
