"""What `connect` was asked for: checked once, and kept by the mesh to be made anew."""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, get_args

from astra_runtime.transport.addresses import is_loopback, parse_address, parse_host
from astra_runtime.transport.credentials import ENVIRONMENT, Keys, KeysError
from astra_runtime.transport.link import Link

Backend = Literal["tcp", "datagram", "gloo", "nccl"]
BACKENDS: Final[tuple[Backend, ...]] = get_args(Backend)
MAX_SECONDS: Final = 1e6
OnWait = Callable[[tuple[int, ...]], None]


@dataclass(frozen=True)
class ConnectOptions:
    """The arguments of `connect`, see there; `rank` and `world_size` are known by now.

    Attributes:
        on_wait: called about once a second with the ranks that have not joined yet, over TCP where
            the peers' addresses are known; what it raises ends the wait.
        check: called twenty times a second during that wait; what it raises ends it, too.

    Raises ValueError or KeysError for arguments that no mesh can have.
    """

    rank: int
    world_size: int
    peers: tuple[str, ...] | None = None
    backend: Backend = "tcp"
    host: str | None = None
    timeout: float = 30.0
    connect_timeout: float = 60.0
    link: Link | None = None
    keys: Keys | str | os.PathLike[str] | None = None
    insecure: bool = False
    on_wait: OnWait | None = None
    check: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if self.host is not None:
            object.__setattr__(self, "host", parse_host(self.host))
        if not 1 <= self.world_size <= 0xFFFF:
            raise ValueError(f"world_size: expected 1..65535, got {self.world_size}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank: expected 0..{self.world_size - 1}, got {self.rank}")
        if self.peers is not None and len(self.peers) != self.world_size:
            raise ValueError(f"peers: expected {self.world_size} addresses, got {len(self.peers)}")
        if self.peers is not None and self.backend in ("tcp", "datagram"):
            self._check_peers(self.peers)
        for name in ("timeout", "connect_timeout"):
            seconds = getattr(self, name)
            if not 0 < seconds <= MAX_SECONDS:
                raise ValueError(f"{name}: expected seconds above 0, at most 1e6, got {seconds}")
        if self.backend not in BACKENDS:
            names = ", ".join(f'"{name}"' for name in BACKENDS[:-1]) + f' or "{BACKENDS[-1]}"'
            raise ValueError(f"backend: expected {names}, got {self.backend!r}")
        if self.paces and self.backend == "datagram":
            raise ValueError('link: expected none with backend "datagram", which it cannot emulate')
        if self.insecure and self.keys is not None:
            raise KeysError("insecure: expected without keys, got both")
        if self.backend in ("gloo", "nccl"):
            self._check_plaintext_backend()

    def _check_types(self) -> None:
        for name in ("rank", "world_size"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an integer, got {value!r}")
        if self.peers is not None and not all(isinstance(peer, str) for peer in self.peers):
            raise TypeError(f'peers: expected texts "host:port", got {self.peers!r}')
        for name in ("timeout", "connect_timeout"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                raise TypeError(f"{name}: expected a number of seconds, got {value!r}")
        for name, value, kinds in (
            ("host", self.host, (str,)),
            ("link", self.link, (Link,)),
            ("keys", self.keys, (Keys, str, os.PathLike)),
        ):
            if value is not None and not isinstance(value, kinds):
                expected = " or ".join(kind.__name__ for kind in kinds)
                raise TypeError(f"{name}: expected {expected} or None, got {value!r}")

    def _check_peers(self, peers: tuple[str, ...]) -> None:
        ranks: dict[tuple[str, int], int] = {}
        for rank, peer in enumerate(peers):
            host, port = parse_address(peer)
            first = ranks.setdefault((host.lower(), port), rank)
            if first != rank:
                raise ValueError(
                    "peers: expected an address of its own for every rank, got "
                    f"{peer} for ranks {first} and {rank}"
                )

    def _check_plaintext_backend(self) -> None:
        """torch.distributed encrypts nothing: whoever has keys must not believe it does."""
        if self.keys is not None:
            raise KeysError(
                f"keys: expected none with backend {self.backend!r}, which has no use for any"
            )
        if not self.insecure and os.environ.get(ENVIRONMENT):
            raise KeysError(
                f"keys: {ENVIRONMENT} names some, and backend {self.backend!r} has no use for any: "
                "it sends plaintext, not encrypted and not authenticated; expected insecure=True "
                "(--insecure) beside it, or backend 'tcp'"
            )

    def meeting_hosts(self) -> list[str]:
        """The hosts of all ranks, or the one at which torchrun has them meet."""
        hosts = [parse_address(peer)[0] for peer in self.peers or ()]
        return hosts or [os.environ.get("MASTER_ADDR", "127.0.0.1")]

    def require_loopback_in_plaintext(self) -> None:
        """Refuses to send in plaintext between machines unless that was asked for by name.

        Of backends that torch.distributed is: before one is joined, or a model is loaded for it.
        """
        for host in self.meeting_hosts():
            if not (self.insecure or is_loopback(host)):
                raise KeysError(
                    f"insecure: expected True (--insecure) with backend {self.backend!r} off "
                    f"loopback, at {host}: torch.distributed sends plaintext, not encrypted and "
                    "not authenticated, for networks that are trusted as a whole"
                )

    @property
    def paces(self) -> bool:
        """Whether a slow link is to be emulated."""
        return self.link is not None and not self.link.is_free

    def find_keys(self) -> Keys | None:
        """The keys to use, from the argument or the environment; None: plaintext."""
        if self.insecure:
            return None
        keys = self.keys
        if keys is None:
            keys = os.environ.get(ENVIRONMENT) or None
        return keys if keys is None or isinstance(keys, Keys) else Keys(keys)
