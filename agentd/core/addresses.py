"""The address plan of the gateway namespace: one /32 and one /128 per sandbox, one virtual address for agentd.

Source: RFC 1918 and RFC 4193 ranges that never leave the gateway namespace.
"""

from __future__ import annotations

import ipaddress

GATEWAY4 = "10.199.255.1"
"""agentd.internal, as every sandbox sees it."""
GATEWAY6 = "fd00:a6e7::1"
AGENT_API_PORT = 80
INTERNAL_NAME = "agentd.internal"

SLOTS = 16384
"""How many sandboxes one host can hold: each has an id range, and 16,384 ranges of 65,536 ids fit below 2**32."""
ID_BASE = 0x70000000
"""First uid and gid of slot 0: outside login.defs, systemd-nspawn and the ranges of other container managers."""
ID_RANGE = 65536
AGENT_ID = 1000
"""uid and gid of the agent inside its user namespace."""

_BASE4 = int(ipaddress.IPv4Address("10.200.0.0"))
_BASE6 = int(ipaddress.IPv6Address("fd00:a6e7:1::"))


def slot_address4(slot: int) -> str:
    """The IPv4 address of the sandbox in `slot` (0 … 16,383)."""
    return str(ipaddress.IPv4Address(_BASE4 + slot + 2))


def slot_address6(slot: int) -> str:
    """The IPv6 address of the sandbox in `slot`."""
    return str(ipaddress.IPv6Address(_BASE6 + slot + 2))


def slot_id_base(slot: int) -> int:
    """The uid and gid on the host of root inside the sandbox in `slot`."""
    return ID_BASE + slot * ID_RANGE
