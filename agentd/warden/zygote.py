"""The process that forks: executed as `python -I -S zygote.py PACKAGE_ROOT SOCKET_FD STAGE`, it imports hardly anything.

For each `spawn` packet it prepares a user namespace, clones a child into its cgroup and six new namespaces, and answers
with the child's pid and pidfd. The child builds its own root and becomes the sandbox's PID 1 (`pid1`). The zygote lives in the host's
mount namespace, so it is here that sources become detached mounts; the child gets descriptors, not paths.

Order inside the child, and why: the user namespace is entered last, so every other namespace belongs to the initial one and not
even root inside may mount, rename the host, change addresses or load nft rules.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from typing import Any

sys.path.insert(0, sys.argv[1] if len(sys.argv) > 1 else "")

from agentd.warden import packets, pid1, rootfs
from agentd.warden import syscalls as sc

NAMESPACES = sc.CLONE_NEWNS | sc.CLONE_NEWPID | sc.CLONE_NEWIPC | sc.CLONE_NEWUTS | sc.CLONE_NEWTIME


def new_user_namespace(base: int, width: int) -> int:
    """A descriptor of a user namespace that maps ids 0 … width-1 to base …, and allows no namespace below it.

    Raises:
        OSError: the kernel refuses (for example, user.max_user_namespaces is 0).
    """
    ready_r, ready_w = os.pipe()
    mapped_r, mapped_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ready_r)
            os.close(mapped_w)
            sc.unshare(sc.CLONE_NEWUSER)
            os.write(ready_w, b"u")
            os.read(mapped_r, 1)
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            with open("/proc/sys/user/max_user_namespaces", "w") as file:
                file.write("0")
            os.write(ready_w, b"k")
            os.read(mapped_r, 1)
        except OSError as error:
            os.write(ready_w, b"!" + str(error).encode())
        finally:
            os._exit(0)
    try:
        os.close(ready_w)
        os.close(mapped_r)
        _expect(ready_r, b"u", "cannot make a user namespace")
        for kind in ("uid", "gid"):
            with open(f"/proc/{pid}/{kind}_map", "w") as file:
                file.write(f"0 {base} {width}")
        os.write(mapped_w, b"m")
        _expect(ready_r, b"k", "cannot close a user namespace to nesting")
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready_r)
        os.close(mapped_w)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _expect(fd: int, wanted: bytes, what: str) -> None:
    got = os.read(fd, 200)
    if got != wanted:
        raise OSError(0, f"{what}: {got[1:].decode(errors='replace') or 'it ended'}")


def spawn(plan: dict[str, Any], fds: dict[str, int], stage: str, channel: socket.socket) -> tuple[int, int]:
    """Clone one sandbox; `(pid, pidfd)`. The child reports on the `status` descriptor and never returns from here."""
    userns = new_user_namespace(plan["id_base"], plan["id_range"])
    trees: list[int] = []
    go_r, go_w = os.pipe()
    try:
        for bind in plan["root"]["binds"]:
            fd = fds.get(bind.get("fd", ""), -1)
            tree = sc.open_tree(fd) if fd >= 0 else sc.open_tree(sc.AT_FDCWD, bind["source"])
            trees.append(tree)
            attributes = sc.MOUNT_ATTR_NOSUID
            attributes |= 0 if bind.get("device") else sc.MOUNT_ATTR_NODEV
            attributes |= sc.MOUNT_ATTR_RDONLY if bind["read_only"] else 0
            sc.set_mount_flags(tree, attributes)
        pid, pidfd = sc.clone3(NAMESPACES, fds.get("cgroup", -1))
        if pid == 0:
            try:
                channel.close()
                os.close(go_w)
                if os.read(go_r, 1) != b"g":
                    os._exit(1)
                os.close(go_r)
                _become_pid1(plan, fds, trees, userns, stage)
            except BaseException as error:
                os.write(fds["status"], f"!{type(error).__name__}: {error}".encode()[:500])
            finally:
                os._exit(1)
        try:
            for name, fd in fds.items():
                if name.startswith("v1:"):
                    os.write(fd, str(pid).encode())
            os.write(go_w, b"g")
        except OSError:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
            raise
        return pid, pidfd
    finally:
        packets.close([userns, go_r, go_w, *trees])


def _become_pid1(plan: dict[str, Any], fds: dict[str, int], trees: list[int], userns: int, stage: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("0")  # with CAP_SYS_RESOURCE this is also the floor, below which nobody in the sandbox gets
    sc.set_title("agentd-init")
    sc.setns(fds["netns"], sc.CLONE_NEWNET)
    sc.unshare(sc.CLONE_NEWCGROUP)
    sc.join_new_session_keyring()
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last_capability = int(file.read())
    rootfs.build(plan["root"], trees, stage)
    socket.sethostname(plan["hostname"])
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    sc.setns(userns, sc.CLONE_NEWUSER)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    kept = _keep_only(
        [fds[name] for name in ("status", "control", "exit", "stdout_r", "stdout_w", "stderr_r", "stderr_w")]
    )
    keep = frozenset({sc.CAP_KILL, sc.CAP_SETGID, sc.CAP_SETUID, sc.CAP_SETPCAP})
    sc.drop_bounding_up_to(last_capability, keep)
    sc.prctl(sc.PR_CAP_AMBIENT, sc.PR_CAP_AMBIENT_CLEAR_ALL)
    sc.set_capabilities(sum(1 << capability for capability in keep))
    sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
    sc.prctl(sc.PR_SET_DUMPABLE, 0)
    for program in plan["filters"]:
        sc.install_filter(bytes.fromhex(program))
    pid1.run(*kept, last_capability=last_capability)


def _keep_only(fds: list[int]) -> list[int]:
    """Close every descriptor but 0, 1, 2 and `fds`, which are moved to 3 … and returned in order."""
    above = [os.dup(fd) for fd in fds]
    while min(above) < 3 + len(fds):
        above = [os.dup(fd) if fd < 3 + len(fds) else fd for fd in above]
    for index, fd in enumerate(above):
        os.dup2(fd, 3 + index, inheritable=False)
    sc.close_range(3 + len(fds))
    return list(range(3, 3 + len(fds)))


def main() -> None:
    """Serve `spawn` packets until the server goes away."""
    channel = socket.socket(fileno=int(sys.argv[2]))
    stage = sys.argv[3]
    os.umask(0o022)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sc.set_title("agentd-zygote")
    sc.prctl(sc.PR_SET_DUMPABLE, 0)
    gc.collect()
    gc.freeze()
    while True:
        request, fds = packets.receive(channel)
        if request is None:
            return
        named = dict(zip(request["fds"], fds, strict=True))
        try:
            pid, pidfd = spawn(request["plan"], named, stage, channel)
        except OSError as error:
            packets.send(channel, {"error": str(error), "errno": error.errno})
        else:
            packets.send(channel, {"pid": pid}, [pidfd])
            os.close(pidfd)
        finally:
            packets.close(fds)


if __name__ == "__main__":
    main()
