"""Configuration, journal, inventory, and the two HTTP APIs at their edges."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pynvml
import pytest
import structlog
from aiohttp import web
from aiohttp.test_utils import TestServer

from agentd.api.agent import AgentApi
from agentd.api.control import About, ControlApi
from agentd.compute import inventory
from agentd.compute.capacity import Capacity
from agentd.core.errors import InvalidField
from agentd.core.places import Places
from agentd.daemon import config
from agentd.daemon import logging as log_setup
from agentd.daemon.journal import Journal
from agentd.llm.proxy import Proxy
from agentd.llm.settings import LlmSettings
from agentd.network.identity import Caller, Callers
from agentd.storage.episodic import EpisodicStore
from agentd.tasks import spec
from agentd.tasks.states import Life, State
from agentd.tasks.store import Record, Store
from agentd.tasks.supervisor import Tasks

TOKEN = {"Authorization": "Bearer token-1"}


# -- configuration ---------------------------------------------------------------------------------------------------------


def write(places: Places, name: str, text: str) -> None:
    path = places.config / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert config.load(Places(tmp_path)) == config.Config()


def test_drop_ins_win_key_by_key_in_order_of_their_names(tmp_path: Path) -> None:
    places = Places(tmp_path)
    write(places, "agentd.toml", '[log]\nlevel = "debug"\ntask_limit = "1M"\n')
    write(places, "agentd.toml.d/10.toml", '[log]\nlevel = "warning"\n')
    write(places, "agentd.toml.d/20.toml", '[log]\nlevel = "error"\n')
    found = config.load(places)
    assert (found.log.level, found.log.task_limit) == ("error", "1M")


@pytest.mark.parametrize(
    ("text", "field", "hint"),
    [
        ('[log]\nlevle = "info"', "log.levle", "level"),
        ('[lgo]\nlevel = "info"', "lgo", "log"),
        ('[log]\nlevel = "loud"', "log.level", "debug"),
        ('[log]\ntask_limit = "1K"', "log.task_limit", "16M"),
        ('[log]\ntasks = "syslog"', "log.tasks", None),
        ("[tasks]\nmax_running = -1", "tasks", None),
        ('[[llm.providers]]\nname = "x"\nbase_url = "nope"', "llm.providers.base_url", "https"),
        ('[[llm.providers]]\nname = "x"\nbase_url = "http://x"\nkey = "sk"', "llm.providers[0].key", None),
    ],
)
def test_a_wrong_key_is_named_with_the_permitted_ones(tmp_path: Path, text: str, field: str, hint: str | None) -> None:
    places = Places(tmp_path)
    write(places, "agentd.toml", text)
    with pytest.raises(InvalidField) as caught:
        config.load(places)
    assert caught.value.field == field
    assert hint is None or hint in (caught.value.hint or "")


def test_a_file_that_is_no_toml_says_where(tmp_path: Path) -> None:
    write(Places(tmp_path), "agentd.toml", "[log\n")
    with pytest.raises(InvalidField, match="line 1"):
        config.load(Places(tmp_path))


def test_a_credential_that_others_can_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    places = Places(tmp_path)
    write(places, "credentials/openai", "sk-1\n")
    path = places.config / "credentials/openai"
    path.chmod(0o644)
    with pytest.raises(InvalidField, match="others can read it"):
        config.credentials(places)
    path.chmod(0o600)
    assert config.credentials(places) == {"openai": "sk-1"}


def test_config_check_and_show_end_with_the_right_codes(tmp_path: Path) -> None:
    environ = os.environ | {"AGENTD_ROOT": str(tmp_path)}
    call = [sys.executable, "-m", "agentd.daemon", "config"]
    good = subprocess.run([*call, "check"], env=environ, capture_output=True, text=True, check=False)
    shown = subprocess.run([*call, "show"], env=environ, capture_output=True, text=True, check=False)
    assert good.returncode == shown.returncode == 0 and '"max_queued": 100000' in shown.stdout
    (tmp_path / "bad.toml").write_text("x = 1")
    bad = subprocess.run(
        [*call, "check", str(tmp_path / "bad.toml")], env=environ, capture_output=True, text=True, check=False
    )
    assert bad.returncode == 1 and "unknown field 'x'" in bad.stderr


# -- journal and inventory -------------------------------------------------------------------------------------------------


def test_a_journal_entry_has_its_fields_and_newlines_survive(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "j"))
        server.settimeout(5)
        Journal(str(tmp_path / "j")).send("two\nlines", 6, {"AGENTD_TASK": "t", "AGENTD_RAW": b"\xff"})
        packet = server.recv(1 << 16)
    assert packet.startswith(b"MESSAGE\n" + (9).to_bytes(8, "little") + b"two\nlines\n")
    assert b"AGENTD_TASK=t\n" in packet and b"AGENTD_RAW=\xff\n" in packet and b"PRIORITY=6\n" in packet


def test_a_journal_that_is_away_is_no_error(tmp_path: Path) -> None:
    Journal(str(tmp_path / "none")).line("t", "stdout", b"x")
    assert not Journal.present(str(tmp_path / "none"))


def test_a_host_without_a_gpu_driver_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    found = inventory.take(tmp_path)
    assert found.gpus == () and found.cpus >= 1 and found.memory_bytes > found.memory_available_bytes > 0


def test_gpus_are_what_nvml_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        total, free = 80 << 30, 60 << 30

    answers: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda _: Memory,
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
        "nvmlDeviceGetName": lambda _: "fake",
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    found = inventory.take(tmp_path).gpus
    assert [(gpu.uuid, gpu.memory_free_bytes) for gpu in found] == [("GPU-0", 60 << 30), ("GPU-1", 60 << 30)]


# -- the agent API -----------------------------------------------------------------------------------------------------------


class Apis:
    def __init__(self, agent: str, control: Path, tasks: Tasks, record: Record, session: aiohttp.ClientSession):
        self.agent = agent
        self.control = control
        self.tasks = tasks
        self.record = record
        self.session = session

    async def ask(
        self, method: str, path: str, *, headers: dict[str, str] | None = None, **more: Any
    ) -> tuple[int, Any]:
        async with self.session.request(
            method, self.agent + path, headers=TOKEN if headers is None else headers, **more
        ) as answer:
            is_json = answer.content_type == "application/json"
            return answer.status, await answer.json() if is_json else await answer.read()

    async def manage(self, method: str, path: str, **more: Any) -> tuple[int, Any]:
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.control))) as session:
            async with session.request(method, f"http://agentd/v1{path}", **more) as answer:
                return answer.status, await answer.json()


@pytest.fixture
async def apis(tmp_path: Path) -> AsyncIterator[Apis]:
    store = Store(tmp_path / "state", time.time)
    memory = EpisodicStore(tmp_path / "memory", time.time)
    callers = Callers()
    record = Record(
        id="taska",
        seq=1,
        spec=spec.parse({"command": ["x"]}),
        user="eve",
        uid=1,
        submitted_at=1.0,
        life=Life(state=State.RUNNING, epoch=1),
    )
    await store.save(record)
    tasks = Tasks(
        store=store,
        memory=memory,
        callers=callers,
        warden_socket=tmp_path / "none",
        logs=tmp_path / "logs",
        log_limit_bytes=1 << 20,
        capacity=Capacity(4, 1 << 40, 4),
        most_queued=10,
        journal=None,
    )
    record = next(iter(tasks.list(_root())))
    proxy = Proxy(LlmSettings(), {}, tasks.record_call)
    callers.admit(("127.0.0.1",), Caller("taska", 1, "token-1"))
    agent = TestServer(AgentApi(tasks, memory, proxy, callers).app())
    await agent.start_server()

    async def doctor() -> dict[str, bool]:
        return {"ok": True}

    about = About(lambda: {"version": "x"}, doctor, dict)
    runner = web.AppRunner(ControlApi(tasks, about, os.getuid()).app())
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "c.sock")).start()
    async with aiohttp.ClientSession() as session:
        yield Apis(str(agent.make_url("")), tmp_path / "c.sock", tasks, record, session)
    await runner.cleanup()
    await agent.close()
    store.close()
    memory.close()


def _root() -> Any:
    from agentd.tasks.supervisor import Principal

    return Principal(0, "root", True)


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic token-1"}, {"x-api-key": ""}]
)
async def test_without_the_right_token_there_is_only_401(apis: Apis, headers: dict[str, str]) -> None:
    for path in ("/", "/v1/task", "/v1/memory/user/x", "/openai/v1/models", "/nothing"):
        assert (await apis.ask("GET", path, headers=headers))[0] == 401
    assert (await apis.ask("GET", "/v1/task", headers={"x-api-key": "token-1"}))[0] == 200


async def test_memory_is_kept_listed_and_deleted(apis: Apis) -> None:
    assert (await apis.ask("GET", "/v1/memory/user/notes/a"))[0] == 404
    status, kept = await apis.ask(
        "PUT", "/v1/memory/user/notes/a?ttl_s=60", data=b'{"x":1}', headers=TOKEN | {"Content-Type": "application/json"}
    )
    assert status == 200 and kept["expires_at"] > time.time()
    assert await apis.ask("GET", "/v1/memory/user/notes/a") == (200, {"x": 1})
    assert (await apis.ask("GET", "/v1/memory/task/notes/a"))[0] == 404
    _, listed = await apis.ask("GET", "/v1/memory/user?prefix=notes/")
    assert [one["key"] for one in listed["keys"]] == ["notes/a"]
    assert await apis.ask("DELETE", "/v1/memory/user/notes/a") == (200, {"deleted": True})
    assert await apis.ask("DELETE", "/v1/memory/user/notes/a") == (200, {"deleted": False})


@pytest.mark.parametrize(
    ("method", "path", "more", "status", "code"),
    [
        ("GET", "/v1/memory/planet/k", {}, 404, "not_found"),
        ("PUT", "/v1/memory/user/k?ttl_s=-1", {"data": b"x"}, 400, "invalid_field"),
        ("PUT", "/v1/memory/user/k?ttl_s=soon", {"data": b"x"}, 400, "invalid_field"),
        ("PUT", "/v1/memory/user/k", {"data": bytes(2 << 20)}, 413, "too_large"),
        ("PUT", "/v1/memory/user/k", {"data": bytes(17 << 20)}, 413, "too_large"),
        ("POST", "/v1/task/progress", {"data": b"{"}, 400, "invalid_json"),
        ("POST", "/v1/task/progress", {"json": {"text": 1}}, 400, "invalid_field"),
        ("POST", "/v1/task/progress", {"json": {"text": "x", "fraction": 2}}, 400, "invalid_field"),
        ("PUT", "/v1/result", {"data": bytes(2 << 20)}, 413, "too_large"),
        ("PUT", "/v1/result", {"data": b"\xff\xfe"}, 400, "invalid_field"),
        ("GET", "/v1/result", {}, 404, "no_result"),
        ("GET", "/nothing", {}, 404, "not_found"),
        ("DELETE", "/v1/task", {}, 405, "method_not_allowed"),
    ],
)
async def test_bad_input_gets_its_reason(
    apis: Apis, method: str, path: str, more: dict[str, Any], status: int, code: str
) -> None:
    got, body = await apis.ask(method, path, **more)
    assert (got, body["error"]["code"]) == (status, code)


async def test_result_and_progress_reach_the_operator(apis: Apis) -> None:
    await apis.ask("POST", "/v1/task/progress", json={"text": "half", "fraction": 0.5})
    await apis.ask("PUT", "/v1/result", json={"text": "done", "n": 1})
    _, shown = await apis.manage("GET", "/tasks/taska")
    assert shown["progress"]["text"] == "half" and shown["has_result"]
    assert await apis.manage("GET", "/tasks/taska/result") == (
        200,
        {"id": "taska", "state": "running", "result": {"text": "done", "n": 1}, "text": "done"},
    )


async def test_a_model_call_is_in_the_tasks_totals(apis: Apis) -> None:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "A sentence that is quite long enough to be quoted."}],
    }
    assert (await apis.ask("POST", "/openai/v1/chat/completions", json=body))[0] == 200
    _, shown = await apis.manage("GET", "/tasks/tas")
    assert shown["llm"]["requests"] == 1 and shown["llm"]["scripted"] and shown["llm"]["input_tokens"] > 0


# -- the control API ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "more", "status", "code"),
    [
        ("POST", "/tasks", {"data": b"{"}, 400, "invalid_json"),
        ("POST", "/tasks", {"json": []}, 400, "invalid_field"),
        ("POST", "/tasks", {"json": {"command": ["x"], "memry": 1}}, 400, "unknown_field"),
        ("GET", "/tasks/zzz", {}, 404, "no_such_task"),
        ("GET", "/tasks?state=asleep", {}, 400, "invalid_field"),
        ("GET", "/tasks/taska/result", {}, 404, "no_result"),
        ("GET", "/tasks/taska/logs?stream=both", {}, 400, "invalid_field"),
        ("GET", "/tasks/taska/wait?timeout_s=x", {}, 400, "invalid_field"),
        ("POST", "/tasks/taska/kill", {"json": {"signal": "NOPE"}}, 400, "invalid_field"),
        ("POST", "/tasks/taska/stop", {"json": {"grace_s": -1}}, 400, "invalid_field"),
        ("DELETE", "/tasks/taska", {}, 409, "wrong_state"),
        ("GET", "/nothing", {}, 404, "not_found"),
        ("PUT", "/tasks", {}, 405, "method_not_allowed"),
    ],
)
async def test_the_documented_errors(
    apis: Apis, method: str, path: str, more: dict[str, Any], status: int, code: str
) -> None:
    got, body = await apis.manage(method, path, **more)
    assert (got, body["error"]["code"]) == (status, code)
    assert body["error"]["message"].startswith("cannot ")


async def test_a_key_that_is_no_utf8_is_a_400(apis: Apis) -> None:
    for path in ("/v1/memory/user/%FF", "/v1/memory/user/%ED%A0%80"):
        status, _ = await apis.ask("GET", path)
        assert status in (400, 404)
    status, _ = await apis.ask("GET", "/v1/memory/user?prefix=%ED%A0%80")
    assert status in (200, 400)
    assert (await apis.ask("GET", "/v1/memory/user?prefix=" + "x" * 600))[0] == 400


@pytest.mark.skipif(os.getuid() != 0, reason="another user can only be played by root")
async def test_another_user_sees_neither_the_task_nor_the_configuration(apis: Apis) -> None:
    def as_nobody(path: str) -> int:
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(5)
            os.chdir(apis.control.parent)
            os.chmod(apis.control.parent, 0o755)
            os.chmod(apis.control, 0o666)
            os.seteuid(65534)
            try:
                channel.connect(apis.control.name)
            finally:
                os.seteuid(0)
            channel.sendall(f"GET /v1{path} HTTP/1.1\r\nHost: agentd\r\nConnection: close\r\n\r\n".encode())
            return int(channel.makefile("rb").readline().split()[1])

    before = Path.cwd()
    try:
        seen = {
            path: await asyncio.to_thread(as_nobody, path) for path in ("/tasks/taska", "/config", "/events", "/tasks")
        }
    finally:
        os.chdir(before)
    assert seen == {"/tasks/taska": 404, "/config": 403, "/events": 403, "/tasks": 200}
    assert (await apis.manage("GET", "/tasks/taska"))[0] == 200


def test_log_lines_reach_the_journal_as_fields(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "j"))
        server.settimeout(5)
        write_entry = log_setup._ToJournal(Journal(str(tmp_path / "j")))
        with pytest.raises(structlog.DropEvent):
            write_entry(
                None,
                "warning",
                {"event": "task failed", "AGENTD_TASK": "t1", "reason": "oom", "detail": None, "level": "warning"},
            )
        packet = server.recv(1 << 16)
    assert b"MESSAGE=t1: task failed reason=oom\n" in packet
    assert b"PRIORITY=4\n" in packet and b"AGENTD_TASK=t1\n" in packet and b"AGENTD_REASON=oom\n" in packet
    assert b"DETAIL" not in packet
