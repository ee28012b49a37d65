"""Start and stop of the daemon. It holds no privilege: every socket it cannot open itself comes from systemd or the warden."""

from __future__ import annotations

import asyncio
import grp
import os
import signal
import socket

import structlog
from aiohttp import web

from agentd import __version__
from agentd.core.errors import AgentdError
from agentd.core.places import Places
from agentd.daemon import config as configuration
from agentd.daemon import doctor, systemd, wiring
from agentd.daemon import logging as log_setup

log = structlog.get_logger("agentd")

STOP_S = 10.0
RETEST_S = 15.0
"""Between self-tests while they fail."""


def _control_socket(places: Places) -> socket.socket:
    """The listening control socket: systemd's, else one of our own that the group may use."""
    given = systemd.listening()
    if given:
        return given[0]
    path = places.control_socket
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found.bind(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)
    os.chmod(path, 0o660)
    try:
        os.chown(path, -1, grp.getgrnam("agentd").gr_gid)
    except (KeyError, PermissionError):
        pass  # without the group, only root and the daemon's own user connect
    found.listen(1024)
    return found


async def _serve_agents(daemon: wiring.Daemon) -> None:
    """Whenever the warden answers: listen in the gateway, prove the sandbox, and only then let tasks start."""
    tasks = daemon.tasks
    # An agent that hangs up cancels its handler, and so the model call that nobody waits for any more.
    runner = web.AppRunner(
        daemon.agent.app(), handle_signals=False, access_log=None, shutdown_timeout=1.0, handler_cancellation=True
    )
    await runner.setup()
    listening = False
    try:
        while True:
            await tasks.warden.ready.wait()
            try:
                if not listening:
                    for one in await tasks.warden.listen():
                        one.setblocking(False)
                        await web.SockSite(runner, one, backlog=1024).start()
                    listening = True
                failed = [check for check in await doctor.examine(tasks.warden, tasks.hello) if not check.ok]
            except AgentdError as error:
                failed = [doctor.Check("the warden answers", False, error.message, error.hint or "")]
            if failed:
                first = failed[0]
                tasks.refuse(f"the self-test failed: {first.name}: {first.detail}")
                log.error("the self-test failed", check=first.name, detail=first.detail, remedy=first.remedy)
                systemd.notify(f"STATUS=no task will start: the self-test failed: {first.name}")
                await asyncio.sleep(RETEST_S if tasks.warden.connected else 0)
                continue
            tasks.permit()
            log.info("ready")
            systemd.notify("STATUS=ready")
            await tasks.warden.lost()
    finally:
        await runner.cleanup()


async def serve(places: Places, config: configuration.Config) -> None:
    """Be the daemon until SIGTERM; tasks run on afterwards."""
    os.umask(0o027)
    daemon = wiring.build(places, config)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def reload() -> None:
        systemd.notify(systemd.reloading())
        try:
            fresh = configuration.load(places)
            daemon.proxy.reload(fresh.llm, configuration.credentials(places))
            log_setup.set_up(fresh.log.level)
            log.info("configuration reloaded")
        except AgentdError as error:
            log.error("the new configuration is not used", error=error.message, remedy=error.hint)
        systemd.notify("READY=1")

    loop.add_signal_handler(signal.SIGHUP, reload)
    await daemon.proxy.start()
    runner = web.AppRunner(daemon.control.app(), handle_signals=False, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    work: list[asyncio.Task[None]] = []
    try:
        work.append(asyncio.create_task(daemon.tasks.run(), name="tasks"))
        work.append(asyncio.create_task(_serve_agents(daemon), name="agents"))
        work.append(asyncio.create_task(systemd.watchdog(), name="watchdog"))
        control = _control_socket(places)
        control.setblocking(False)
        await web.SockSite(runner, control, backlog=1024).start()
        systemd.notify("READY=1\nSTATUS=waiting for the warden")
        log.info("started", version=__version__, pid=os.getpid())
        stopped = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait({stopped, *work[:2]}, return_when=asyncio.FIRST_COMPLETED)
        for one in done - {stopped}:
            one.result()
    finally:
        systemd.notify("STOPPING=1")
        await runner.cleanup()
        for one in work:
            one.cancel()
        await asyncio.wait(work, timeout=STOP_S)
        await daemon.proxy.close()
        daemon.store.close()
        daemon.memory.close()
