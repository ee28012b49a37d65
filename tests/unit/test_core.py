"""Ids, units, places and the warden's wire types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentd.core import addresses, ids, units, wire
from agentd.core.errors import AgentdError, InvalidField, RequestError
from agentd.core.places import Places

VALID: dict[str, Any] = {
    "id": "k7m2q9x4ta",
    "epoch": 1,
    "tenant": "default",
    "argv": ["true"],
    "env": {"A": "b"},
    "cwd": "/workspace",
    "limits": {"memory_bytes": 1 << 28, "cpus": 1.0, "pids": 64},
}


def test_ids_are_names_begin_with_a_letter_and_differ() -> None:
    made = {ids.new_task_id() for _ in range(500)}
    assert len(made) == 500
    assert all(ids.is_name(one) and one[0].isalpha() and len(one) == 10 for one in made)


@pytest.mark.parametrize("name", ["", ".", "..", "a..b", "A", "a/b", "-a", "a b", "a\n", "x" * 41, "ä"])
def test_what_could_leave_its_directory_is_no_name(name: str) -> None:
    assert not ids.is_name(name)


@pytest.mark.parametrize(
    ("text", "count"), [("512M", 512 << 20), ("1.5G", 3 << 29), (4096, 4096), ("4k", 4096), ("1GiB", 1 << 30), ("7", 7)]
)
def test_sizes(text: int | str, count: int) -> None:
    assert units.parse_size(text) == count


@pytest.mark.parametrize("text", ["12X", "", "-1", -1, True, "1 2", "G"])
def test_what_is_not_a_size_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=r"size|below"):
        units.parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("1h30m", 5400), ("250ms", 0.25), (2.5, 2.5), ("3", 3), ("1d", 86400)]
)
def test_durations(text: float | str, seconds: float) -> None:
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5x", "m5", "-3s", -1, float("nan"), float("inf"), True, "1h 2q"])
def test_what_is_not_a_duration_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="duration"):
        units.parse_duration(text)


@given(st.integers(0, 1 << 53))
def test_a_number_of_bytes_is_itself(count: int) -> None:
    assert units.parse_size(count) == units.parse_size(str(count)) == count


def test_agentd_root_puts_every_place_below_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AGENTD_ROOT", str(tmp_path))
    places = Places.from_environ()
    for path in (places.config, places.control_socket, places.warden_socket, places.state, places.workspaces):
        assert path.is_relative_to(tmp_path)
    monkeypatch.delenv("AGENTD_ROOT")
    assert Places.from_environ().control_socket == Path("/run/agentd/agentd.sock")


def test_slots_share_neither_ids_nor_addresses() -> None:
    last = addresses.SLOTS - 1
    assert addresses.slot_id_base(last) + addresses.ID_RANGE <= 2**32
    assert addresses.slot_id_base(1) - addresses.slot_id_base(0) == addresses.ID_RANGE
    assert len({addresses.slot_address4(slot) for slot in range(addresses.SLOTS)}) == addresses.SLOTS
    assert len({addresses.slot_address6(slot) for slot in range(addresses.SLOTS)}) == addresses.SLOTS


def test_a_valid_spec_travels_unchanged() -> None:
    spec = wire.spec_from(wire.Fields(VALID))
    assert wire.spec_from(wire.Fields(json.loads(json.dumps(spec.as_dict())))) == spec


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": "../x"}, "id"),
        ({"epoch": 0}, "epoch"),
        ({"epoch": True}, "epoch"),
        ({"tenant": "A/b"}, "tenant"),
        ({"argv": []}, "argv"),
        ({"argv": ["a\0b"]}, "argv"),
        ({"argv": "true"}, "argv"),
        ({"env": {"A=B": "c"}}, "env.A=B"),
        ({"env": {"A": "b\0c"}}, "env.A"),
        ({"cwd": "relative"}, "cwd"),
        ({"cwd": "/a/../b"}, "cwd"),
        ({"limits": {"memory_bytes": 1, "cpus": 1, "pids": 8}}, "limits.memory_bytes"),
        ({"limits": {"memory_bytes": 1 << 28, "cpus": float("nan"), "pids": 8}}, "limits.cpus"),
        ({"mounts": [{"source": "/a", "target": "b"}]}, "mounts[0].target"),
        ({"mounts": [{"source": "/a", "target": "/b", "rw": True}]}, "mounts[0].rw"),
        ({"capabilities": ["all"]}, None),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], field: str | None) -> None:
    with pytest.raises(InvalidField) as caught:
        fields = wire.Fields(VALID | change)
        wire.spec_from(fields)
        fields.end()
    assert caught.value.field == (field or "capabilities")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from([*VALID, "mounts", "cpu_weight", "x"]), _json))
def test_anything_is_a_spec_or_a_refusal(change: dict[str, Any]) -> None:
    try:
        spec = wire.spec_from(wire.Fields(VALID | change))
    except AgentdError as error:
        assert error.field is not None
    else:
        assert ids.is_name(spec.id) and spec.argv and spec.limits.pids >= 4


@given(st.binary(max_size=200))
def test_any_bytes_decode_to_an_object_or_a_refusal(packet: bytes) -> None:
    try:
        assert isinstance(wire.decode(packet), dict)
    except RequestError as error:
        assert error.code == "invalid_json"


def test_deep_nesting_is_a_refusal() -> None:
    with pytest.raises(RequestError):
        wire.decode(b'{"a":' * 100_000)


def test_a_message_over_the_limit_is_refused_before_it_is_sent() -> None:
    with pytest.raises(RequestError, match=str(wire.MAX_MESSAGE_BYTES)):
        wire.encode({"env": "x" * wire.MAX_MESSAGE_BYTES})


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../b", "a//b", "", ".", "a/.", "x\0y", "a" * 300])
def test_a_path_that_leaves_the_workspace_is_refused(path: str) -> None:
    with pytest.raises(InvalidField):
        wire.relative_path(path, "path")
    assert wire.relative_path("a/b.txt", "path") == "a/b.txt"


@pytest.mark.parametrize("text", ["9" * 400, "1e400", "9" * 5000 + "K"])
def test_a_size_beyond_all_machines_is_refused_not_an_overflow(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        units.parse_size(text)


@pytest.mark.parametrize("value", [10**400, "9" * 400, "9" * 400 + "h"])
def test_a_duration_beyond_all_clocks_is_refused_not_an_overflow(value: Any) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        units.parse_duration(value)


@given(st.integers(0, 1 << 50))
def test_a_size_that_was_shown_reads_back_within_its_rounding(count: int) -> None:
    assert abs(units.parse_size(units.format_size(count)) - count) <= max(0.06 * count, 0.5)


@given(st.floats(0, 1e8))
def test_a_duration_that_was_shown_reads_back_within_its_rounding(seconds: float) -> None:
    assert abs(units.parse_duration(units.format_duration(seconds)) - seconds) <= max(
        60.0 if seconds >= 3600 else 1.0, 0.05
    )


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (b'{"cpus":1' + b"0" * 400 + b"}", "limits.cpus"),
        (b'{"pids":1' + b"0" * 400 + b"}", "limits.pids"),
    ],
)
def test_a_number_of_400_digits_is_refused_by_name(raw: bytes, field: str) -> None:
    limits = {"memory_bytes": 1 << 28, "cpus": 1.0, "pids": 64} | wire.decode(raw)
    with pytest.raises(InvalidField) as caught:
        wire.spec_from(wire.Fields(VALID | {"limits": limits}))
    assert caught.value.field == field


@pytest.mark.parametrize("change", ['{"argv": ["\\ud800"]}', '{"env": {"A": "\\udfff"}}', '{"cwd": "/\\ud800"}'])
def test_text_that_no_program_could_be_given_is_refused(change: str) -> None:
    with pytest.raises(InvalidField):
        wire.spec_from(wire.Fields(VALID | wire.decode(change.encode())))


def test_a_half_surrogate_is_no_path() -> None:
    with pytest.raises(InvalidField):
        wire.relative_path("a/\ud800", "path")
    with pytest.raises(InvalidField):
        wire.absolute_path("/a\0b", "path")


def test_nesting_that_can_be_read_can_also_be_refused() -> None:
    """`decode` and the message about a wrong field have different room on the stack."""

    def at_depth(frames: int, packet: bytes) -> None:
        if frames:
            at_depth(frames - 1, packet)
            return
        with pytest.raises(AgentdError):
            wire.Fields(wire.decode(packet)).integer("seq", 0, 1)

    for nested in range(700, 1000):
        at_depth(5, b'{"seq":' + b"[" * nested + b"]" * nested + b"}")


@given(st.dictionaries(st.text(max_size=8), _json.filter(lambda value: value == value), max_size=5))
def test_what_is_encoded_is_decoded_unchanged(message: dict[str, Any]) -> None:
    there_and_back = wire.decode(wire.encode(message))
    assert json.dumps(there_and_back) == json.dumps(message)
