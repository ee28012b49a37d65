"""Which task starts next: a decision over values, no clock, no I/O.

First form: class, then priority, then order of submission. The first in line that could not start holds its place, so a large task is
not starved by small ones. Fair sharing between tenants and users takes this module's place.
"""

from __future__ import annotations

import heapq

import msgspec

from agentd.compute.capacity import Capacity
from agentd.tasks.spec import TaskClass

_ORDER = {TaskClass.INTERACTIVE: 0, TaskClass.NORMAL: 1, TaskClass.BATCH: 2}


class Waiting(msgspec.Struct, frozen=True, order=True):
    """One queued task; ordered by who goes first."""

    rank: int
    minus_priority: int
    seq: int
    id: str
    memory_bytes: int = msgspec.field(default=0)


def waiting(task: str, kind: TaskClass, priority: int, seq: int, memory_bytes: int) -> Waiting:
    """A queue entry."""
    return Waiting(_ORDER[kind], -priority, seq, task, memory_bytes)


class Queue:
    """The ready index."""

    def __init__(self) -> None:
        self._heap: list[Waiting] = []
        self._members: dict[str, Waiting] = {}

    def __len__(self) -> int:
        return len(self._members)

    def add(self, entry: Waiting) -> None:
        """Put it in line."""
        self._members[entry.id] = entry
        heapq.heappush(self._heap, entry)

    def remove(self, task: str) -> None:
        """Take it out of line; harmless if it is not in it."""
        self._members.pop(task, None)

    def position(self, task: str) -> int | None:
        """Its place in line, from 1."""
        entry = self._members.get(task)
        return None if entry is None else 1 + sum(1 for other in self._members.values() if other < entry)

    def next(self, running: int, memory_used: int, capacity: Capacity) -> tuple[str | None, str | None]:
        """`(task, None)` when the first in line may start, `(None, why not)` when it may not or nobody waits."""
        while self._heap and self._members.get(self._heap[0].id) is not self._heap[0]:
            heapq.heappop(self._heap)
        if not self._heap:
            return None, None
        if running >= capacity.tasks:
            return None, f"{running} tasks run, as many as this host takes"
        head = self._heap[0]
        if memory_used + head.memory_bytes > capacity.memory_bytes:
            return None, "memory: running tasks were promised what is left"
        return head.id, None
