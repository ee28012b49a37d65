"""Names: task ids, tenant names, and what else may stand in a path, a cgroup or an nft comment."""

from __future__ import annotations

import re
import secrets

ALPHABET = "23456789abcdefghjkmnpqrstvwxyz"
"""No vowels but a and e, no look-alikes: ids are read aloud and typed."""

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,39}\Z")
"""A name that is safe as one path component, cgroup directory and systemd instance."""

TASK_ID_LENGTH = 10


def new_task_id() -> str:
    """A random id of 10 characters (49 bits); the first is a letter, so that no shell or YAML takes it for a number."""
    return secrets.choice(ALPHABET[8:]) + "".join(secrets.choice(ALPHABET) for _ in range(TASK_ID_LENGTH - 1))


def new_token() -> str:
    """A bearer token of 192 bits for one attempt of one task."""
    return "agentd-" + secrets.token_urlsafe(24)


def is_name(text: str) -> bool:
    """Whether `text` may name a tenant, a task or a sandbox."""
    return NAME.match(text) is not None and ".." not in text
