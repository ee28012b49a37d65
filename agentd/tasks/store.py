"""Tasks, events and the ledger on disk: one LMDB environment, a transition and its event in one transaction."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from agentd.core.wire import Usage
from agentd.llm.proxy import Call
from agentd.storage.database import Database, Transaction
from agentd.tasks.spec import TaskSpec
from agentd.tasks.states import ENDED, Life

EVENTS_KEPT = 100_000
TRIM_SLICE = 200
_SEQ = struct.Struct(">Q")


class LlmTotals(msgspec.Struct):
    """What a task's model calls came to."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cost_usd: float = 0.0
    cost_known: bool = True
    models: dict[str, int] = {}
    scripted: bool = False


class Progress(msgspec.Struct, frozen=True):
    """What an agent last said of itself."""

    text: str
    fraction: float | None
    time: float


class Record(msgspec.Struct):
    """Everything known of one task but its output, inputs and result."""

    id: str
    seq: int
    spec: TaskSpec
    user: str
    uid: int
    submitted_at: float
    life: Life = msgspec.field(default_factory=Life)
    token: str = ""
    started_at: float | None = None
    ended_at: float | None = None
    usage: Usage = msgspec.field(default_factory=Usage)
    llm: LlmTotals = msgspec.field(default_factory=LlmTotals)
    progress: Progress | None = None
    has_result: bool = False
    workspace: str | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.life.state in ENDED


class Result(msgspec.Struct, frozen=True):
    """What a task left as its result: any JSON, or text."""

    json: bytes
    text: str | None
    time: float


_encode = msgspec.msgpack.Encoder().encode
_record = msgspec.msgpack.Decoder(Record).decode
_inputs = msgspec.msgpack.Decoder(list[tuple[str, int, bytes]]).decode


class Store:
    """The state environment. `clock` gives Unix seconds."""

    def __init__(self, path: Path, clock: Callable[[], float]):
        self._database = Database(path, ("tasks", "inputs", "results", "events", "calls"))
        self._clock = clock
        self._changed = asyncio.Event()

    def records(self) -> Iterator[Record]:
        """Every task, in no particular order."""
        with self._database.read() as txn:
            for _, raw in txn.scan("tasks"):
                yield _record(raw)

    async def save(self, record: Record, event: str | None = None, **fields: Any) -> None:
        """Keep the record and, in the same transaction, an event about it. On disk when this returns."""
        raw = _encode(record)
        key = record.id.encode()

        def change(txn: Transaction) -> None:
            txn.put("tasks", key, raw)
            if event:
                self._append(txn, record.id, event, fields)

        await self._database.write(change)
        self._wake()

    async def submit(self, record: Record, inputs: list[tuple[str, int, bytes]]) -> None:
        """Keep a new task and its inputs. On disk when this returns."""
        raw, files = _encode(record), _encode(inputs)
        key = record.id.encode()

        def change(txn: Transaction) -> None:
            txn.put("tasks", key, raw)
            if inputs:
                txn.put("inputs", key, files)
            self._append(
                txn,
                record.id,
                "submitted",
                {"class": record.spec.class_.value, "tenant": record.spec.tenant, "user": record.user},
            )

        await self._database.write(change)
        self._wake()

    def inputs(self, task: str) -> list[tuple[str, int, bytes]]:
        """`(path, mode, content)` of what goes into its workspace."""
        with self._database.read() as txn:
            raw = txn.get("inputs", task.encode())
            return _inputs(raw) if raw else []

    async def save_result(self, record: Record, result: Result) -> None:
        """Keep a task's result."""
        raw_record, raw_result = _encode(record), _encode(result)
        key = record.id.encode()

        def change(txn: Transaction) -> None:
            txn.put("tasks", key, raw_record)
            txn.put("results", key, raw_result)
            self._append(txn, record.id, "result", {})

        await self._database.write(change)
        self._wake()

    def result(self, task: str) -> Result | None:
        """What a task left, if anything."""
        with self._database.read() as txn:
            raw = txn.get("results", task.encode())
            return msgspec.msgpack.decode(raw, type=Result) if raw else None

    async def save_call(self, record: Record, call: Call) -> None:
        """Add a model call to the ledger, and the task's totals with it."""
        raw, line = _encode(record), _encode(call)
        key = record.id.encode()
        place = key + b"\0" + struct.pack(">d", call.time) + call.id.encode()
        fields = {
            "model": call.model,
            "provider": call.provider,
            "status": call.status,
            "input_tokens": call.usage.input_tokens,
            "output_tokens": call.usage.output_tokens,
            "cost_usd": call.cost_usd,
            "duration_s": round(call.duration_s, 4),
            "scripted": call.scripted,
        }

        def change(txn: Transaction) -> None:
            txn.put("tasks", key, raw)
            txn.put("calls", place, line)
            self._append(txn, record.id, "llm", fields)

        await self._database.write(change)
        self._wake()

    def calls(self, task: str) -> list[Call]:
        """A task's model calls, oldest first."""
        with self._database.read() as txn:
            return [
                msgspec.msgpack.decode(raw, type=Call) for _, raw in txn.scan("calls", prefix=task.encode() + b"\0")
            ]

    async def remove(self, task: str) -> None:
        """Forget a task, its inputs, result and calls; its events stay until they are trimmed."""
        key = task.encode()

        def change(txn: Transaction) -> None:
            for table in ("tasks", "inputs", "results"):
                txn.delete(table, key)
            for place in [bytes(place) for place, _ in txn.scan("calls", prefix=key + b"\0")]:
                txn.delete("calls", place)
            self._append(txn, task, "removed", {})

        await self._database.write(change)
        self._wake()

    async def note(self, task: str | None, event: str, **fields: Any) -> None:
        """Append an event that changes no record."""
        await self._database.write(lambda txn: self._append(txn, task, event, fields))
        self._wake()

    def _append(self, txn: Transaction, task: str | None, event: str, fields: dict[str, Any]) -> None:
        last = txn.last("events")
        seq = _SEQ.unpack(last)[0] + 1 if last else 1
        txn.put(
            "events",
            _SEQ.pack(seq),
            msgspec.json.encode({"seq": seq, "time": self._clock(), "task": task, "event": event, **fields}),
        )
        if seq % TRIM_SLICE == 0 and seq > EVENTS_KEPT:
            for key in [bytes(key) for key, _ in txn.scan("events")][: seq - EVENTS_KEPT - _oldest(txn)]:
                txn.delete("events", key)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def events(self, after: int = 0, task: str | None = None, *, follow: bool = False) -> AsyncIterator[bytes]:
        """Events after `after` as JSON lines, in order of `seq`; with `follow`, for ever."""
        while True:
            changed = self._changed
            with self._database.read() as txn:
                found = []
                for key, raw in txn.scan("events", start=_SEQ.pack(after + 1)):
                    found.append((_SEQ.unpack(key)[0], bytes(raw)))
                    if len(found) >= 500:
                        break
            for seq, raw in found:
                after = seq
                if task is None or msgspec.json.decode(raw).get("task") == task:
                    yield raw + b"\n"
            if found:
                continue
            if not follow:
                return
            await changed.wait()

    def close(self) -> None:
        """Close the environment."""
        self._database.close()


def _oldest(txn: Transaction) -> int:
    for key, _ in txn.scan("events"):
        return int(_SEQ.unpack(key)[0]) - 1
    return 0
