"""What may run at once: a decision over values, no clock, no I/O."""

from __future__ import annotations

import msgspec

TASKS_PER_CPU = 8
"""Agents mostly wait for a model: eight for each processor keep it busy without a queue of runnable ones."""
RESERVE_SHARE = 0.1
RESERVE_LEAST_BYTES = 256 << 20


class Capacity(msgspec.Struct, frozen=True):
    """The most that may be promised to running tasks."""

    tasks: int
    memory_bytes: int
    cpus: int

    def refuses(self, memory_bytes: int, cpus: float) -> str | None:
        """Why a task of this size could never start here; None if it could."""
        if memory_bytes > self.memory_bytes:
            return f"memory: {memory_bytes} bytes are more than this host gives to tasks ({self.memory_bytes})"
        if cpus > self.cpus:
            return f"cpus: {cpus:g} are more than this host has ({self.cpus})"
        return None


def of(*, cpus: int, memory_bytes: int, most_tasks: int = 0) -> Capacity:
    """The capacity of a host; `most_tasks` 0 means as many as fit."""
    reserve = max(RESERVE_LEAST_BYTES, int(memory_bytes * RESERVE_SHARE))
    return Capacity(most_tasks or max(4, cpus * TASKS_PER_CPU), max(0, memory_bytes - reserve), cpus)
