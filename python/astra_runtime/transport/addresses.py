"""Addresses of ranks: their text, what a name resolves to, and whether that is loopback."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from astra_runtime.transport.credentials import KeysError


class Endpoint(NamedTuple):
    """One of the addresses that a name stands for, as `socket` wants it."""

    family: int
    kind: int
    protocol: int
    address: Any

    @property
    def host(self) -> str:
        return str(self.address[0])


def parse_address(text: str) -> tuple[str, int]:
    """`host:port` (IPv6 in brackets) as a pair; raises ValueError with what was expected."""
    if "://" in text:
        raise ValueError(f'address: expected "host:port", without a scheme, got {text!r}')
    host, colon, port = (part.strip() for part in text.strip().rpartition(":"))
    bracketed = host.startswith("[") and host.endswith("]")
    name = host[1:-1].strip() if bracketed else host
    if not colon or not name or any(c in name for c in "[] \t"):
        raise ValueError(f'address: expected "host:port", got {text!r}')
    if ":" in name and not bracketed:
        raise ValueError(f"address: expected an IPv6 address in brackets, got {text!r}")
    if not _is_name(name):
        raise ValueError(f"address: expected the name of a host before the colon, got {text!r:.90}")
    if not (port.isascii() and port.isdecimal() and 1 <= int(port) <= 0xFFFF):
        raise ValueError(f"address: expected a port of 1..65535 after the colon, got {text!r}")
    return name, int(port)


def parse_host(text: str) -> str:
    """A name or an address without a port (IPv6 with or without brackets), blanks stripped.

    Raises ValueError with what was expected.
    """
    name = text.strip()
    bracketed = name.startswith("[") and name.endswith("]")
    name = name[1:-1].strip() if bracketed else name
    good = name and not any(c in name for c in "[]/ \t") and _is_name(name)
    if not good or (":" in name and not _is_ipv6(name)):
        raise ValueError(f"host: expected a name or an address, without a port, got {text!r:.90}")
    return name


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _is_name(host: str) -> bool:
    """Whether names are looked up that read so: no part is empty, or longer than 63 letters."""
    try:
        return host.isprintable() and bool(host.encode("idna"))
    except UnicodeError:
        return False


def resolve(host: str, port: int, *, passive: bool = False) -> list[Endpoint]:
    """Every address that a name stands for, in the system's order of preference."""
    flags = socket.AI_PASSIVE if passive else 0
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    endpoints = [Endpoint(family, kind, protocol, at) for family, kind, protocol, _, at in answers]
    return list(dict.fromkeys(endpoints))


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
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(answer[4][0]).is_loopback for answer in answers)


def unreachable_for_others(rank: int, host: str, addresses: Mapping[int, tuple[str, int]]) -> str:
    """A sentence about a rank that listens on loopback and is dialed from elsewhere; else ""."""
    dialers = [n for n in addresses if n > rank and not is_loopback(addresses[n][0])]
    if not dialers or not is_loopback(host):
        return ""
    who = ", ".join(map(str, dialers))
    here = ", ".join(dict.fromkeys(endpoint.host for endpoint in resolve(host, 0)))
    stands = "" if here == host else f", which {host} stands for on this machine"
    return (
        f"rank {rank} listens on loopback only, at {here}{stands}: rank {who} cannot reach it from "
        "another machine; give this rank the address that the others see, or name one of this "
        "machine's own by --listen (host= of connect)"
    )
