"""What `agentctl doctor` finds on hosts of all kinds, each a small tree of /proc and /sys."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from agentd.cli import hostcheck

V2 = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"
HYBRID = (
    "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"
    "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n"
    "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"
    "cgroup /sys/fs/cgroup/pids cgroup rw,pids 0 0\n"
)


def host(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "ok", "detail"),
    [
        ({"proc/self/mounts": V2, "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n"}, True, "unified: cpu, memory, pids"),
        ({"proc/self/mounts": V2, "sys/fs/cgroup/cgroup.controllers": "cpu io\n"}, False, "no controller memory, pids"),
        ({"proc/self/mounts": HYBRID, "sys/fs/cgroup/unified/cgroup.controllers": ""}, True, "hybrid: cpu, memory, pids on v1"),
        ({"proc/self/mounts": HYBRID, "sys/fs/cgroup/unified/cgroup.controllers": "pids"}, True, "hybrid: cpu, memory on v1"),
        ({"proc/self/mounts": HYBRID.split("\n", 1)[1]}, False, "cgroup v2 is not mounted"),
        ({}, False, "cgroup v2 is not mounted"),
    ],
)  # fmt: skip
def test_cgroups_may_be_unified_or_hybrid(tmp_path: Path, files: dict[str, str], ok: bool, detail: str) -> None:
    found = hostcheck.cgroups(host(tmp_path, files))
    assert (found.ok, found.detail) == (ok, detail)
    assert found.ok or "cgroup2" in found.remedy


def test_the_cgroup_made_to_look_at_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host(tmp_path, {"proc/self/mounts": V2})
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    found = hostcheck.cgroup_lifecycle(tmp_path)  # a plain directory gets no files from a kernel
    assert (found.ok, found.detail) == (False, "no cgroup.kill and no cgroup.freeze")
    assert list((tmp_path / "sys/fs/cgroup").iterdir()) == []


def test_without_root_another_cgroup_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"proc/self/mounts": V2, "sys/fs/cgroup/a/cgroup.kill": "", "sys/fs/cgroup/a/cgroup.freeze": ""}
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert hostcheck.cgroup_lifecycle(host(tmp_path, files)).ok


@pytest.mark.parametrize(
    ("release", "ok"),
    [("5.14.21-x", False), ("5.15.0", True), ("6.1.0-18-amd64", True), ("4.19", False), ("odd", False)],
)
def test_the_kernel_is_new_enough(release: str, ok: bool) -> None:
    assert hostcheck.kernel(release).ok is ok


@pytest.mark.parametrize(
    ("files", "ok", "said"),
    [
        ({"proc/sys/user/max_user_namespaces": "0\n"}, False, "is 0"),
        ({}, False, "the kernel has none"),
        ({"proc/sys/user/max_user_namespaces": "100\n"}, True, "up to 100"),
        (
            {"proc/sys/user/max_user_namespaces": "9", "proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1"},
            True,
            "AppArmor",
        ),
        (
            {"proc/sys/user/max_user_namespaces": "9", "proc/sys/kernel/unprivileged_userns_clone": "0"},
            True,
            "only root",
        ),
    ],
)
def test_user_namespaces(tmp_path: Path, files: dict[str, str], ok: bool, said: str) -> None:
    found = hostcheck.user_namespaces(host(tmp_path, files))
    assert found.ok is ok
    assert said in found.detail


def test_the_probe_says_which_namespaces_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    found = hostcheck.namespaces({"namespaces": {"user": 1, "net": 1, "mount": 0}})
    assert (found.ok, found.detail, found.required) == (False, "user, net: EPERM", True)
    assert hostcheck.namespaces({"namespaces": {"user": 0}}).ok
    assert not hostcheck.namespaces({}).ok
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert not hostcheck.namespaces({"namespaces": {"user": 1}}).required


def test_the_probe_runs_here() -> None:
    found = hostcheck.probed()
    assert set(found) == {"namespaces", "landlock", "libseccomp"}
    assert set(found["namespaces"]) == {"mount", "cgroup", "uts", "ipc", "user", "pid", "net", "time"}


def answered(code: int, said: bytes = b"") -> Any:
    return lambda argv, **more: subprocess.CompletedProcess(argv, code, b"", said)


def test_nft_must_be_there_and_be_taken_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(argv: list[str], **more: Any) -> subprocess.CompletedProcess[bytes]:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert hostcheck.nftables(absent).remedy == "apt-get install nftables"
    refused = hostcheck.nftables(answered(1, b"Error: Operation not permitted\nmore\n"))
    assert (refused.ok, refused.detail) == (False, "the kernel refuses: Error: Operation not permitted")
    assert hostcheck.nftables(answered(0)).ok


def test_seccomp_overlayfs_and_the_service_manager(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    assert not hostcheck.seccomp(empty).ok
    assert not hostcheck.overlayfs(empty).ok and not hostcheck.overlayfs(empty).required
    assert "without it" in hostcheck.service_manager(empty).detail
    files = {
        "proc/sys/kernel/seccomp/actions_avail": "kill_process errno log allow\n",
        "proc/filesystems": "nodev\toverlay\n",
        "run/systemd/system/x": "",
    }
    full = host(tmp_path, files)
    assert hostcheck.seccomp(full).ok and hostcheck.overlayfs(full).ok
    assert hostcheck.service_manager(full).detail == "systemd"


@pytest.mark.parametrize(
    ("probe", "ok", "detail"), [({"landlock": 4}, True, "ABI 4"), ({"landlock": 0}, False, "none"), ({}, False, "none")]
)
def test_landlock_is_welcome_and_not_required(probe: dict[str, Any], ok: bool, detail: str) -> None:
    found = hostcheck.landlock(probe)
    assert (found.ok, found.detail, found.required) == (ok, detail, False)


def test_a_host_of_no_use_is_pointed_to_the_virtual_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostcheck, "probed", lambda: {})
    monkeypatch.setattr(hostcheck, "nftables", lambda: hostcheck.Check("nftables", True, ""))
    report = hostcheck.report(tmp_path)
    assert report["ok"] is False
    assert "scripts/quickstart --vm" in report["advice"]


def test_what_a_package_brings_needs_no_virtual_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {name: (lambda *found, name=name: hostcheck.Check(name, True, "")) for name in (
        "linux", "kernel", "cgroups", "cgroup_lifecycle", "user_namespaces", "namespaces", "seccomp", "libseccomp")}  # fmt: skip
    for name, check in good.items():
        monkeypatch.setattr(hostcheck, name, check)
    monkeypatch.setattr(hostcheck, "nftables", lambda: hostcheck.Check("nftables", False, "there is no nft"))
    report = hostcheck.report(tmp_path)
    assert report["ok"] is False
    assert "advice" not in report
