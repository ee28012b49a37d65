"""One LMDB environment: reads on the event loop (2 µs), writes by one thread that commits whatever has gathered in one transaction.

An acknowledged write is on disk: the future is resolved after the commit returned. A change that raises leaves nothing behind and
fails alone, because each runs in a transaction nested in the batch's. Environments never cross a fork.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from agentd.core.errors import Broken, TryLater

T = TypeVar("T")

MAP_BYTES = 16 << 30
"""Address space, not disk: the file grows as it fills."""
BATCH = 512


class Transaction:
    """What a reader or a change may do: named tables of ordered byte keys (at most 511 bytes)."""

    def __init__(self, txn: Any, tables: dict[str, Any]):
        self._txn = txn
        self._tables = tables

    def get(self, table: str, key: bytes) -> bytes | None:
        """The value of `key`, or None."""
        found: bytes | None = self._txn.get(key, db=self._tables[table])
        return found

    def put(self, table: str, key: bytes, value: bytes) -> None:
        """Set `key`."""
        self._txn.put(key, value, db=self._tables[table])

    def delete(self, table: str, key: bytes) -> bool:
        """Remove `key`; whether it was there."""
        return bool(self._txn.delete(key, db=self._tables[table]))

    def scan(self, table: str, start: bytes = b"", prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Pairs in key order, from `start`, while the key begins with `prefix`."""
        with self._txn.cursor(db=self._tables[table]) as cursor:
            if not cursor.set_range(max(start, prefix)):
                return
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                yield key, value

    def last(self, table: str) -> bytes | None:
        """The greatest key, or None."""
        with self._txn.cursor(db=self._tables[table]) as cursor:
            return bytes(cursor.key()) if cursor.last() else None


class Database:
    """An environment with its tables and its writer thread."""

    def __init__(self, path: Path, tables: tuple[str, ...]):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._env = lmdb.open(str(path), map_size=MAP_BYTES, max_dbs=len(tables) + 1, max_readers=512, subdir=True)
        except lmdb.Error as error:
            raise Broken(
                f"cannot open the store {path}: {error}",
                hint=f"check the file system; a copy of {path} may be restored",
            ) from error
        self._tables = {name: self._env.open_db(name.encode()) for name in tables}
        self._queue: queue.SimpleQueue[tuple[Callable[[Transaction], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name=f"lmdb-{path.name}", daemon=True)
        self._thread.start()

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """A snapshot. Keep it short: it pins pages."""
        with self._env.begin() as txn:
            yield Transaction(txn, self._tables)

    async def write(self, change: Callable[[Transaction], T]) -> T:
        """Run `change` on the writer thread; its result, once it is on disk.

        Raises:
            TryLater: the disk or the map is full; nothing was written.
        """
        future: Future[T] = Future()
        self._queue.put((change, future))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Finish what was asked, then close."""
        self._queue.put(None)
        self._thread.join()
        self._env.close()

    def _write(self) -> None:
        while True:
            first = self._queue.get()
            if first is None:
                return
            batch = [first]
            closing = False
            while len(batch) < BATCH and not closing:
                try:
                    more = self._queue.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    closing = True
                else:
                    batch.append(more)
            # From here on a caller that is cancelled no longer stops its change; before, it was never made.
            self._commit([one for one in batch if one[1].set_running_or_notify_cancel()])
            if closing:
                return

    def _commit(self, batch: list[tuple[Callable[[Transaction], Any], Future[Any]]]) -> None:
        done: list[tuple[Future[Any], Any]] = []
        if not batch:
            return
        try:
            with self._env.begin(write=True) as outer:
                for change, future in batch:
                    try:
                        with self._env.begin(write=True, parent=outer) as inner:
                            result = change(Transaction(inner, self._tables))
                    except lmdb.Error:
                        raise
                    except Exception as error:
                        future.set_exception(error)
                    else:
                        done.append((future, result))
        except lmdb.Error as error:
            if len(batch) > 1:  # one that is too much must not take the others with it
                for future_change in batch:
                    if not future_change[1].done():
                        self._commit([future_change])
                return
            full = isinstance(error, lmdb.MapFullError | lmdb.DiskError)
            kind = TryLater if full else Broken
            batch[0][1].set_exception(
                kind(
                    f"cannot write to the store: {error}",
                    code="store_full" if full else "internal",
                    hint="make room on the disk of the state directory",
                )
            )
            return
        for future, result in done:
            future.set_result(result)
