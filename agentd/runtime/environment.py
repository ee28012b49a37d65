"""The environment variables of an agent. They are the ones that the vendors' SDKs read, so a program needs no change to find agentd."""

from __future__ import annotations

from collections.abc import Mapping

from agentd.core.addresses import INTERNAL_NAME

WORKSPACE = "/workspace"
URL = f"http://{INTERNAL_NAME}"


def standard(task: str, epoch: int, token: str) -> dict[str, str]:
    """What every attempt of a task is given. The token is its key in every dialect, and dies with the attempt."""
    openai = f"{URL}/openai/v1"
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": WORKSPACE,
        "USER": "agent",
        "LOGNAME": "agent",
        "SHELL": "/bin/sh",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "TMPDIR": "/tmp",
        "PYTHONUNBUFFERED": "1",
        "AGENTD_URL": URL,
        "AGENTD_TOKEN": token,
        "AGENTD_TASK_ID": task,
        "AGENTD_ATTEMPT": str(epoch),
        "AGENTD_WORKSPACE": WORKSPACE,
        "OPENAI_BASE_URL": openai,
        "OPENAI_API_BASE": openai,
        "OPENAI_API_KEY": token,
        "ANTHROPIC_BASE_URL": f"{URL}/anthropic",
        "ANTHROPIC_API_KEY": token,
    }


RESERVED = frozenset(standard("", 1, "")) - {"PATH", "LANG", "TERM", "PYTHONUNBUFFERED", "SHELL"}
"""Names that a task file may not set: they would lead the agent away from agentd."""


def of(task: str, epoch: int, token: str, wanted: Mapping[str, str]) -> dict[str, str]:
    """The whole environment: what the task asked for, under what agentd sets."""
    base = standard(task, epoch, token)
    return (
        {key: value for key, value in base.items() if key not in RESERVED}
        | dict(wanted)
        | {key: base[key] for key in RESERVED}
    )
