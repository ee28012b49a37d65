"""Raw rtnetlink and nf_tables messages: the few that a sandbox needs, each batch in one round trip.

pyroute2 finds and lists; this is the hot path (0.2 ms where `nft -f` costs 12–74 ms). Sources: rtnetlink(7), linux/netfilter/nf_tables.h,
linux/netfilter/nfnetlink.h, linux/if_link.h, linux/veth.h.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

NLM_F_REQUEST = 0x01
NLM_F_ACK = 0x04
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_DUMP = 0x300
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLA_F_NESTED = 0x8000

RTM_NEWLINK = 16
RTM_NEWADDR = 20
RTM_NEWROUTE = 24
IFF_UP = 1
IFLA_IFNAME = 3
IFLA_LINKINFO = 18
IFLA_IFALIAS = 20
IFLA_NET_NS_FD = 28
IFLA_INFO_KIND = 1
IFLA_INFO_DATA = 2
VETH_INFO_PEER = 1
IFA_ADDRESS = 1
IFA_LOCAL = 2
IFA_FLAGS = 8
IFA_F_NODAD = 0x02
RTA_DST = 1
RTA_OIF = 4
RTA_GATEWAY = 5
RTNH_F_ONLINK = 4
RT_TABLE_MAIN = 254
RTPROT_STATIC = 4
RT_SCOPE_UNIVERSE = 0
RT_SCOPE_LINK = 253
RTN_UNICAST = 1

NFNL_SUBSYS_NFTABLES = 10
NFNL_MSG_BATCH_BEGIN = 16
NFNL_MSG_BATCH_END = 17
NFT_MSG_GETTABLE = 1
NFT_MSG_NEWSETELEM = 12
NFT_MSG_GETSETELEM = 13
NFT_MSG_DELSETELEM = 14
NFT_MSG_NEWOBJ = 18
NFT_MSG_GETOBJ = 19
NFT_MSG_DELOBJ = 20
NFTA_TABLE_NAME = 1
NFTA_SET_ELEM_LIST_TABLE = 1
NFTA_SET_ELEM_LIST_SET = 2
NFTA_SET_ELEM_LIST_ELEMENTS = 3
NFTA_LIST_ELEM = 1
NFTA_SET_ELEM_KEY = 1
NFTA_SET_ELEM_DATA = 2
NFTA_SET_ELEM_OBJREF = 9
NFTA_DATA_VALUE = 1
NFTA_OBJ_TABLE = 1
NFTA_OBJ_NAME = 2
NFTA_OBJ_TYPE = 3
NFTA_OBJ_DATA = 4
NFT_OBJECT_COUNTER = 1
NFTA_COUNTER_BYTES = 1
NFTA_COUNTER_PACKETS = 2
NFPROTO_INET = 1

IFNAMSIZ = 16


def _pad(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def attribute(kind: int, payload: bytes) -> bytes:
    """One netlink attribute."""
    return _pad(struct.pack("=HH", 4 + len(payload), kind) + payload)


def nest(kind: int, *attributes: bytes) -> bytes:
    """One nested attribute."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def attributes(data: bytes) -> Iterable[tuple[int, bytes]]:
    """The attributes in `data`, nesting flags taken off."""
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4:
            return
        yield kind & 0x3FFF, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def message(kind: int, flags: int, seq: int, payload: bytes) -> bytes:
    """One netlink message."""
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, seq, 0) + payload


class Channel:
    """One netlink socket; it belongs to the network namespace that the process was in when it was made."""

    def __init__(self, family: int):
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
        self._socket.bind((0, 0))
        self._socket.settimeout(5.0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._seq = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def next_seq(self) -> int:
        """A fresh sequence number."""
        self._seq += 1
        return self._seq

    def request(self, messages: list[tuple[int, int, bytes]], what: str) -> None:
        """Send `(type, flags, payload)` messages in one packet and wait for each acknowledgement.

        Raises:
            OSError: the first that the kernel refused.
        """
        waiting = {}
        packet = b""
        for kind, flags, payload in messages:
            seq = self.next_seq()
            waiting[seq] = kind
            packet += message(kind, flags | NLM_F_REQUEST | NLM_F_ACK, seq, payload)
        self._socket.send(packet)
        self._await(set(waiting), what)

    def transaction(self, messages: list[tuple[int, int, bytes]], what: str) -> None:
        """Send nf_tables messages as one atomic batch: all of them take effect or none.

        Raises:
            OSError: the kernel refused one; nothing has changed.
        """
        generic = struct.pack("=BBH", 0, 0, socket.htons(NFNL_SUBSYS_NFTABLES))
        packet = message(NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, self.next_seq(), generic)
        for index, (kind, flags, payload) in enumerate(messages):
            body = struct.pack("=BBH", NFPROTO_INET, 0, 0) + payload
            # The last message is acknowledged, not the end of the batch: kernels before 6.10 are silent about that.
            flags |= NLM_F_REQUEST | (NLM_F_ACK if index == len(messages) - 1 else 0)
            packet += message((NFNL_SUBSYS_NFTABLES << 8) | kind, flags, self.next_seq(), body)
        last = self._seq
        packet += message(NFNL_MSG_BATCH_END, NLM_F_REQUEST, self.next_seq(), generic)
        self._socket.send(packet)
        self._await({last}, what)

    def get(self, kind: int, payload: bytes) -> bytes | None:
        """One nf_tables object's attributes; None when there is no such object."""
        seq = self.next_seq()
        body = struct.pack("=BBH", NFPROTO_INET, 0, 0) + payload
        self._socket.send(message((NFNL_SUBSYS_NFTABLES << 8) | kind, NLM_F_REQUEST, seq, body))
        while True:
            data = self._socket.recv(1 << 16)
            length, got, _, got_seq, _ = struct.unpack_from("=IHHII", data)
            if got_seq != seq:
                continue
            if got == NLMSG_ERROR:
                number = -struct.unpack_from("=i", data, 16)[0]
                if number == errno.ENOENT:
                    return None
                raise OSError(number, f"nf_tables get: {os.strerror(number)}")
            return data[20:length]

    def _await(self, waiting: set[int], what: str) -> None:
        problem: OSError | None = None
        newest = max(waiting)
        while waiting:
            data = self._socket.recv(1 << 16)
            offset = 0
            while offset + 16 <= len(data):
                length, kind, _, seq, _ = struct.unpack_from("=IHHII", data, offset)
                if kind == NLMSG_ERROR and seq <= newest:
                    number = -struct.unpack_from("=i", data, offset + 16)[0]
                    if number and problem is None:
                        problem = OSError(number, f"{what}: {os.strerror(number)}")
                        if (
                            seq not in waiting
                        ):  # refused inside a batch: the kernel acknowledges the end all the same, or drops it
                            self._drain()
                            raise problem
                    waiting.discard(seq)
                offset += (length + 3) & ~3
        if problem:
            raise problem

    def _drain(self) -> None:
        self._socket.setblocking(False)
        try:
            while True:
                self._socket.recv(1 << 16)
        except BlockingIOError:
            pass
        finally:
            self._socket.settimeout(5.0)


def _link(index: int, up: bool, *payload: bytes) -> bytes:
    return struct.pack("=BxHiII", 0, 0, index, IFF_UP if up else 0, IFF_UP if up else 0) + b"".join(payload)


def new_veth(name: str, peer: str, peer_index: int, peer_ns: int) -> tuple[int, int, bytes]:
    """A veth whose other end is born in the namespace `peer_ns` with index `peer_index`. It must not be born up (ENOTCONN)."""
    other = _link(
        peer_index,
        False,
        attribute(IFLA_IFNAME, peer.encode() + b"\0"),
        attribute(IFLA_NET_NS_FD, struct.pack("=i", peer_ns)),
    )
    info = nest(
        IFLA_LINKINFO,
        attribute(IFLA_INFO_KIND, b"veth\0"),
        nest(IFLA_INFO_DATA, attribute(VETH_INFO_PEER | NLA_F_NESTED, other)),
    )
    own = attribute(IFLA_IFNAME, name.encode() + b"\0")
    return RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, _link(0, False, own, info)


def set_link(name: str | None, index: int, alias: str | None = None) -> tuple[int, int, bytes]:
    """Bring a link up, named by `name` or `index`; with `alias`, label it."""
    payload = []
    if name:
        payload.append(attribute(IFLA_IFNAME, name.encode() + b"\0"))
    if alias:
        payload.append(attribute(IFLA_IFALIAS, alias.encode() + b"\0"))
    return RTM_NEWLINK, 0, _link(index, True, *payload)


def new_address(index: int, address: str) -> tuple[int, int, bytes]:
    """A /32 or /128, usable at once (no duplicate address detection)."""
    parsed = ipaddress.ip_address(address)
    family = socket.AF_INET if parsed.version == 4 else socket.AF_INET6
    payload = struct.pack("=BBBBi", family, parsed.max_prefixlen, 0, 0, index)
    payload += attribute(IFA_LOCAL, parsed.packed) + attribute(IFA_ADDRESS, parsed.packed)
    payload += attribute(IFA_FLAGS, struct.pack("=I", IFA_F_NODAD))
    return RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, payload


def new_route(index: int, destination: str | None, gateway: str | None, family: int) -> tuple[int, int, bytes]:
    """A host route to `destination` on a link, or the default route through `gateway`, which need not be on-link."""
    payload = b""
    bits = 0
    if destination is not None:
        packed = ipaddress.ip_address(destination).packed
        bits = len(packed) * 8
        payload += attribute(RTA_DST, packed)
    flags = 0
    scope = RT_SCOPE_LINK if gateway is None and family == socket.AF_INET else RT_SCOPE_UNIVERSE
    if gateway is not None:
        payload += attribute(RTA_GATEWAY, ipaddress.ip_address(gateway).packed)
        flags = RTNH_F_ONLINK
    payload += attribute(RTA_OIF, struct.pack("=i", index))
    head = struct.pack("=BBBBBBBBI", family, bits, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, scope, RTN_UNICAST, flags)
    return RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, head + payload


@dataclass(frozen=True, slots=True)
class Element:
    """One element of a set (or map, with `data` or `objref`), its key already encoded, and as nft text."""

    set_name: str
    key: bytes
    text: str
    data: bytes | None = None
    objref: str | None = None


def ifname_key(name: str) -> bytes:
    """An `ifname` as set key."""
    return name.encode().ljust(IFNAMSIZ, b"\0")


def element_message(kind: int, table: str, element: Element) -> tuple[int, int, bytes]:
    """NEWSETELEM or DELSETELEM for one element."""
    inner = nest(NFTA_SET_ELEM_KEY, attribute(NFTA_DATA_VALUE, element.key))
    if kind == NFT_MSG_NEWSETELEM:
        if element.data is not None:
            inner += nest(NFTA_SET_ELEM_DATA, attribute(NFTA_DATA_VALUE, element.data))
        if element.objref is not None:
            inner += attribute(NFTA_SET_ELEM_OBJREF, element.objref.encode() + b"\0")
    payload = attribute(NFTA_SET_ELEM_LIST_TABLE, table.encode() + b"\0")
    payload += attribute(NFTA_SET_ELEM_LIST_SET, element.set_name.encode() + b"\0")
    payload += nest(NFTA_SET_ELEM_LIST_ELEMENTS, nest(NFTA_LIST_ELEM, inner))
    return kind, NLM_F_CREATE if kind == NFT_MSG_NEWSETELEM else 0, payload


def counter_message(kind: int, table: str, name: str) -> tuple[int, int, bytes]:
    """NEWOBJ or DELOBJ for a counter that starts at 0."""
    payload = attribute(NFTA_OBJ_TABLE, table.encode() + b"\0") + attribute(NFTA_OBJ_NAME, name.encode() + b"\0")
    payload += attribute(NFTA_OBJ_TYPE, struct.pack(">I", NFT_OBJECT_COUNTER))
    if kind == NFT_MSG_NEWOBJ:
        zero = struct.pack(">Q", 0)
        payload += nest(NFTA_OBJ_DATA, attribute(NFTA_COUNTER_BYTES, zero), attribute(NFTA_COUNTER_PACKETS, zero))
    return kind, NLM_F_CREATE | NLM_F_EXCL if kind == NFT_MSG_NEWOBJ else 0, payload


def read_counter(channel: Channel, table: str, name: str) -> tuple[int, int]:
    """`(bytes, packets)` of a named counter; zeros when it is gone."""
    payload = attribute(NFTA_OBJ_TABLE, table.encode() + b"\0") + attribute(NFTA_OBJ_NAME, name.encode() + b"\0")
    payload += attribute(NFTA_OBJ_TYPE, struct.pack(">I", NFT_OBJECT_COUNTER))
    found = channel.get(NFT_MSG_GETOBJ, payload)
    if found is None:
        return 0, 0
    data = dict(attributes(dict(attributes(found))[NFTA_OBJ_DATA]))
    return struct.unpack(">Q", data[NFTA_COUNTER_BYTES])[0], struct.unpack(">Q", data[NFTA_COUNTER_PACKETS])[0]


def has_table(channel: Channel, table: str) -> bool:
    """Whether the table exists."""
    return channel.get(NFT_MSG_GETTABLE, attribute(NFTA_TABLE_NAME, table.encode() + b"\0")) is not None
