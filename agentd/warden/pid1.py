"""PID 1 of a sandbox: starts programs, reaps, forwards signals, and writes how the main one ended.

It listens on a control socket that only the warden can name, so a new warden finds it again. It keeps the read ends of the
main process's output, so that output waits in the pipe, and nobody gets SIGPIPE, while daemon and warden are both away.

Packets in: `start {argv, env, cwd, uid, gid}`, `signal {signo}`, `status`, `pipes`, `release`. Packets out: an answer to each, and `exited`.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import signal
import socket
import time
from typing import Any

from agentd.warden import packets
from agentd.warden import syscalls as sc

OPEN_FILES = 65536


class Pid1:
    """The state of one sandbox's PID 1."""

    def __init__(self, control: int, exit_fd: int, pipes: dict[str, int], last_capability: int):
        self._listener = socket.socket(fileno=control)
        self._exit_fd = exit_fd
        self._pipes = pipes
        self._last_capability = last_capability
        self._wardens: dict[int, socket.socket] = {}
        self._main: int | None = None
        self._exit: dict[str, Any] | None = None
        self._done = False
        self._poll = select.poll()

    def serve(self) -> None:
        """Until released."""
        wake_r, wake_w = os.pipe()
        os.set_blocking(wake_r, False)
        os.set_blocking(wake_w, False)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        self._poll.register(wake_r, select.POLLIN)
        self._poll.register(self._listener, select.POLLIN)
        while not self._done:
            for fd, _ in self._poll.poll():
                if fd == wake_r:
                    try:
                        os.read(wake_r, 512)
                    except BlockingIOError:
                        pass
                elif fd == self._listener.fileno():
                    peer, _ = self._listener.accept()
                    self._wardens[peer.fileno()] = peer
                    self._poll.register(peer, select.POLLIN)
                else:
                    self._hear(fd)
            self._reap()

    def _hear(self, fd: int) -> None:
        peer = self._wardens[fd]
        try:
            request, fds = packets.receive(peer)
            packets.close(fds)
            if request is None:
                raise OSError("it left")
            answer, give = self._answer(request)
            packets.send(peer, answer, give)
        except OSError:
            self._poll.unregister(fd)
            self._wardens.pop(fd).close()

    def _answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        match request["op"]:
            case "start":
                return self._start(request), []
            case "signal":
                if self._main is not None and self._exit is None:
                    try:
                        os.kill(self._main, request["signo"])
                    except ProcessLookupError:
                        pass
                return {"ok": True}, []
            case "pipes":
                return {"ok": True}, [self._pipes["stdout_r"], self._pipes["stderr_r"]]
            case "status":
                return {"ok": True, "started": self._main is not None, "exit": self._exit}, []
            case "release":
                self._done = True
                return {"ok": True}, []
        return {"error": "unknown op"}, []

    def _start(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._main is not None:
            return {"error": "already started"}
        report_r, report_w = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                self._exec(request)
            except OSError as error:
                os.write(report_w, json.dumps({"errno": error.errno, "error": str(error)}).encode()[:2000])
            finally:
                os._exit(127)
        self._main = pid
        os.close(report_w)
        os.close(self._pipes.pop("stdout_w"))
        os.close(self._pipes.pop("stderr_w"))
        report = os.read(report_r, 4096)
        os.close(report_r)
        if report:
            return {"ok": True, "exec": json.loads(report)}
        return {"ok": True}

    def _exec(self, request: dict[str, Any]) -> None:
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            try:
                signal.signal(number, signal.SIG_DFL)
            except (OSError, ValueError):
                pass
        os.setsid()
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(self._pipes["stdout_w"], 1)
        os.dup2(self._pipes["stderr_w"], 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        hard = min(OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
        sc.prctl(sc.PR_SET_DUMPABLE, 1)  # else /proc/self belongs to the host's root; exec resets it anyway
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
        sc.drop_bounding_up_to(self._last_capability)
        os.setgroups([])
        os.setresgid(request["gid"], request["gid"], request["gid"])
        os.setresuid(request["uid"], request["uid"], request["uid"])
        os.umask(0o022)
        os.chdir(request["cwd"])
        # The report pipe closes on exec; the control socket, exit record and pipe ends are close-on-exec from birth.
        environment = request["env"]
        argv = request["argv"]
        problem = OSError(errno.ENOENT, f"no program {argv[0]!r} on PATH")
        for path in _candidates(argv[0], environment.get("PATH", "/usr/bin:/bin")):
            try:
                os.execve(path, argv, environment)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                problem = OSError(error.errno, f"{path}: {os.strerror(error.errno or 0)}")
        raise problem

    def _reap(self) -> None:
        while True:
            try:
                pid, status, _ = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._main and self._exit is None:
                self._main_ended(status)

    def _main_ended(self, status: int) -> None:
        """The task ends with its main process: end the rest, so that the output pipes reach their end, then say so."""
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            pass
        while True:
            try:
                os.wait4(-1, 0)
            except ChildProcessError:
                break
        code = os.waitstatus_to_exitcode(status)
        self._exit = {
            "code": code if code >= 0 else None,
            "signal": -code if code < 0 else None,
            "ended_at": time.time(),
        }
        os.write(self._exit_fd, json.dumps(self._exit).encode() + b"\n")
        os.fsync(self._exit_fd)
        for peer in self._wardens.values():
            try:
                packets.send(peer, {"event": "exited", "exit": self._exit})
            except OSError:
                pass


def _candidates(name: str, path: str) -> list[str]:
    if "/" in name:
        return [name]
    return [f"{directory or '.'}/{name}" for directory in path.split(":")]


def run(
    status: int,
    control: int,
    exit_fd: int,
    stdout_r: int,
    stdout_w: int,
    stderr_r: int,
    stderr_w: int,
    *,
    last_capability: int,
) -> None:
    """Be PID 1 with these descriptors until released; says `ok` on `status` first."""
    os.umask(0o022)
    pipes = {"stdout_r": stdout_r, "stdout_w": stdout_w, "stderr_r": stderr_r, "stderr_w": stderr_w}
    one = Pid1(control, exit_fd, pipes, last_capability)
    sc.prctl(sc.PR_SET_DUMPABLE, 0)
    os.write(status, b"ok")
    os.close(status)
    one.serve()
    os._exit(0)
