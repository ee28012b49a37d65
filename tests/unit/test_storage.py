"""LMDB: what is acknowledged is on disk, what fails leaves nothing, what has expired is gone."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentd.core.errors import InvalidField, TooLarge
from agentd.storage.database import Database, Transaction
from agentd.storage.episodic import SWEEP_SLICE, VALUE_LIMIT_BYTES, EpisodicStore, Scope


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[EpisodicStore]:
    found = EpisodicStore(tmp_path / "memory", clock)
    yield found
    found.close()


async def put(store: EpisodicStore, key: str, value: bytes, ttl_s: float | None = None, owner: str = "o") -> None:
    await store.put(Scope.USER, owner, key, value, "text/plain", ttl_s, "task")


async def test_what_was_acknowledged_is_there_after_reopening(tmp_path: Path) -> None:
    first = Database(tmp_path / "db", ("t",))
    await asyncio.gather(*(first.write(lambda txn, i=i: txn.put("t", b"%d" % i, b"v")) for i in range(300)))  # type: ignore[misc]
    first.close()
    second = Database(tmp_path / "db", ("t",))
    with second.read() as txn:
        assert len(list(txn.scan("t"))) == 300
    second.close()


async def test_a_change_that_fails_leaves_nothing_and_fails_alone(tmp_path: Path) -> None:
    database = Database(tmp_path / "db", ("t",))

    def bad(txn: Transaction) -> None:
        txn.put("t", b"bad", b"x")
        raise ValueError("no")

    results = await asyncio.gather(
        database.write(lambda txn: txn.put("t", b"a", b"1")),
        database.write(bad),
        database.write(lambda txn: txn.put("t", b"b", b"2")),
        return_exceptions=True,
    )
    assert isinstance(results[1], ValueError)
    with database.read() as txn:
        assert [key for key, _ in txn.scan("t")] == [b"a", b"b"]
    database.close()


async def test_a_caller_that_is_cancelled_does_not_stop_the_writer(tmp_path: Path) -> None:
    database = Database(tmp_path / "db", ("t",))
    callers = [asyncio.ensure_future(database.write(lambda txn, i=i: txn.put("t", b"%d" % i, b""))) for i in range(50)]  # type: ignore[misc]
    await asyncio.sleep(0)
    for caller in callers[::2]:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    await asyncio.wait_for(database.write(lambda txn: txn.put("t", b"last", b"")), 5)
    with database.read() as txn:
        assert txn.get("t", b"last") == b"" and all(txn.get("t", b"%d" % i) is not None for i in range(1, 50, 2))
    database.close()


WRITER = """
import asyncio, sys
from pathlib import Path
from agentd.storage.database import Database
async def main():
    database = Database(Path(sys.argv[1]), ("t",))
    i = 0
    while True:
        await asyncio.gather(*(database.write(lambda txn, k=k: txn.put("t", b"%d" % k, b"v" * 200)) for k in range(i, i + 8)))
        for k in range(i, i + 8):
            print(k, flush=True)
        i += 8
asyncio.run(main())
"""


@pytest.mark.parametrize("lines", [1, 40, 133, 301])
def test_kill_9_loses_no_acknowledged_write(tmp_path: Path, lines: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "db")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        seen = [int(process.stdout.readline()) for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        seen += [int(line) for line in process.stdout.read().splitlines() if line]
    database = Database(tmp_path / "db", ("t",))
    with database.read() as txn:
        assert all(txn.get("t", b"%d" % key) is not None for key in seen)
    database.close()


async def test_what_has_expired_is_gone_before_it_is_swept(store: EpisodicStore, clock: Clock) -> None:
    await put(store, "short", b"1", 10)
    await put(store, "long", b"2")
    clock.now += 9.9
    assert store.get(Scope.USER, "o", "short") is not None
    clock.now += 0.2
    assert store.get(Scope.USER, "o", "short") is None
    assert [key for key, _ in store.list(Scope.USER, "o")] == ["long"]
    assert await store.delete(Scope.USER, "o", "short") is False
    assert await store.delete(Scope.USER, "o", "long") is True


async def test_a_new_ttl_replaces_the_old_one(store: EpisodicStore, clock: Clock) -> None:
    await put(store, "k", b"1", 10)
    await put(store, "k", b"2")
    clock.now += 100
    assert await store.sweep() == 0
    found = store.get(Scope.USER, "o", "k")
    assert found is not None and found.value == b"2"


async def test_the_sweeper_takes_bounded_slices(store: EpisodicStore, clock: Clock) -> None:
    await asyncio.gather(*(put(store, f"k{i}", b"", 1) for i in range(SWEEP_SLICE + 7)))
    await put(store, "stays", b"")
    clock.now += 2
    assert [await store.sweep(), await store.sweep(), await store.sweep()] == [SWEEP_SLICE, 7, 0]
    assert store.get(Scope.USER, "o", "stays") is not None


async def test_scopes_and_owners_do_not_see_each_other(store: EpisodicStore) -> None:
    await store.put(Scope.TASK, "a", "k", b"task a", "", None, "t")
    await store.put(Scope.USER, "a", "k", b"user a", "", None, "t")
    await store.put(Scope.USER, "a/b", "k", b"user a/b", "", None, "t")
    await store.put(Scope.USER, "ä", "k/π", b"user ae", "", None, "t")
    assert store.get(Scope.TASK, "b", "k") is None
    assert [(key, entry.value) for key, entry in store.list(Scope.USER, "a")] == [("k", b"user a")]
    assert [key for key, _ in store.list(Scope.USER, "ä", "k/")] == ["k/π"]
    assert await store.forget(Scope.USER, "a") == 1
    assert store.get(Scope.TASK, "a", "k") is not None and store.get(Scope.USER, "a/b", "k") is not None


@pytest.mark.parametrize("key", ["", "a\0b", "a\nb", "x" * 257])
async def test_a_key_that_cannot_be_is_refused(store: EpisodicStore, key: str) -> None:
    with pytest.raises(InvalidField):
        await put(store, key, b"")


async def test_the_longest_key_and_value_fit_and_more_is_refused(store: EpisodicStore) -> None:
    await put(store, "k" * 256, bytes(VALUE_LIMIT_BYTES), 5, owner="x" * 40 + "/" + "y" * 32)
    with pytest.raises(TooLarge):
        await put(store, "k", bytes(VALUE_LIMIT_BYTES + 1))
    with pytest.raises(InvalidField, match="ttl_s"):
        await put(store, "k", b"", -1)


Step = st.one_of(
    st.tuples(st.just("put"), st.sampled_from("abc"), st.binary(max_size=4), st.sampled_from([None, 1.0, 5.0])),
    st.tuples(st.just("delete"), st.sampled_from("abc"), st.none(), st.none()),
    st.tuples(st.just("wait"), st.none(), st.none(), st.sampled_from([0.5, 2.0])),
    st.tuples(st.just("sweep"), st.none(), st.none(), st.none()),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(Step, max_size=15))
def test_the_store_is_a_dict_with_expiry(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, bytes, float]]
) -> None:
    async def go() -> None:
        clock = Clock()
        store = EpisodicStore(tmp_path_factory.mktemp("m"), clock)
        model: dict[str, tuple[bytes, float]] = {}
        for what, key, value, number in steps:
            if what == "put":
                await put(store, key, value, number)
                model[key] = (value, clock.now + number if number else 0)
            elif what == "delete":
                await store.delete(Scope.USER, "o", key)
                model.pop(key, None)
            elif what == "wait":
                clock.now += number
            else:
                await store.sweep()
            model = {key: (value, due) for key, (value, due) in model.items() if not 0 < due <= clock.now}
            assert {key: entry.value for key, entry in store.list(Scope.USER, "o")} == {
                key: value for key, (value, _) in model.items()
            }
        store.close()

    asyncio.run(go())
