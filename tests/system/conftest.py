"""One virtual machine for all system tests: a real Debian with systemd, into which agentd is installed as an operator would."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def _machine_module() -> Any:
    found = importlib.util.spec_from_file_location("machine", Path(__file__).with_name("machine.py"))
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["machine"] = module
    found.loader.exec_module(module)
    return module


class Host:
    """The installed host, in an operator's words."""

    def __init__(self, machine: Any):
        self.machine = machine

    def run(self, command: str, *, check: bool = True, timeout_s: float = 180) -> Any:
        return self.machine.run(command, check=check, timeout_s=timeout_s)

    def out(self, command: str, **options: Any) -> str:
        return str(self.run(command, **options).stdout).strip()

    def json(self, command: str) -> Any:
        return json.loads(self.out(command))

    def task(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.json(f"agentctl show --json {name}")
        return found

    def until(self, command: str, seconds: float = 120) -> None:
        """Poll until `command` succeeds."""
        deadline = time.monotonic() + seconds
        while self.run(command, check=False).rc != 0:
            assert time.monotonic() < deadline, f"{command!r} did not succeed within {seconds} s"
            time.sleep(0.5)

    def ready(self) -> None:
        self.until("agentctl version --json | grep -q '\"ready\": *true'")


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    with _machine_module().Machine() as machine:
        machine.put_checkout(ROOT)
        found = Host(machine)
        found.run("/root/agentd/scripts/install", timeout_s=600)
        yield found
