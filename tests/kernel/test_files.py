"""Files: what is visible, what is writable, and that a planted link leads nowhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Client, Warden

pytestmark = pytest.mark.kernel


def memfd(content: bytes) -> int:
    fd = os.memfd_create("input")
    os.write(fd, content)
    return fd


def test_only_workspace_and_temporary_places_can_be_written(client: Client) -> None:
    found = client.run("""
        import json, os
        def write(path):
            try:
                with open(path + "/x", "w") as file: file.write("x")
            except OSError: return False
            return True
        print(json.dumps({path: write(path) for path in ("/", "/usr", "/usr/bin", "/etc", "/dev", "/sys", "/opt", "/home", "/workspace", "/tmp", "/var/tmp", "/dev/shm", "/run")}))
        """).json()
    assert {path for path, written in found.items() if written} == {
        "/workspace",
        "/tmp",
        "/var/tmp",
        "/dev/shm",
        "/run",
    }


def test_the_hosts_files_are_not_there(client: Client, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    marker.write_text("secret")
    tmp_path.chmod(0o755)
    ran = client.run(
        [
            "sh",
            "-c",
            f"cat {marker}; cat /proc/self/root{marker}; cat /etc/shadow; ls /root /home /boot; ls /usr/bin/env; cat /etc/passwd",
        ]
    )
    assert "secret" not in ran.out and ran.err.count("No such file") >= 4
    assert "/usr/bin/env" in ran.out and ran.out.count("\n") <= 8
    assert "agent:x:1000" in ran.out


def test_a_workspace_is_kept_for_its_task_and_closed_to_others(client: Client, warden: Warden) -> None:
    client.run(["sh", "-c", "echo mine > notes; chmod 600 notes"], name="first", keep=True)
    assert client.run(["cat", "notes"], name="first", keep=True).out == "mine\n"
    path = warden.root / "var/lib/agentd-warden/workspaces/first/notes"
    assert path.read_text() == "mine\n" and path.stat().st_uid > 0x70000000
    ran = client.run(["sh", "-c", f"ls -A /workspace; cat {path}; cat /workspace/../first/notes"], name="second")
    assert ran.out == "" and ran.code != 0


def test_inputs_arrive_with_their_modes(client: Client) -> None:
    client.ask("workspace", id="inputs")
    client.ask("put", [memfd(b"#!/bin/sh\necho run\n")], id="inputs", path="bin/tool", mode=0o755)
    client.ask("put", [memfd(b"data")], id="inputs", path="a/b/c.txt", mode=0o600)
    ran = client.run(["sh", "-c", "bin/tool; cat a/b/c.txt; stat -c '%a %U' a a/b/c.txt; touch a/new"], name="inputs")
    assert ran.out == "run\ndata755 agent\n600 agent\n" and ran.code == 0


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "", ".", "a//b"])
def test_an_input_cannot_leave_the_workspace(client: Client, path: str) -> None:
    client.ask("workspace", id="inputs")
    with pytest.raises(Exception, match="not a path below the workspace"):
        client.ask("put", [memfd(b"x")], id="inputs", path=path)


def test_an_input_never_follows_a_link_that_an_earlier_attempt_planted(
    client: Client, warden: Warden, tmp_path: Path
) -> None:
    victim, directory = tmp_path / "victim", tmp_path / "directory"
    victim.write_text("untouched")
    directory.mkdir()
    client.run(
        ["sh", "-c", f"ln -s {victim} file; ln -s {directory} folder; ln -s /etc deep"], name="linked", keep=True
    )
    planted = warden.root / "var/lib/agentd-warden/workspaces/linked"
    assert (planted / "file").read_text() == "untouched"  # what a careless writer would have followed
    client.ask("put", [memfd(b"input")], id="linked", path="file")
    with pytest.raises(Exception, match="not a directory"):
        client.ask("put", [memfd(b"input")], id="linked", path="folder/inside")
    assert victim.read_text() == "untouched" and list(directory.iterdir()) == []
    assert client.run(["cat", "file"], name="linked", keep=True).out == "input"
    client.ask("remove_workspace", id="linked")
    assert victim.read_text() == "untouched" and directory.is_dir() and Path("/etc/passwd").exists()


def test_a_mount_from_an_allowed_root_is_there_read_only(client: Client, warden: Warden) -> None:
    data = warden.root / "shared/data"
    data.mkdir(exist_ok=True)
    (data / "f").write_text("shared")
    mount = {"source": str(data), "target": "/mnt/data", "read_only": True}
    ran = client.run(["sh", "-c", "cat /mnt/data/f; echo x > /mnt/data/f; touch /mnt/data/g"], mounts=[mount])
    assert ran.out == "shared" and ran.code != 0 and "Read-only" in ran.err
    one = client.run(["cat", "/opt/one"], mounts=[{"source": str(data / "f"), "target": "/opt/one"}])
    assert one.out == "shared"


def test_mounts_that_are_not_allowed_are_refused_by_name(client: Client, warden: Warden) -> None:
    shared = warden.root / "shared"
    link = shared / "link"
    if not link.is_symlink():
        link.symlink_to("/etc")
    for mount, cause in (
        ({"source": "/etc", "target": "/mnt/etc"}, "outside the allowed roots"),
        ({"source": f"{shared}-other", "target": "/mnt/x"}, "outside the allowed roots"),
        ({"source": f"{shared}/../etc", "target": "/mnt/x"}, "not a plain absolute path"),
        ({"source": str(link), "target": "/mnt/x"}, "mounts.0..source"),
        ({"source": f"{link}/ssl", "target": "/mnt/x"}, "mounts.0..source"),
        ({"source": f"{shared}/none", "target": "/mnt/x"}, "No such file"),
        ({"source": str(shared), "target": "/usr/bin"}, "not below"),
        ({"source": str(shared), "target": "/workspace/x"}, "not below"),
        ({"source": str(shared), "target": "/mnt"}, "not below"),
        ({"source": str(shared), "target": "/mnt/x", "read_only": False}, "not offered"),
    ):
        with pytest.raises(Exception, match=cause):
            client.run(["true"], mounts=[mount])
    assert client.run(["true"]).code == 0


def test_a_workspace_in_use_can_be_neither_written_nor_removed(client: Client) -> None:
    _, fds = client.start("busy", ["sleep", "30"])
    for op, fields, given in (("remove_workspace", {}, None), ("put", {"path": "x"}, [memfd(b"")])):
        with pytest.raises(Exception, match="a sandbox uses it"):
            client.ask(op, given, id="busy", **fields)
    client.ask("signal", id="busy", epoch=1, signo=9)
    assert client.finish("busy", fds).exit["signal"] == 9
