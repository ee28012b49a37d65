"""The control API (docs/api.md): thin; it reads the request, asks `Tasks`, and writes the answer. Identity is SO_PEERCRED."""

from __future__ import annotations

import asyncio
import pwd
import signal
import socket
import struct
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from agentd.api.answers import body_of, errors, number, ok
from agentd.core.errors import InvalidField, NotPermitted
from agentd.tasks import spec
from agentd.tasks.output import STDERR, STDOUT
from agentd.tasks.supervisor import Principal, Tasks

BODY_LIMIT_BYTES = 32 << 20
LONGEST_WAIT_S = 300.0
STREAMS = {"all": frozenset({STDOUT, STDERR}), "stdout": frozenset({STDOUT}), "stderr": frozenset({STDERR})}


class About:
    """What the daemon tells of itself; each is a function, so that an answer is as of now."""

    def __init__(self, version: Callable[[], dict[str, Any]], doctor: Callable[[], Any], config: Callable[[], Any]):
        self.version = version
        self.doctor = doctor
        self.config = config


class ControlApi:
    """Handlers of the Unix socket."""

    def __init__(self, tasks: Tasks, about: About, daemon_uid: int):
        self._tasks = tasks
        self._about = about
        self._daemon_uid = daemon_uid

    def app(self) -> web.Application:
        """The application."""
        app = web.Application(middlewares=[errors], client_max_size=BODY_LIMIT_BYTES)
        app.add_routes(
            [
                web.get("/v1/version", self._version),
                web.get("/v1/doctor", self._doctor),
                web.get("/v1/config", self._config),
                web.get("/v1/schema/task", self._schema),
                web.get("/v1/events", self._events),
                web.get("/v1/tasks", self._list),
                web.post("/v1/tasks", self._submit),
                web.get("/v1/tasks/{id}", self._show),
                web.delete("/v1/tasks/{id}", self._remove),
                web.get("/v1/tasks/{id}/wait", self._wait),
                web.get("/v1/tasks/{id}/result", self._result),
                web.get("/v1/tasks/{id}/logs", self._logs),
                web.post("/v1/tasks/{id}/stop", self._stop),
                web.post("/v1/tasks/{id}/kill", self._kill),
            ]
        )
        return app

    def _who(self, request: web.Request) -> Principal:
        channel = request.transport.get_extra_info("socket") if request.transport else None
        if channel is None:
            raise NotPermitted("cannot tell who asks", code="not_permitted")
        _, uid, _ = struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        try:
            name = pwd.getpwuid(uid).pw_name
        except KeyError:
            name = str(uid)
        return Principal(uid, name, uid in (0, self._daemon_uid))

    async def _version(self, _: web.Request) -> web.StreamResponse:
        return ok(self._about.version())

    async def _doctor(self, _: web.Request) -> web.StreamResponse:
        return ok(await self._about.doctor())

    async def _config(self, request: web.Request) -> web.StreamResponse:
        if not self._who(request).operator:
            raise NotPermitted("cannot show the configuration: only root may", code="not_permitted")
        return ok(self._about.config())

    async def _schema(self, _: web.Request) -> web.StreamResponse:
        return ok(spec.schema())

    async def _list(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        found = self._tasks.list(
            self._who(request),
            everything=query.get("all", "") not in ("", "0", "false"),
            state=query.get("state"),
            tenant=query.get("tenant"),
            kind=query.get("class"),
        )
        return ok({"tasks": [self._tasks.describe(record, with_spec=False) for record in found]})

    async def _submit(self, request: web.Request) -> web.StreamResponse:
        who = self._who(request)
        raw = await body_of(request, spec.DOING)
        # Parsing decodes up to 24 MiB of base64: not on the event loop.
        parsed = (
            spec.parse(raw) if len(str(request.content_length or 0)) < 6 else await asyncio.to_thread(spec.parse, raw)
        )
        record = await self._tasks.submit(parsed, who)
        return ok(self._tasks.describe(record), 201)

    async def _show(self, request: web.Request) -> web.StreamResponse:
        record = self._tasks.find(request.match_info["id"], self._who(request))
        await self._tasks.fresh_usage(record)
        return ok(self._tasks.describe(record))

    async def _remove(self, request: web.Request) -> web.StreamResponse:
        record = self._tasks.find(request.match_info["id"], self._who(request))
        await self._tasks.remove(record, force=request.query.get("force", "") not in ("", "0", "false"))
        return ok({"id": record.id, "removed": True})

    async def _wait(self, request: web.Request) -> web.StreamResponse:
        record = self._tasks.find(request.match_info["id"], self._who(request))
        await self._tasks.wait(record, number(request, "timeout_s", 30.0, 0.0, LONGEST_WAIT_S))
        return ok(self._tasks.describe(record))

    async def _result(self, request: web.Request) -> web.StreamResponse:
        record = self._tasks.find(request.match_info["id"], self._who(request))
        found = self._tasks.result(record)
        return ok({"id": record.id, "state": record.life.state, "result": msgspec.Raw(found.json), "text": found.text})

    async def _stop(self, request: web.Request) -> web.StreamResponse:
        record = self._tasks.find(request.match_info["id"], self._who(request))
        body = await body_of(request, "stop the task")
        grace = body.get("grace_s") if isinstance(body, dict) else None
        if grace is not None and (
            not isinstance(grace, int | float) or isinstance(grace, bool) or not 0 <= grace <= 3600
        ):
            raise InvalidField(
                f"cannot stop the task: grace_s: {grace!r} is not a number of seconds from 0 to 3600", field="grace_s"
            )
        await self._tasks.stop(record, grace)
        return ok(self._tasks.describe(record))

    async def _kill(self, request: web.Request) -> web.StreamResponse:
        record = self._tasks.find(request.match_info["id"], self._who(request))
        body = await body_of(request, "signal the task")
        name = str(body.get("signal", "KILL")).upper().removeprefix("SIG") if isinstance(body, dict) else ""
        try:
            wanted = signal.Signals[f"SIG{name}"]
        except KeyError:
            raise InvalidField(
                f"cannot signal the task: signal: {name[:20]!r} is none",
                field="signal",
                hint="for example TERM, INT, USR1, KILL",
            ) from None
        await self._tasks.kill(record, wanted)
        return ok(self._tasks.describe(record))

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        record = self._tasks.find(request.match_info["id"], self._who(request))
        if self._tasks.output_in_journal:
            return ok({"journald": {"AGENTD_TASK": record.id}})
        wanted = request.query.get("stream", "all")
        if wanted not in STREAMS:
            raise InvalidField(
                f"cannot show the output: stream: {wanted[:20]!r} is none",
                field="stream",
                hint="permitted: all, stdout, stderr",
            )
        tail = int(number(request, "tail", 0, 0, 1e9)) if "tail" in request.query else None
        offset = int(number(request, "offset", 0, 0, 2.0**53))
        follow = request.query.get("follow", "") not in ("", "0", "false")
        start = self._tasks.output_start(record, offset, tail)
        response = web.StreamResponse(headers={"Content-Type": "application/x-agentd-log", "Agentd-Offset": str(start)})
        await response.prepare(request)
        async for frame in self._tasks.output(record, offset=start, follow=follow, streams=STREAMS[wanted]):
            await response.write(frame)
        await response.write_eof()
        return response

    async def _events(self, request: web.Request) -> web.StreamResponse:
        who = self._who(request)
        task = request.query.get("task")
        if task:
            task = self._tasks.find(task, who).id
        elif not who.operator:
            raise NotPermitted("cannot show all events: name one of your tasks")
        after = int(number(request, "after", 0, 0, 2.0**53))
        follow = request.query.get("follow", "") not in ("", "0", "false")
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        async for line in self._tasks.events(after, task, follow=follow):
            await response.write(line)
        await response.write_eof()
        return response
