"""A sandbox's root directory: the plan (a value that can be printed) and its execution inside the new mount namespace.

The root is a small read-only tmpfs. The host's `/usr` is bound read-only, a few files of `/etc` that programs need are bound one by
one, everything else is made here. Nothing of the host is visible that the plan does not name.
"""

from __future__ import annotations

import os
from typing import Any

from agentd.warden import syscalls as sc

HOST_ETC = (
    "alternatives",
    "ca-certificates.conf",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "mime.types",
    "protocols",
    "services",
    "ssl/certs",
    "ssl/openssl.cnf",
    "perl",
    "python3",
    "python3.11",
    "timezone",
    "terminfo",
)
"""What of the host's /etc a program may need and nobody minds being read."""

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
PROC_READ_ONLY = ("sys", "bus", "fs", "irq")
PROC_MASKED = (
    "kcore",
    "keys",
    "key-users",
    "timer_list",
    "sysrq-trigger",
    "kmsg",
    "latency_stats",
    "acpi",
    "scsi",
    "asound",
)


def plan(
    *,
    hostname: str,
    id_base: int,
    agent_id: int,
    hosts: dict[str, str],
    nameserver: str,
    workspace: str,
    binds: list[dict[str, Any]],
    tmp_bytes: int,
    shm_bytes: int,
    host_root: str = "/",
) -> dict[str, Any]:
    """What the root of one sandbox holds. `workspace` is its path inside; `binds` name descriptors or host paths, in mount order."""
    found: list[dict[str, Any]] = [{"source": f"{host_root}usr", "target": "/usr", "read_only": True}]
    links: dict[str, str] = {}
    for name in MERGED:
        path = host_root + name
        if os.path.islink(path):
            links["/" + name] = os.readlink(path)
        elif os.path.isdir(path):
            found.append({"source": path, "target": "/" + name, "read_only": True})
    for name in HOST_ETC:
        path = f"{host_root}etc/{name}"
        if name in ("localtime",) and os.path.islink(path):
            links["/etc/" + name] = os.readlink(path)
        elif os.path.exists(path):
            found.append(
                {
                    "source": os.path.realpath(path),
                    "target": "/etc/" + name,
                    "read_only": True,
                    "file": os.path.isfile(path),
                }
            )
    for name in DEVICES:
        found.append(
            {"source": f"/dev/{name}", "target": f"/dev/{name}", "read_only": False, "file": True, "device": True}
        )
    found += sorted(binds, key=lambda bind: str(bind["target"]).count("/"))
    home = workspace
    return {
        "binds": found,
        "links": links
        | {"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1"}
        | {
            "/dev/stderr": "/proc/self/fd/2",
            "/dev/ptmx": "pts/ptmx",
            "/var/run": "../run",
            "/etc/mtab": "/proc/self/mounts",
        },
        "directories": [
            "/proc",
            "/sys",
            "/tmp",
            "/run",
            "/var/tmp",
            "/home",
            "/root",
            "/opt",
            "/srv",
            "/mnt",
            "/dev/pts",
            "/dev/shm",
        ],
        "files": {
            "/etc/passwd": f"root:x:0:0:root:/root:/usr/sbin/nologin\nagent:x:{agent_id}:{agent_id}:agent:{home}:/bin/bash\n"
            "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
            "/etc/group": f"root:x:0:\ntty:x:5:\nagent:x:{agent_id}:\nnogroup:x:65534:\n",
            "/etc/hosts": "127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.1.1\t"
            + hostname
            + "\n"
            + "".join(f"{address}\t{name}\n" for address, name in hosts.items()),
            "/etc/hostname": hostname + "\n",
            "/etc/resolv.conf": f"nameserver {nameserver}\noptions timeout:2 attempts:1\n",
            "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n",
            "/etc/os-release": "ID=agentd\nNAME=agentd\n",
            "/etc/machine-id": "",
        },
        "id_base": id_base,
        "agent": id_base + agent_id,
        "tty_gid": id_base + 5,
        "tmp_bytes": tmp_bytes,
        "shm_bytes": shm_bytes,
    }


def build(root: dict[str, Any], trees: list[int], stage: str) -> None:
    """Make `root` the root directory of this process. Runs as host root, alone, in a new mount and PID namespace.

    `trees` are detached mounts, one for each of the plan's binds. Paths below `stage` are safe to name: the tmpfs is new, and no process
    but this one can reach it.
    """
    sc.mount("none", "/", "", sc.MS_REC | sc.MS_PRIVATE)
    owner = f"uid={root['id_base']},gid={root['id_base']}"
    sc.mount("agentd", stage, "tmpfs", sc.MS_NOSUID | sc.MS_NODEV, f"mode=755,size=4m,nr_inodes=4096,{owner}")
    for path in root["directories"]:
        os.makedirs(stage + path, mode=0o755, exist_ok=True)
    for path, text in root["files"].items():
        os.makedirs(os.path.dirname(stage + path), mode=0o755, exist_ok=True)
        with open(stage + path, "w") as file:
            file.write(text)
    for bind, tree in zip(root["binds"], trees, strict=True):
        target = stage + bind["target"]
        if bind.get("file"):
            os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
            with open(target, "a"):
                pass
        else:
            os.makedirs(target, mode=0o755, exist_ok=True)
        sc.move_mount(tree, target)
    for path, to in root["links"].items():
        os.makedirs(os.path.dirname(stage + path), mode=0o755, exist_ok=True)
        if not os.path.lexists(stage + path):
            os.symlink(to, stage + path)
    plain = sc.MS_NOSUID | sc.MS_NODEV
    sc.mount("tmpfs", stage + "/tmp", "tmpfs", plain, f"mode=1777,size={root['tmp_bytes']},nr_inodes=65536,{owner}")
    sc.mount("tmpfs", stage + "/var/tmp", "tmpfs", plain, f"mode=1777,size={root['tmp_bytes']},nr_inodes=65536,{owner}")
    sc.mount(
        "tmpfs",
        stage + "/run",
        "tmpfs",
        plain,
        f"mode=755,size=16m,nr_inodes=4096,uid={root['agent']},gid={root['agent']}",
    )
    sc.mount(
        "tmpfs",
        stage + "/dev/shm",
        "tmpfs",
        plain | sc.MS_NOEXEC,
        f"mode=1777,size={root['shm_bytes']},nr_inodes=16384,{owner}",
    )
    sc.mount(
        "devpts",
        stage + "/dev/pts",
        "devpts",
        sc.MS_NOSUID | sc.MS_NOEXEC,
        f"newinstance,ptmxmode=0666,mode=620,gid={root['tty_gid']}",
    )
    sc.mount("proc", stage + "/proc", "proc", plain | sc.MS_NOEXEC, "")
    for name in PROC_READ_ONLY:
        path = f"{stage}/proc/{name}"
        if os.path.isdir(path):
            tree = sc.open_tree(sc.AT_FDCWD, path)
            sc.set_mount_flags(
                tree, sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV | sc.MOUNT_ATTR_NOEXEC
            )
            sc.move_mount(tree, path)
            os.close(tree)
    for name in PROC_MASKED:
        path = f"{stage}/proc/{name}"
        if os.path.isdir(path):
            sc.mount("tmpfs", path, "tmpfs", plain | sc.MS_NOEXEC | sc.MS_RDONLY, "size=0,nr_inodes=2,mode=000")
        elif os.path.exists(path):
            tree = sc.open_tree(sc.AT_FDCWD, stage + "/dev/null")
            sc.set_mount_flags(tree, sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NOEXEC)
            sc.move_mount(tree, path)
            os.close(tree)
    os.chdir(stage)
    sc.pivot_root(".", ".")
    sc.umount(".", sc.MNT_DETACH)
    os.chdir("/")
    if os.getcwd() != "/":
        raise OSError(0, f"the root was left: {os.getcwd()}")
    sc.set_mount_flags(sc.AT_FDCWD, sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV, "/")
