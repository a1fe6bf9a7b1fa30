"""Addresses of ranks: their text, and whether they lie on this machine's loopback."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

from astra_runtime.transport.credentials import KeysError


def parse_address(text: str) -> tuple[str, int]:
    """`host:port` (IPv6 in brackets) as a pair; raises ValueError with what was expected."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 0xFFFF:
        raise ValueError(f'address: expected "host:port", got {text!r}')
    return host.strip("[]"), int(port)


def require_loopback(hosts: Iterable[str]) -> None:
    """Refuses plaintext where it would leave this machine."""
    for host in hosts:
        if not is_loopback(host):
            raise KeysError(
                f"keys: expected a folder written by `astra keys init`, since {host} is not on "
                "loopback: plaintext stays on one machine"
            )


def is_loopback(host: str) -> bool:
    """Whether everything that `host` may stand for is loopback; an unknown name is not."""
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in entries)
