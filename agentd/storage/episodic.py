"""The episodic store, first form: keys with values and a time to live, in namespaces that a task or a user owns.

A key's place is `scope NUL owner NUL key`. What has expired is never returned, swept or not. Acknowledged means on disk.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

import msgspec

from agentd.core.errors import InvalidField, TooLarge
from agentd.storage.database import Database, Transaction

KEY_LIMIT_BYTES = 256
"""With scope, owner and time the whole stays below the 511 bytes of an LMDB key."""
VALUE_LIMIT_BYTES = 1 << 20
LIST_LIMIT = 1000
SWEEP_SLICE = 500
"""Expired entries removed in one transaction: about 7 ms of the writer."""


class Scope(StrEnum):
    """Whose memory: `task` is forgotten with the task, `user` is shared by all tasks of one user in one tenant."""

    TASK = "task"
    USER = "user"


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One remembered value. Times are Unix seconds; `expires_at` 0 means never. `writer` is the task that wrote it."""

    value: bytes
    content_type: str
    created_at: float
    updated_at: float
    expires_at: float
    writer: str


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Entry).decode


def _place(scope: Scope, owner: str, key: str) -> bytes:
    return b"\0".join((scope.value.encode(), owner.encode(), key.encode()))


def check_key(key: str) -> str:
    """`key`, if it may name an entry.

    Raises:
        InvalidField: empty, too long, or with control characters.
    """
    if (
        not key
        or len(key.encode(errors="replace")) > KEY_LIMIT_BYTES
        or any(ord(char) < 32 or "\ud800" <= char <= "\udfff" for char in key)
    ):
        raise InvalidField(
            f"cannot use memory key {key[:80]!r}: it must have 1 to {KEY_LIMIT_BYTES} bytes and no control characters",
            field="key",
        )
    return key


class EpisodicStore:
    """Keys and values with TTL. `clock` gives Unix seconds."""

    def __init__(self, path: Path, clock: Callable[[], float]):
        self._database = Database(path, ("entries", "expiry"))
        self._clock = clock

    def get(self, scope: Scope, owner: str, key: str) -> Entry | None:
        """The entry, unless there is none or it has expired."""
        with self._database.read() as txn:
            raw = txn.get("entries", _place(scope, owner, check_key(key)))
            if raw is None:
                return None
            entry = _decode(raw)
        return None if self._expired(entry) else entry

    def _expired(self, entry: Entry) -> bool:
        return 0 < entry.expires_at <= self._clock()

    async def put(
        self, scope: Scope, owner: str, key: str, value: bytes, content_type: str, ttl_s: float | None, writer: str
    ) -> Entry:
        """Set the entry; `ttl_s` None means it does not expire.

        Raises:
            TooLarge: over `VALUE_LIMIT_BYTES`.
            InvalidField: a key or TTL that cannot be.
        """
        place = _place(scope, owner, check_key(key))
        if len(value) > VALUE_LIMIT_BYTES:
            raise TooLarge(
                f"cannot remember {key!r}: {len(value)} bytes are over the limit of {VALUE_LIMIT_BYTES}",
                field="value",
                hint="write it to a file in the workspace",
            )
        if ttl_s is not None and not 0 < ttl_s < 1e10:
            raise InvalidField(f"cannot remember {key!r}: ttl_s {ttl_s:g} is not above 0", field="ttl_s")
        now = self._clock()

        def change(txn: Transaction) -> Entry:
            old_raw = txn.get("entries", place)
            old = _decode(old_raw) if old_raw else None
            if old and old.expires_at:
                txn.delete("expiry", _due(old.expires_at, place))
            created = old.created_at if old and not (0 < old.expires_at <= now) else now
            entry = Entry(value, content_type, created, now, now + ttl_s if ttl_s else 0.0, writer)
            txn.put("entries", place, _encode(entry))
            if entry.expires_at:
                txn.put("expiry", _due(entry.expires_at, place), place)
            return entry

        return await self._database.write(change)

    async def delete(self, scope: Scope, owner: str, key: str) -> bool:
        """Forget the entry; whether there was one."""
        place = _place(scope, owner, check_key(key))

        def change(txn: Transaction) -> bool:
            raw = txn.get("entries", place)
            if raw is None:
                return False
            entry = _decode(raw)
            if entry.expires_at:
                txn.delete("expiry", _due(entry.expires_at, place))
            txn.delete("entries", place)
            return not self._expired(entry)

        return await self._database.write(change)

    def list(self, scope: Scope, owner: str, prefix: str = "", limit: int = LIST_LIMIT) -> list[tuple[str, Entry]]:
        """Entries whose key begins with `prefix`, in key order, at most `limit`."""
        if prefix:
            check_key(prefix)
        head = _place(scope, owner, prefix)
        cut = len(_place(scope, owner, ""))
        found: list[tuple[str, Entry]] = []
        with self._database.read() as txn:
            for place, raw in txn.scan("entries", prefix=head):
                entry = _decode(raw)
                if not self._expired(entry):
                    found.append((place[cut:].decode(), entry))
                    if len(found) >= limit:
                        break
        return found

    async def forget(self, scope: Scope, owner: str) -> int:
        """Remove all that `owner` remembers; how many entries."""
        head = _place(scope, owner, "")

        def change(txn: Transaction) -> int:
            found = [(bytes(place), _decode(raw)) for place, raw in txn.scan("entries", prefix=head)]
            for place, entry in found:
                txn.delete("entries", place)
                if entry.expires_at:
                    txn.delete("expiry", _due(entry.expires_at, place))
            return len(found)

        return await self._database.write(change)

    async def sweep(self) -> int:
        """Remove at most `SWEEP_SLICE` expired entries, oldest first; how many."""
        until = struct.pack(">d", self._clock())

        def change(txn: Transaction) -> int:
            due: list[tuple[bytes, bytes]] = []
            for key, place in txn.scan("expiry"):
                if key[:8] > until or len(due) >= SWEEP_SLICE:
                    break
                due.append((bytes(key), bytes(place)))
            for key, place in due:
                txn.delete("expiry", key)
                txn.delete("entries", place)
            return len(due)

        return await self._database.write(change)

    def close(self) -> None:
        """Close the store."""
        self._database.close()


def _due(expires_at: float, place: bytes) -> bytes:
    """A key that sorts by time (positive IEEE doubles sort as bytes) and fits LMDB's 511 bytes."""
    return struct.pack(">d", expires_at) + place
