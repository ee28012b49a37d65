"""One function that builds every object and ties them together; nothing else knows them all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import msgspec

import agentd
from agentd.api.agent import AgentApi
from agentd.api.control import About, ControlApi
from agentd.compute import capacity, inventory
from agentd.core.places import Places
from agentd.core.units import parse_size
from agentd.daemon import config as configuration
from agentd.daemon import doctor
from agentd.daemon.journal import Journal
from agentd.llm.proxy import Proxy
from agentd.network.identity import Callers
from agentd.storage.episodic import EpisodicStore
from agentd.tasks.store import Store
from agentd.tasks.supervisor import Tasks


class Daemon(msgspec.Struct):
    """The objects of one daemon."""

    tasks: Tasks
    store: Store
    memory: EpisodicStore
    proxy: Proxy
    control: ControlApi
    agent: AgentApi


def build(places: Places, config: configuration.Config, clock: Callable[[], float] = time.time) -> Daemon:
    """Everything, not yet started.

    Raises:
        AgentdError: a store cannot be opened, a credential file is readable by others.
    """
    places.state.mkdir(mode=0o750, parents=True, exist_ok=True)
    host = inventory.take(places.state)
    store = Store(places.state / "state", clock)
    memory = EpisodicStore(places.state / "memory", clock)
    callers = Callers()
    tasks = Tasks(
        store=store,
        memory=memory,
        callers=callers,
        warden_socket=places.warden_socket,
        logs=places.state / "logs",
        log_limit_bytes=parse_size(config.log.task_limit),
        capacity=capacity.of(cpus=host.cpus, memory_bytes=host.memory_bytes, most_tasks=config.tasks.max_running),
        most_queued=config.tasks.max_queued,
        journal=Journal() if config.log.tasks is configuration.TaskLog.JOURNALD else None,
        clock=clock,
    )
    proxy = Proxy(config.llm, configuration.credentials(places), tasks.record_call, clock)
    started = time.monotonic()

    def version() -> dict[str, Any]:
        return {
            "version": agentd.__version__,
            "api": 1,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - started, 1),
            "root": str(places.root),
            "ready": tasks.warden.connected and tasks.blocked is None,
        }

    async def examine() -> dict[str, Any]:
        checks = await doctor.examine(tasks.warden, tasks.hello)
        facts = {
            **tasks.hello.get("facts", {}),
            **msgspec.to_builtins(inventory.take(places.state)),
            "models": ", ".join(proxy.routes.names()),
        }
        return {"ok": all(check.ok for check in checks), "checks": checks, "facts": facts}

    about = About(version, examine, lambda: configuration.show(config))
    return Daemon(
        tasks=tasks,
        store=store,
        memory=memory,
        proxy=proxy,
        control=ControlApi(tasks, about, os.getuid()),
        agent=AgentApi(tasks, memory, proxy, callers),
    )
