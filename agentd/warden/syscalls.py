"""System calls that Python does not offer, as functions that raise OSError. x86_64 and aarch64.

Loaded through `ctypes.PyDLL`, which keeps the GIL: a clone3 that returned twice with the GIL released would deadlock the child.
Sources: clone3(2), unshare(2), setns(2), mount_setattr(2), open_tree(2), move_mount(2), pivot_root(2), capset(2), prctl(2),
seccomp(2), openat2(2), close_range(2).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

_libc = ctypes.PyDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_X86 = platform.machine() == "x86_64"

# Calls above 423 have one number on every architecture.
SYS_PIVOT_ROOT = 155 if _X86 else 41
SYS_KEYCTL = 250 if _X86 else 219
SYS_CAPSET = 126 if _X86 else 91
SYS_SECCOMP = 317 if _X86 else 277
SYS_OPEN_TREE = 428
SYS_MOVE_MOUNT = 429
SYS_CLONE3 = 435
SYS_CLOSE_RANGE = 436
SYS_OPENAT2 = 437
SYS_MOUNT_SETATTR = 442

CLONE_NEWTIME = 0x00000080
CLONE_PIDFD = 0x00001000
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_INTO_CGROUP = 0x200000000

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x04

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08

PR_CAPBSET_DROP = 24
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

CAP_KILL = 5
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SETPCAP = 8


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def clone3(flags: int, cgroup_fd: int = -1) -> tuple[int, int]:
    """Fork with namespaces, straight into a cgroup: `(pid, pidfd)` in the parent, `(0, -1)` in the child.

    The caller has one thread. The interpreter's own fork hooks run around the call, as for `os.fork`.
    """
    pidfd = ctypes.c_int(-1)
    flags |= CLONE_PIDFD
    if cgroup_fd >= 0:
        flags |= CLONE_INTO_CGROUP
    sigchld = 17
    arguments = struct.pack("=11Q", flags, ctypes.addressof(pidfd), 0, 0, sigchld, 0, 0, 0, 0, 0, max(cgroup_fd, 0))
    buffer = ctypes.create_string_buffer(arguments, len(arguments))
    _libc.PyOS_BeforeFork()
    pid = _syscall(SYS_CLONE3, buffer, ctypes.c_size_t(len(arguments)))
    if pid == 0:
        _libc.PyOS_AfterFork_Child()
        return 0, -1
    number = ctypes.get_errno()
    _libc.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, f"clone3: {os.strerror(number)}")
    return pid, pidfd.value


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    """setns(2)."""
    _check(_libc.setns(fd, kind), "setns")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2)."""
    _check(
        _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode() or None),
        f"mount {kind} on {target}",
    )


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(target.encode(), flags), f"umount {target}")


def open_tree(fd: int, path: str = "") -> int:
    """A detached copy of the mount at `path` (of `fd` itself when empty), without its submounts."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (AT_EMPTY_PATH if not path else 0)
    return _check(_syscall(SYS_OPEN_TREE, fd, path.encode(), ctypes.c_uint(flags)), f"open_tree {path}")


def set_mount_flags(fd: int, attributes: int, path: str = "") -> None:
    """Set `MOUNT_ATTR_*` on the mount at `path`, or on the detached mount `fd`."""
    attr = ctypes.create_string_buffer(struct.pack("=4Q", attributes, 0, 0, 0), 32)
    flags = AT_EMPTY_PATH if not path else 0
    _check(_syscall(SYS_MOUNT_SETATTR, fd, path.encode(), flags, attr, ctypes.c_size_t(32)), f"mount_setattr {path}")


def move_mount(fd: int, target: str) -> None:
    """Attach the detached mount `fd` at `target`."""
    _check(
        _syscall(SYS_MOVE_MOUNT, fd, b"", AT_FDCWD, target.encode(), MOVE_MOUNT_F_EMPTY_PATH), f"move_mount {target}"
    )


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)."""
    _check(_syscall(SYS_PIVOT_ROOT, new.encode(), old.encode()), "pivot_root")


def prctl(option: int, argument: int = 0, argument2: int = 0) -> int:
    """prctl(2)."""
    return _check(_libc.prctl(option, ctypes.c_ulong(argument), ctypes.c_ulong(argument2), 0, 0), f"prctl {option}")


def set_title(title: str) -> None:
    """What /proc/PID/cmdline and comm show, instead of host paths: written over the arguments the kernel remembers; proc_pid_stat(5)."""
    with open("/proc/self/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    room = end - start
    ctypes.memmove(start, title.encode()[: room - 1].ljust(room, b"\0"), room)
    name = ctypes.create_string_buffer(title.encode()[:15])
    prctl(PR_SET_NAME, ctypes.addressof(name))


def join_new_session_keyring() -> None:
    """A keyring of its own for this process and its children; keyctl(2) KEYCTL_JOIN_SESSION_KEYRING."""
    _check(_syscall(SYS_KEYCTL, 1, None), "keyctl")


def set_capabilities(mask: int) -> None:
    """Make `mask` the permitted and effective set, the inheritable set empty."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = ctypes.create_string_buffer(struct.pack("=6I", low, low, 0, high, high, 0), 24)
    _check(_syscall(SYS_CAPSET, header, data), "capset")


def drop_bounding_set(keep: frozenset[int] = frozenset()) -> None:
    """Remove every capability but `keep` from the bounding set."""
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    drop_bounding_up_to(last, keep)


def drop_bounding_up_to(last: int, keep: frozenset[int] = frozenset()) -> None:
    """As `drop_bounding_set`, where /proc cannot be read."""
    for capability in range(last + 1):
        if capability not in keep:
            prctl(PR_CAPBSET_DROP, capability)


def install_filter(program: bytes) -> None:
    """Apply a seccomp BPF program to this thread for good; seccomp(2) SECCOMP_SET_MODE_FILTER."""
    code = ctypes.create_string_buffer(program, len(program))
    fprog = ctypes.create_string_buffer(struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(code)), 16)
    _check(_syscall(SYS_SECCOMP, 1, 0, fprog), "seccomp")


def close_range(first: int, last: int = 0x7FFFFFFF) -> None:
    """close_range(2)."""
    if first <= last:
        _check(_syscall(SYS_CLOSE_RANGE, ctypes.c_uint(first), ctypes.c_uint(last), 0), "close_range")


def openat2(dir_fd: int, path: str, flags: int, resolve: int) -> int:
    """openat2(2): open `path` below `dir_fd` without leaving it or following what `resolve` forbids."""
    how = ctypes.create_string_buffer(struct.pack("=3Q", flags | os.O_CLOEXEC, 0, resolve), 24)
    return _check(_syscall(SYS_OPENAT2, dir_fd, path.encode(), how, ctypes.c_size_t(24)), f"openat2 {path}")
