"""Who speaks from an address. The kernel drops what a sandbox sends from any address but its own, so an address is an identity;
a token is asked for as well, so that a process that only reaches the address has not yet the task's rights."""

from __future__ import annotations

import hmac
import ipaddress

import msgspec


class Caller(msgspec.Struct, frozen=True):
    """One attempt of one task, as the agent API sees it."""

    task: str
    epoch: int
    token: str


class Callers:
    """Callers by address."""

    def __init__(self) -> None:
        self._by_address: dict[str, Caller] = {}

    def admit(self, addresses: tuple[str, ...], caller: Caller) -> None:
        """From now on `caller` speaks from `addresses`."""
        for address in addresses:
            self._by_address[str(ipaddress.ip_address(address))] = caller

    def dismiss(self, task: str) -> None:
        """Nobody speaks for `task` any more."""
        self._by_address = {address: caller for address, caller in self._by_address.items() if caller.task != task}

    def identify(self, address: str, token: str | None) -> Caller | None:
        """Who this is: both the address and the token must be right."""
        caller = self._by_address.get(str(ipaddress.ip_address(address)))
        if caller is None or token is None or not hmac.compare_digest(caller.token.encode(), token.encode()):
            return None
        return caller
