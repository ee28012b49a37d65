"""The system call filter, as two BPF programs that the kernel combines (the stricter answer wins).

The first knows every call by name: those libseccomp knows and `DENIED` does not name are allowed, calls it has never heard of answer
ENOSYS, so that a kernel newer than the list opens nothing. The second looks at arguments: namespaces in clone, socket families,
terminal injection. Foreign architectures are killed. Sources: seccomp(2), seccomp_rule_add(3), CVE-2017-5226, CVE-2019-10063.
"""

from __future__ import annotations

import errno
import os

import pyseccomp

DENIED_EPERM = frozenset(
    [
        "acct",
        "add_key",
        "adjtimex",
        "bpf",
        "chroot",
        "clock_adjtime",
        "clock_adjtime64",
        "clock_settime",
        "clock_settime64",
        "create_module",
        "delete_module",
        "fanotify_init",
        "finit_module",
        "fsconfig",
        "fsmount",
        "fsopen",
        "fspick",
        "get_kernel_syms",
        "init_module",
        "ioperm",
        "iopl",
        "kcmp",
        "kexec_file_load",
        "kexec_load",
        "keyctl",
        "lookup_dcookie",
        "mbind",
        "migrate_pages",
        "modify_ldt",
        "mount",
        "mount_setattr",
        "move_mount",
        "move_pages",
        "name_to_handle_at",
        "nfsservctl",
        "open_by_handle_at",
        "open_tree",
        "perf_event_open",
        "personality",
        "pidfd_getfd",
        "pivot_root",
        "process_madvise",
        "process_vm_readv",
        "process_vm_writev",
        "ptrace",
        "query_module",
        "quotactl",
        "quotactl_fd",
        "reboot",
        "request_key",
        "set_mempolicy",
        "setns",
        "settimeofday",
        "stime",
        "swapoff",
        "swapon",
        "_sysctl",
        "syslog",
        "sysfs",
        "umount",
        "umount2",
        "unshare",
        "uselib",
        "userfaultfd",
        "ustat",
        "vhangup",
        "vm86",
        "vm86old",
        "vmsplice",
    ]
)
"""Answered with EPERM: the calls exist, this process may not."""

DENIED_ENOSYS = frozenset(["clone3", "io_uring_setup", "io_uring_enter", "io_uring_register", "memfd_secret"])
"""Answered with ENOSYS: programs then fall back (glibc from clone3 to clone, libuv from io_uring to epoll)."""

NAMESPACE_FLAGS = (0x80, 0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
FAMILIES = (1, 2, 10, 16)
"""AF_UNIX, AF_INET, AF_INET6, AF_NETLINK."""
PROTOCOLS_DENIED = (33, 132, 136)
"""DCCP, SCTP, UDP-Lite: reachable kernel code that no agent needs."""
TIOCSTI = 0x5412
TIOCLINUX = 0x541C
LOW_32 = 0xFFFFFFFF
MOST_CALLS = 600


def _names() -> list[str]:
    native = pyseccomp.system_arch()
    found = []
    for number in range(MOST_CALLS):
        try:
            name = pyseccomp.resolve_syscall(native, number)
        except (ValueError, OSError):
            continue
        if name:
            found.append(name.decode() if isinstance(name, bytes) else name)
    return found


def _export(program: pyseccomp.SyscallFilter) -> bytes:
    fd = os.memfd_create("seccomp")
    with os.fdopen(fd, "w+b") as file:
        program.export_bpf(file)
        file.seek(0)
        return file.read()


def by_name() -> bytes:
    """The BPF program that decides by the call's number."""
    program = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.ENOSYS))
    program.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    for name in _names():
        if name in DENIED_EPERM:
            program.add_rule(pyseccomp.ERRNO(errno.EPERM), name)
        elif name not in DENIED_ENOSYS:
            program.add_rule(pyseccomp.ALLOW, name)
    return _export(program)


def by_argument() -> bytes:
    """The BPF program that decides by arguments; everything it does not name it leaves to `by_name`."""
    program = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    program.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    eq, masked, above = pyseccomp.EQ, pyseccomp.MASKED_EQ, pyseccomp.GT
    for flag in NAMESPACE_FLAGS:
        program.add_rule(pyseccomp.ERRNO(errno.EPERM), "clone", pyseccomp.Arg(0, masked, flag, flag))
    for call in ("socket", "socketpair"):
        for family in range(max(FAMILIES)):
            if family not in FAMILIES:
                program.add_rule(pyseccomp.ERRNO(errno.EAFNOSUPPORT), call, pyseccomp.Arg(0, eq, family))
        program.add_rule(pyseccomp.ERRNO(errno.EAFNOSUPPORT), call, pyseccomp.Arg(0, above, max(FAMILIES)))
    for protocol in PROTOCOLS_DENIED:
        for family in (2, 10):
            program.add_rule(
                pyseccomp.ERRNO(errno.EPROTONOSUPPORT),
                "socket",
                pyseccomp.Arg(0, eq, family),
                pyseccomp.Arg(2, masked, LOW_32, protocol),
            )
    for request in (TIOCSTI, TIOCLINUX):
        program.add_rule(pyseccomp.ERRNO(errno.EPERM), "ioctl", pyseccomp.Arg(1, masked, LOW_32, request))
    return _export(program)


def programs() -> list[bytes]:
    """Both programs, in the order to install them."""
    return [by_name(), by_argument()]
