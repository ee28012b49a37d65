"""The gateway network namespace: agentd's address, the static rules, one veth per sandbox, and listening sockets for the daemon.

A holder process (systemd's `agentd-sandboxes.service`, or one that the warden starts) keeps the namespace alive, so that neither
daemon nor warden has to. Nothing here touches the host's own firewall or routes: in this namespace only agentd's rules exist.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute, NetlinkError

from agentd.core import addresses
from agentd.core.errors import HostLacks
from agentd.warden import netlink as nl
from agentd.warden import syscalls as sc

TABLE = "agentd"
NEIGHBOUR6 = "fe80::1"
"""The gateway's end of every veth: IPv6 answers neighbour solicitations only for an interface's own addresses, IPv4's ARP for all."""
ETH_INDEX = 2
"""The index of eth0 inside: fixed, so that nothing has to be looked up; lo is 1."""


@dataclass(frozen=True, slots=True)
class Wire:
    """One sandbox's connection: its veth's name in the gateway, its addresses."""

    veth: str
    address4: str
    address6: str

    def elements(self) -> list[nl.Element]:
        """What makes the static rules know this sandbox."""
        key = nl.ifname_key(self.veth)
        four, six = socket.inet_pton(socket.AF_INET, self.address4), socket.inet_pton(socket.AF_INET6, self.address6)
        found = [
            nl.Element("src4", key + four, f'"{self.veth}" . {self.address4}'),
            nl.Element("src6", key + six, f'"{self.veth}" . {self.address6}'),
        ]
        for what in ("tx", "rx", "deny"):
            name = f"{self.veth}_{what}"
            found.append(nl.Element(f"c_{what}", key, f'"{self.veth}" : "{name}"', objref=name))
        port = struct.pack(">H", addresses.AGENT_API_PORT).ljust(4, b"\0")
        tcp = bytes([socket.IPPROTO_TCP]).ljust(4, b"\0")
        gateway4 = socket.inet_pton(socket.AF_INET, addresses.GATEWAY4)
        gateway6 = socket.inet_pton(socket.AF_INET6, addresses.GATEWAY6)
        service = f"tcp . {addresses.AGENT_API_PORT}"
        found.append(
            nl.Element("svc4", key + gateway4 + tcp + port, f'"{self.veth}" . {addresses.GATEWAY4} . {service}')
        )
        found.append(
            nl.Element("svc6", key + gateway6 + tcp + port, f'"{self.veth}" . {addresses.GATEWAY6} . {service}')
        )
        return found

    def counters(self) -> list[str]:
        """The names of its counters."""
        return [f"{self.veth}_{what}" for what in ("tx", "rx", "deny")]

    def as_text(self) -> str:
        """The same in nft's own language, as it could be loaded by hand."""
        lines = [f"add counter inet {TABLE} {name}" for name in self.counters()]
        return "\n".join(
            lines + [f"add element inet {TABLE} {one.set_name} {{ {one.text} }}" for one in self.elements()]
        )


class Gateway:
    """The namespace and the sockets in it that change it."""

    def __init__(self, namespace: int, holder_pid: int):
        self._namespace = namespace
        self.holder_pid = holder_pid
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        with self.inside():
            self._route = nl.Channel(nl.NETLINK_ROUTE)
            self._nft = nl.Channel(nl.NETLINK_NETFILTER)
        self._listening: dict[int, list[socket.socket]] = {}

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This process's network namespace is the gateway's, until the end of the block."""
        sc.setns(self._namespace, sc.CLONE_NEWNET)
        try:
            yield
        finally:
            self._return_home()

    def _return_home(self) -> None:
        try:
            sc.setns(self._home, sc.CLONE_NEWNET)
        except OSError:
            os._exit(70)  # in the wrong namespace nothing that follows would be true

    def set_up(self, skeleton: str, run: Path, busy: bool) -> None:
        """Addresses and rules in force. Rules that are in place stay while sandboxes live; else a changed skeleton is loaded.

        Raises:
            HostLacks: nft is missing or the kernel refuses the rules.
        """
        digest = hashlib.sha256(skeleton.encode()).hexdigest()
        mark = run / "skeleton"
        with self.inside():
            for name, value in (("default/accept_dad", "0"), ("all/forwarding", "0")):
                Path(f"/proc/sys/net/ipv6/conf/{name}").write_text(value)
            index = socket.if_nametoindex("lo")
            self._route.request(
                [
                    nl.set_link(None, index),
                    nl.new_address(index, addresses.GATEWAY4),
                    nl.new_address(index, addresses.GATEWAY6),
                ],
                "cannot give the gateway its addresses",
            )
            there = nl.has_table(self._nft, TABLE)
            known = mark.read_text() if mark.exists() else ""
            if there and (busy or known == digest):
                return
            try:
                done = subprocess.run(
                    ["nft", "-f", "-"], input=skeleton, capture_output=True, text=True, check=False, timeout=30
                )
            except FileNotFoundError:
                raise HostLacks(
                    "cannot load the network rules: no program nft", hint="apt-get install nftables"
                ) from None
            if done.returncode:
                raise HostLacks(
                    f"cannot load the network rules: {done.stderr.strip()[:500]}",
                    hint="the kernel needs nf_tables with inet, reject and concatenated sets",
                )
        mark.write_text(digest)

    def listen(self, port: int) -> list[socket.socket]:
        """Listening TCP sockets on agentd.internal's addresses. The warden keeps them, so while the daemon restarts callers wait in the backlog."""
        if port not in self._listening:
            found = []
            with self.inside():
                for family, address in ((socket.AF_INET, addresses.GATEWAY4), (socket.AF_INET6, addresses.GATEWAY6)):
                    one = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    one.bind((address, port))
                    one.listen(1024)
                    found.append(one)
            self._listening[port] = found
        return self._listening[port]

    def new_namespace(self) -> tuple[int, nl.Channel]:
        """A fresh network namespace and a route channel in it."""
        try:
            sc.unshare(sc.CLONE_NEWNET)
            namespace = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            channel = nl.Channel(nl.NETLINK_ROUTE)
            for name in ("default/accept_dad", "default/accept_ra"):
                Path(f"/proc/sys/net/ipv6/conf/{name}").write_text("0")
            return namespace, channel
        finally:
            self._return_home()

    def connect(self, slot: int, alias: str) -> tuple[int, Wire]:
        """A namespace for the sandbox in `slot`, wired to the gateway and known to its rules: `(namespace, wire)`."""
        wire = Wire("agv" + secrets.token_hex(5), addresses.slot_address4(slot), addresses.slot_address6(slot))
        namespace, channel = self.new_namespace()
        try:
            self._route.request([nl.new_veth(wire.veth, "eth0", ETH_INDEX, namespace)], "cannot make a veth")
            with self.inside():
                index = socket.if_nametoindex(wire.veth)
            self._route.request(
                [
                    nl.set_link(None, index, alias),
                    nl.new_route(index, wire.address4, None, socket.AF_INET),
                    nl.new_route(index, wire.address6, None, socket.AF_INET6),
                    nl.new_address(index, NEIGHBOUR6),
                ],
                "cannot route to a sandbox",
            )
            channel.request(
                [
                    nl.set_link(None, 1),
                    nl.set_link(None, ETH_INDEX),
                    nl.new_address(ETH_INDEX, wire.address4),
                    nl.new_address(ETH_INDEX, wire.address6),
                    nl.new_route(ETH_INDEX, addresses.GATEWAY4, None, socket.AF_INET),
                    nl.new_route(ETH_INDEX, None, addresses.GATEWAY4, socket.AF_INET),
                    nl.new_route(ETH_INDEX, None, NEIGHBOUR6, socket.AF_INET6),
                ],
                "cannot configure a sandbox's network",
            )
            messages = [nl.counter_message(nl.NFT_MSG_NEWOBJ, TABLE, name) for name in wire.counters()]
            messages += [nl.element_message(nl.NFT_MSG_NEWSETELEM, TABLE, one) for one in wire.elements()]
            self._nft.transaction(messages, "cannot add a sandbox to the network rules")
        except OSError:
            os.close(namespace)
            raise
        finally:
            channel.close()
        return namespace, wire

    def disconnect(self, wire: Wire) -> None:
        """Forget the sandbox: from now on nothing it sends passes. The veth goes with its namespace."""
        messages = [nl.element_message(nl.NFT_MSG_DELSETELEM, TABLE, one) for one in wire.elements()]
        messages += [nl.counter_message(nl.NFT_MSG_DELOBJ, TABLE, name) for name in wire.counters()]
        try:
            self._nft.transaction(messages, "cannot take a sandbox out of the network rules")
        except FileNotFoundError:
            pass

    def traffic(self, wire: Wire) -> dict[str, tuple[int, int]]:
        """`(bytes, packets)` sent, received and denied so far, from the kernel's counters."""
        return {what: nl.read_counter(self._nft, TABLE, f"{wire.veth}_{what}") for what in ("tx", "rx", "deny")}

    def forget_all_but(self, wires: dict[str, Wire]) -> int:
        """Remove veths and elements of sandboxes that no longer exist; how many veths. Only at start: this lists everything."""
        removed = 0
        with self.inside():
            listed = json.loads(
                subprocess.run(
                    ["nft", "-j", "list", "table", "inet", TABLE], capture_output=True, check=True, timeout=30
                ).stdout
            )
            with IPRoute() as route:
                links = {link.get_attr("IFLA_IFNAME"): link["index"] for link in route.get_links()}
                for name, index in links.items():
                    if name.startswith("agv") and name not in wires:
                        try:
                            route.link("del", index=index)
                        except NetlinkError:
                            pass  # its namespace took it along meanwhile
                        removed += 1
        messages: list[tuple[int, int, bytes]] = []
        for one in listed["nftables"]:
            found = one.get("set") or one.get("map") or {}
            for raw in found.get("elem", []):
                element = _stale(found["name"], raw, wires)
                if element:
                    messages.append(nl.element_message(nl.NFT_MSG_DELSETELEM, TABLE, element))
        for one in listed["nftables"]:
            name = one.get("counter", {}).get("name", "")
            if name.startswith("agv") and name.split("_")[0] not in wires:
                messages.append(nl.counter_message(nl.NFT_MSG_DELOBJ, TABLE, name))
        if messages:
            self._nft.transaction(messages, "cannot remove stale network elements")
        return removed


_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}


def _stale(set_name: str, raw: Any, wires: dict[str, Wire]) -> nl.Element | None:
    """The element that `nft -j` printed, if its interface belongs to no sandbox."""
    key = raw[0] if isinstance(raw, list) else raw
    parts = key["concat"] if isinstance(key, dict) and "concat" in key else [key]
    if parts[0] in wires or not str(parts[0]).startswith("agv"):
        return None
    encoded = nl.ifname_key(parts[0])
    for part in parts[1:]:
        if isinstance(part, int):
            encoded += struct.pack(">H", part).ljust(4, b"\0")
        elif part in _PROTOCOLS:
            encoded += bytes([_PROTOCOLS[part]]).ljust(4, b"\0")
        else:
            encoded += socket.inet_pton(socket.AF_INET6 if ":" in part else socket.AF_INET, part)
    return nl.Element(set_name, encoded, str(key))


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot: with its pid, a name that is never reused. 0 if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])


def find_holder(run: Path, residents: list[int]) -> int:
    """The pid of the process that holds the namespace: the one in the delegated group, else one that we start (and find again).

    Raises:
        HostLacks: it cannot be started, or shares the host's network.
    """
    own = os.stat("/proc/self/ns/net").st_ino
    for pid in residents:
        if os.stat(f"/proc/{pid}/ns/net").st_ino == own:
            raise HostLacks(
                f"cannot use process {pid} as holder of the gateway: it has the host's network",
                hint="agentd-sandboxes.service needs PrivateNetwork=yes",
            )
        return pid
    record = run / "holder"
    if record.exists():
        pid, started = map(int, record.read_text().split())
        if start_time(pid) == started:
            return pid
    process = subprocess.Popen(
        ["unshare", "--net", "--", "sleep", "infinity"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    deadline = time.monotonic() + 5
    while process.poll() is None and time.monotonic() < deadline:
        if (
            Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n"
            and os.stat(f"/proc/{process.pid}/ns/net").st_ino != own
        ):
            record.write_text(f"{process.pid} {start_time(process.pid)}")
            return process.pid
        time.sleep(0.002)
    process.kill()
    raise HostLacks(
        "cannot make a network namespace",
        hint="agentd needs root with CAP_SYS_ADMIN; in a container try scripts/quickstart --vm",
    )
