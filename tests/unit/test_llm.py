"""The proxy, judged by the official OpenAI SDK, against an upstream whose every word the test decides."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import openai
import pytest
import structlog
from aiohttp import web
from aiohttp.test_utils import TestServer

from agentd.api.agent import AgentApi
from agentd.core.errors import InvalidField
from agentd.llm import scripted
from agentd.llm.prices import Price, Usage, built_in, cost_usd
from agentd.llm.proxy import Call, Proxy
from agentd.llm.settings import Kind, LlmSettings, Provider, Routes

SECRET = "sk-upstream-secret"
PROMPT = "the prompt nobody may log"


def chunk(text: str | None = None, finish: str | None = None, usage: dict[str, Any] | None = None) -> dict[str, Any]:
    choices = (
        []
        if text is None and finish is None
        else [{"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}]
    )
    return {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": choices,
        "usage": usage,
    }


def sse(*values: dict[str, Any] | str) -> bytes:
    return b"".join(
        b"data: " + (value.encode() if isinstance(value, str) else msgspec.json.encode(value)) + b"\n\n"
        for value in values
    )


USAGE = {
    "prompt_tokens": 1000,
    "completion_tokens": 100,
    "total_tokens": 1100,
    "prompt_tokens_details": {"cached_tokens": 600},
}
WHOLE = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    "usage": USAGE,
}


class Upstream:
    """A provider that answers with whatever `answer` is set to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.gone = asyncio.Event()
        self.answer: Callable[[web.Request], Awaitable[web.StreamResponse]] = self.whole

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(msgspec.json.decode(await request.read()))
        self.headers.append(dict(request.headers))
        return await self.answer(request)

    async def whole(self, _: web.Request) -> web.StreamResponse:
        return web.json_response(WHOLE)

    def streaming(self, parts: list[bytes], *, cut: bool = False, hang: bool = False) -> None:
        async def answer(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            try:
                for part in parts:
                    await response.write(part)
                    await asyncio.sleep(0)
                if cut:
                    assert request.transport is not None
                    request.transport.abort()
                while hang:
                    await response.write(b": beat\n\n")
                    await asyncio.sleep(0.01)
            except (ConnectionError, asyncio.CancelledError):
                self.gone.set()
                raise
            return response

        self.answer = answer


class World:
    def __init__(self, upstream: Upstream, url: str, client: openai.AsyncOpenAI, calls: list[Call]):
        self.upstream = upstream
        self.url = url
        self.client = client
        self.calls = calls

    async def ask(self, **more: Any) -> Any:
        return await self.client.chat.completions.create(
            model="gpt-4o", messages=[{"role": "user", "content": PROMPT}], **more
        )


class _Callers:
    """Everybody on loopback is this task."""

    @staticmethod
    def identify(address: str, token: str | None) -> Any:
        from agentd.network.identity import Caller

        return Caller("t", 1, token) if token == "agentd-token" else None


class _Tasks:
    @staticmethod
    def of_caller(caller: Any) -> Any:
        class Life:
            epoch = 1

        class Record:
            id = "t"
            life = Life

        return Record


@pytest.fixture
async def world() -> AsyncIterator[World]:
    upstream = Upstream()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", upstream.handle)
    provider_server = TestServer(app)
    await provider_server.start_server()
    calls: list[Call] = []

    async def record(call: Call) -> None:
        calls.append(call)

    provider = Provider(name="up", base_url=str(provider_server.make_url("/v1")), credential="up", models=("gpt-4o",))
    proxy = Proxy(LlmSettings(providers=(provider,)), {"up": SECRET}, record)
    await proxy.start()
    api = AgentApi(_Tasks(), None, proxy, _Callers())  # type: ignore[arg-type]
    front = TestServer(api.app())
    await front.start_server()  # with handler_cancellation, as `_serve_agents` sets it for the daemon
    client = openai.AsyncOpenAI(base_url=str(front.make_url("/openai/v1")), api_key="agentd-token", max_retries=0)
    yield World(upstream, str(front.make_url("/")), client, calls)
    await client.close()
    await front.close()
    await proxy.close()
    await provider_server.close()


async def test_an_answer_passes_and_is_charged_to_the_cent(world: World) -> None:
    answer = await world.ask(temperature=0.5, extra_body={"vendor_field": {"x": [1, 2]}})
    assert answer.choices[0].message.content == "hello"
    assert world.upstream.asked[0]["vendor_field"] == {"x": [1, 2]}
    assert world.upstream.headers[0]["Authorization"] == f"Bearer {SECRET}"
    (call,) = world.calls
    assert call.usage == Usage(1000, 100, 600)
    assert call.cost_usd == pytest.approx((400 * 2.5 + 600 * 1.25 + 100 * 10) / 1e6)
    assert (call.status, call.task, call.streamed) == (200, "t", False)


async def test_a_stream_passes_and_its_usage_is_asked_for_but_hidden(world: World) -> None:
    world.upstream.streaming([sse(chunk("hel"), chunk("lo"), chunk(finish="stop"), chunk(usage=USAGE), "[DONE]")])
    seen = [part async for part in await world.ask(stream=True)]
    assert "".join(part.choices[0].delta.content or "" for part in seen) == "hello"
    assert all(part.choices for part in seen)
    assert world.upstream.asked[0]["stream_options"] == {"include_usage": True}
    assert world.calls[0].usage == Usage(1000, 100, 600) and world.calls[0].streamed


async def test_a_client_that_asks_for_usage_gets_it(world: World) -> None:
    world.upstream.streaming([sse(chunk("x"), chunk(usage=USAGE), "[DONE]")])
    seen = [part async for part in await world.ask(stream=True, stream_options={"include_usage": True})]
    assert seen[-1].usage is not None and seen[-1].usage.prompt_tokens == 1000


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
async def test_events_cut_anywhere_arrive_whole(world: World, line_end: bytes) -> None:
    raw = (
        b": comment\n\n" + sse(chunk("hé"), chunk("llo"), chunk(finish="stop"), chunk(usage=USAGE), "[DONE]")
    ).replace(b"\n", line_end)
    world.upstream.streaming([raw[i : i + 1] for i in range(len(raw))])
    seen = [part async for part in await world.ask(stream=True)]
    assert "".join(part.choices[0].delta.content or "" for part in seen) == "héllo"
    assert world.calls[0].usage.output_tokens == 100


@pytest.mark.parametrize("status", [400, 401, 429, 500])
async def test_the_providers_own_error_reaches_the_client(world: World, status: int) -> None:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response(
            {"error": {"message": "no", "code": "why"}}, status=status, headers={"Retry-After": "7"}
        )

    world.upstream.answer = refuse
    with pytest.raises(openai.APIStatusError) as caught:
        await world.ask()
    assert caught.value.status_code == status and caught.value.response.headers["retry-after"] == "7"
    assert caught.value.body == {"message": "no", "code": "why"}
    assert world.calls[0].status == status and world.calls[0].cost_usd == 0.0


async def test_a_stream_that_breaks_ends_in_an_error_and_no_false_finish(world: World) -> None:
    world.upstream.streaming([sse(chunk("hel"))], cut=True)
    seen = []
    with pytest.raises(openai.APIError, match="broke"):
        async for part in await world.ask(stream=True):
            seen.append(part)
    assert [part.choices[0].finish_reason for part in seen] == [None]
    assert world.calls[0].error is not None and world.calls[0].cost_usd is None


async def test_a_provider_that_is_away_is_a_502(world: World) -> None:
    await world.client.close()
    calls: list[Call] = []

    async def record(call: Call) -> None:
        calls.append(call)

    proxy = Proxy(LlmSettings(providers=(Provider(name="gone", base_url="http://127.0.0.1:1/v1"),)), {}, record)
    await proxy.start()
    async with contextlib.AsyncExitStack() as scope:
        answer = await proxy.chat(msgspec.json.encode({"model": "m", "messages": []}), "t", 1, scope)
    await proxy.close()
    assert answer.status == 502 and b"127.0.0.1:1" in answer.body
    assert calls[0].error == "ClientConnectorError"


async def test_a_client_that_leaves_cancels_the_upstream_call(world: World) -> None:
    world.upstream.streaming([sse(chunk("x"))], hang=True)
    stream = await world.ask(stream=True)
    async for _ in stream:
        break
    await stream.close()
    await asyncio.wait_for(world.upstream.gone.wait(), 2)
    async with asyncio.timeout(2):
        while not world.calls:
            await asyncio.sleep(0.01)
    assert world.calls[0].error is not None


async def test_neither_key_nor_prompt_is_logged(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    with structlog.testing.capture_logs() as logs:
        await world.ask()

        async def refuse(_: web.Request) -> web.StreamResponse:
            return web.json_response({"error": {"message": "no"}}, status=401)

        world.upstream.answer = refuse
        with pytest.raises(openai.AuthenticationError):
            await world.ask()
    captured = capfd.readouterr()
    everything = f"{logs}{captured.out}{captured.err}{world.calls}"
    assert SECRET not in everything and PROMPT not in everything


async def test_without_the_tasks_token_nothing_is_answered(world: World) -> None:
    stranger = openai.AsyncOpenAI(base_url=f"{world.url}openai/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        await stranger.models.list()
    await stranger.close()
    listed = await world.client.models.list()
    assert [model.id for model in listed.data] == ["gpt-4o"]


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"model": 1, "messages": []}', b'{"model": "m", "messages": [], "stream_options": 3}']
)
async def test_what_is_no_request_is_a_400_in_the_dialect(world: World, body: bytes) -> None:
    import aiohttp

    async with aiohttp.ClientSession() as session:
        async with session.post(
            world.url + "openai/v1/chat/completions", data=body, headers={"Authorization": "Bearer agentd-token"}
        ) as answer:
            found = await answer.json()
    assert answer.status == 400 and found["error"]["type"] == "invalid_request_error"
    assert not world.upstream.asked


# -- routes, prices, scripted ------------------------------------------------------------------------------------------------


def test_a_name_is_a_route_a_listed_model_or_the_defaults() -> None:
    one = Provider(name="one", base_url="http://x/v1", models=("a", "b"))
    two = Provider(name="two", base_url="http://y/v1", models=("c",))
    routes = Routes(LlmSettings(providers=(one, two), routes={"fast": "two/c", "default": "one/b"}))
    chosen = {
        name: (routes.choose(name).provider.name, routes.choose(name).model)
        for name in ("fast", "c", "two/z", "default", "gpt-9")
    }
    assert chosen == {
        "fast": ("two", "c"),
        "c": ("two", "c"),
        "two/z": ("two", "z"),
        "default": ("one", "b"),
        "gpt-9": ("one", "gpt-9"),
    }
    assert routes.names()[0] == "b"


@pytest.mark.parametrize(
    "settings",
    [
        LlmSettings(providers=(Provider(name="a", base_url="ftp://x"),)),
        LlmSettings(providers=(Provider(name="a", base_url="http://x"), Provider(name="a", base_url="http://y"))),
        LlmSettings(providers=(Provider(name="a", base_url="http://x"),), routes={"fast": "b/m"}),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings: LlmSettings) -> None:
    with pytest.raises(InvalidField) as caught:
        Routes(settings)
    assert (caught.value.field or "").startswith("llm.")


def test_an_unknown_price_is_unknown_and_a_dated_name_has_its_familys() -> None:
    prices = built_in() | {"mine": Price(1.0, 2.0)}
    assert cost_usd(Usage(10, 10), "nobody-knows", prices) is None
    assert cost_usd(Usage(1_000_000, 0), "gpt-4o-2024-08-06", prices) == 2.5
    assert cost_usd(Usage(1_000_000, 0), "gpt-4o-mini-2024-07-18", prices) == 0.15
    assert cost_usd(Usage(1_000_000, 1_000_000, 500_000), "mine", prices) == 3.0
    assert cost_usd(Usage(10, 10), "nobody-knows", prices, free=True) == 0.0


async def test_the_scripted_provider_is_labelled_and_always_the_same() -> None:
    calls: list[Call] = []

    async def record(call: Call) -> None:
        calls.append(call)

    proxy = Proxy(LlmSettings(), {}, record)
    body = {
        "model": "gpt-4",
        "messages": [{"role": "user", "content": "This sentence is long enough to be quoted by it."}],
    }
    answers = []
    for _ in range(2):
        async with contextlib.AsyncExitStack() as scope:
            answers.append(await proxy.chat(msgspec.json.encode(body), "t", 1, scope))
    texts = {msgspec.json.decode(answer.body)["choices"][0]["message"]["content"] for answer in answers}
    assert len(texts) == 1 and texts.pop().startswith(scripted.LABEL)
    assert answers[0].headers["X-Agentd-Scripted"] == "true"
    assert calls[0].scripted and calls[0].model == "gpt-4" and calls[0].provider == "scripted"
    assert proxy.routes.providers[0].kind is Kind.SCRIPTED


async def test_a_client_that_leaves_a_silent_call_cancels_it_upstream(world: World) -> None:
    """The provider has not said a word yet: nothing is written that could fail, the handler itself has to be cancelled."""
    entered, left = asyncio.Event(), asyncio.Event()

    async def silent(_: web.Request) -> web.StreamResponse:
        entered.set()
        try:
            await asyncio.sleep(60)
        finally:
            left.set()
        return web.Response()

    world.upstream.answer = silent
    asking = asyncio.create_task(world.ask())
    async with asyncio.timeout(5):
        await entered.wait()
        asking.cancel()
        await left.wait()
        while not world.calls:
            await asyncio.sleep(0.005)
    (call,) = world.calls
    assert (call.status, call.error, call.cost_usd) == (499, "cancelled", None)


async def test_a_client_that_leaves_a_stream_is_not_blamed_on_the_provider(world: World) -> None:
    world.upstream.streaming([sse(chunk("x"))], hang=True)
    stream = await world.ask(stream=True)
    async for _ in stream:
        break
    await stream.close()
    async with asyncio.timeout(5):
        while not world.calls:
            await asyncio.sleep(0.005)
    assert (world.calls[0].status, world.calls[0].error) == (499, "cancelled")
