"""The agent API: what a program inside a sandbox finds at `http://agentd.internal`.

Identity is the source address, which the kernel vouches for, and the task's token, as any SDK sends its key
(`Authorization: Bearer` or `x-api-key`). A stale attempt is refused everywhere.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import msgspec
from aiohttp import web

from agentd.api.answers import Handler, body_of, errors, number, ok
from agentd.core.errors import AgentdError, InvalidField, NotFound, TooLarge
from agentd.llm.proxy import Proxy, error_body
from agentd.network.identity import Caller, Callers
from agentd.storage.episodic import EpisodicStore, Scope
from agentd.tasks.store import Record
from agentd.tasks.supervisor import RESULT_LIMIT_BYTES, Tasks

BODY_LIMIT_BYTES = 16 << 20
PROGRESS_LIMIT = 500
CALLER: web.RequestKey[Caller] = web.RequestKey("caller", Caller)


class AgentApi:
    """Handlers of agentd.internal."""

    def __init__(self, tasks: Tasks, memory: EpisodicStore, proxy: Proxy, callers: Callers):
        self._tasks = tasks
        self._memory = memory
        self._proxy = proxy
        self._callers = callers

    def app(self) -> web.Application:
        """The application."""
        app = web.Application(middlewares=[errors, self._identify], client_max_size=BODY_LIMIT_BYTES)
        app.add_routes(
            [
                web.get("/", self._index),
                web.get("/v1/task", self._task),
                web.post("/v1/task/progress", self._progress),
                web.get("/v1/result", self._get_result),
                web.put("/v1/result", self._put_result),
                web.post("/v1/result", self._put_result),
                web.get("/v1/memory/{scope}", self._memory_list),
                web.get("/v1/memory/{scope}/{key:.+}", self._memory_get),
                web.put("/v1/memory/{scope}/{key:.+}", self._memory_put),
                web.delete("/v1/memory/{scope}/{key:.+}", self._memory_delete),
                web.get("/openai/v1/models", self._models),
                web.post("/openai/v1/chat/completions", self._chat),
            ]
        )
        return app

    @web.middleware
    async def _identify(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            token = request.headers.get("x-api-key", "")
        address = (request.remote or "").removeprefix("::ffff:")
        caller = self._callers.identify(address, token.strip() or None) if address else None
        if caller is None:
            message = "cannot tell which task this is: send the token in AGENTD_TOKEN as a bearer token"
            if request.path.startswith("/openai/"):
                return web.Response(
                    status=401,
                    body=error_body(message, "authentication_error", "invalid_api_key"),
                    content_type="application/json",
                )
            return ok({"error": {"code": "not_authenticated", "message": message}}, 401)
        request[CALLER] = caller
        return await handler(request)

    def _record(self, request: web.Request) -> Record:
        return self._tasks.of_caller(request[CALLER])

    async def _index(self, request: web.Request) -> web.StreamResponse:
        record = self._record(request)
        return ok(
            {
                "task": record.id,
                "openai": "/openai/v1",
                "memory": "/v1/memory/{task,user}/KEY",
                "result": "/v1/result",
                "progress": "/v1/task/progress",
            }
        )

    async def _task(self, request: web.Request) -> web.StreamResponse:
        record = self._record(request)
        started = record.started_at or record.submitted_at
        return ok(
            {
                "id": record.id,
                "name": record.spec.name,
                "attempt": record.life.epoch,
                "tenant": record.spec.tenant,
                "user": record.user,
                "deadline": started + record.spec.timeout_s,
                "state": record.life.state,
                "labels": record.spec.labels,
                "llm": msgspec.to_builtins(record.llm),
            }
        )

    async def _progress(self, request: web.Request) -> web.StreamResponse:
        record = self._record(request)
        body = await body_of(request, "take the progress")
        text = body.get("text") if isinstance(body, dict) else None
        if not isinstance(text, str):
            raise InvalidField("cannot take the progress: text is not a string", field="text")
        fraction = body.get("fraction")
        if fraction is not None and (
            not isinstance(fraction, int | float) or isinstance(fraction, bool) or not 0 <= fraction <= 1
        ):
            raise InvalidField(
                f"cannot take the progress: fraction: {str(fraction)[:40]} is not from 0 to 1", field="fraction"
            )
        await asyncio.shield(self._tasks.set_progress(record, text[:PROGRESS_LIMIT], fraction))
        return ok({"ok": True})

    async def _put_result(self, request: web.Request) -> web.StreamResponse:
        record = self._record(request)
        raw = await request.read()
        if len(raw) > RESULT_LIMIT_BYTES:
            raise TooLarge(
                f"cannot take the result: {len(raw)} bytes are over the limit of {RESULT_LIMIT_BYTES}",
                hint="write it to a file in the workspace",
            )
        if request.content_type == "application/json":
            value: Any = await body_of(request, "take the result")
            text = (
                value
                if isinstance(value, str)
                else value.get("text")
                if isinstance(value, dict) and isinstance(value.get("text"), str)
                else None
            )
            await asyncio.shield(self._tasks.set_result(record, msgspec.json.encode(value), text))
        else:
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                raise InvalidField("cannot take the result: it is neither JSON nor UTF-8 text", field="body") from error
            await asyncio.shield(self._tasks.set_result(record, msgspec.json.encode(text), text))
        return ok({"ok": True})

    async def _get_result(self, request: web.Request) -> web.StreamResponse:
        found = self._tasks.result(self._record(request))
        return ok({"result": msgspec.Raw(found.json), "text": found.text})

    # -- memory --------------------------------------------------------------------------------------------------------

    def _owner(self, request: web.Request) -> tuple[Scope, str, Record]:
        record = self._record(request)
        try:
            scope = Scope(request.match_info["scope"])
        except ValueError:
            raise NotFound(
                f"cannot use memory scope {request.match_info['scope'][:40]!r}: there are {', '.join(Scope)}"
            ) from None
        owner = record.id if scope is Scope.TASK else f"{record.spec.tenant}/{record.user}"
        return scope, owner, record

    async def _memory_list(self, request: web.Request) -> web.StreamResponse:
        scope, owner, _ = self._owner(request)
        limit = int(number(request, "limit", 1000, 1, 1000))
        found = self._memory.list(scope, owner, request.query.get("prefix", ""), limit)
        keys = [
            {
                "key": key,
                "size": len(entry.value),
                "updated_at": entry.updated_at,
                "expires_at": entry.expires_at or None,
            }
            for key, entry in found
        ]
        return ok({"keys": keys})

    async def _memory_get(self, request: web.Request) -> web.StreamResponse:
        scope, owner, _ = self._owner(request)
        entry = self._memory.get(scope, owner, request.match_info["key"])
        if entry is None:
            raise NotFound(
                f"cannot recall {request.match_info['key'][:80]!r}: nothing is kept under it", code="no_such_key"
            )
        headers = {
            "Content-Type": entry.content_type,
            "X-Agentd-Updated-At": f"{entry.updated_at:.3f}",
            "X-Agentd-Writer": entry.writer,
        }
        if entry.expires_at:
            headers["X-Agentd-Expires-At"] = f"{entry.expires_at:.3f}"
        return web.Response(body=entry.value, headers=headers)

    async def _memory_put(self, request: web.Request) -> web.StreamResponse:
        scope, owner, record = self._owner(request)
        ttl = number(request, "ttl_s", 0.0, 0.001, 1e9) if "ttl_s" in request.query else None
        kind = request.headers.get("Content-Type", "application/octet-stream")[:200]
        value = await request.read()
        keeping = self._memory.put(scope, owner, request.match_info["key"], value, kind, ttl, record.id)
        entry = await asyncio.shield(keeping)  # what arrived whole is kept, even if nobody waits for the answer
        return ok({"key": request.match_info["key"], "size": len(entry.value), "expires_at": entry.expires_at or None})

    async def _memory_delete(self, request: web.Request) -> web.StreamResponse:
        scope, owner, _ = self._owner(request)
        return ok({"deleted": await self._memory.delete(scope, owner, request.match_info["key"])})

    # -- models --------------------------------------------------------------------------------------------------------

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self._record(request)
        return web.Response(body=self._proxy.models(), content_type="application/json")

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        record = self._record(request)
        raw = await request.read()
        async with AsyncExitStack() as scope:
            try:
                answer = await self._proxy.chat(raw, record.id, record.life.epoch, scope)
            except AgentdError as error:
                return web.Response(
                    status=error.status,
                    body=error_body(error.message, "invalid_request_error", error.code),
                    content_type="application/json",
                )
            if answer.stream is None:
                return web.Response(status=answer.status, body=answer.body, headers=answer.headers)
            response = web.StreamResponse(status=answer.status, headers=answer.headers)
            await response.prepare(request)
            try:
                async for event in answer.stream:
                    await response.write(event)
            finally:
                await answer.stream.aclose()  # type: ignore[attr-defined]  # an async generator: its cleanup must not wait for the collector
            await response.write_eof()
            return response
