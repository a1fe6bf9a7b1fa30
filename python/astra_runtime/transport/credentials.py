"""Keys of a run as a rank uses them: its TLS contexts, and what a peer's certificate says.

A folder of keys, as `astra keys init` writes it:

    authority.key       signs certificates; belongs on no device
    authority.pem
    rank-0/             all that rank 0 needs: authority.pem, certificate.pem, key.pem
    rank-1/ …

Python alone is enough here; `certificates.py` makes keys.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from astra_runtime.errors import AstraError

AUTHORITY: Final = "authority.pem"
CERTIFICATE: Final = "certificate.pem"
KEY: Final = "key.pem"
DOMAIN: Final = "astra.internal"  # a top-level name that is reserved for private use
ENVIRONMENT: Final = "ASTRA_KEYS"
RANK_NAME: Final = re.compile(r"rank-(0|[1-9][0-9]{0,4})\.astra\.internal")

log = logging.getLogger("astra_runtime.transport")


class KeysError(AstraError, ValueError):
    """Keys are missing where they are needed, or cannot be read, made or used."""


class Contexts(NamedTuple):
    """What one rank's connections are made with: TLS 1.3 only, certificates on both sides."""

    accepting: ssl.SSLContext
    dialing: ssl.SSLContext


class Keys:
    """A folder of keys: all ranks' (`astra keys init`), or a copy of one `rank-R` folder.

    Which rank a certificate names is not looked at here: the peers judge it, and say so.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def __repr__(self) -> str:
        return f"Keys({str(self.folder)!r})"

    def of(self, rank: int) -> Path:
        """The folder with the certificate of `rank`; KeysError where there is none."""
        for folder in (self.folder, self.folder / f"rank-{rank}"):
            if (folder / CERTIFICATE).is_file():
                return folder
        raise KeysError(
            f"keys: expected {CERTIFICATE} or rank-{rank}/{CERTIFICATE}, as `astra keys init` "
            f"writes them, got neither in {str(self.folder)!r}"
        )

    def contexts(self, rank: int) -> Contexts:
        """Reads the keys of `rank`; what is made from them stays usable without the folder."""
        folder = self.of(rank)
        return Contexts(_context(folder, accepting=True), _context(folder, accepting=False))


def _context(folder: Path, *, accepting: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if accepting else ssl.PROTOCOL_TLS_CLIENT)
    # Names are checked by `named_rank`: exactly one, no wildcards, and in words for both sides.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    if accepting:
        context.num_tickets = 0  # no session is ever resumed
    key = folder / KEY
    try:
        if key.stat().st_mode & 0o077:
            log.warning("%s can be read by others than its owner; chmod 600", key)
        context.load_verify_locations(folder / AUTHORITY)  # nobody else is trusted
        context.load_cert_chain(folder / CERTIFICATE, key, password=_no_password)
    except OSError as error:  # ssl.SSLError is one, too
        raise KeysError(f"keys: cannot use {str(folder)!r}: {error}") from error
    return context


def _no_password() -> str:
    """Otherwise OpenSSL asks at the terminal, and a worker has none."""
    raise KeysError(f"keys: expected a {KEY} without a password")


def rank_name(rank: int) -> str:
    return f"rank-{rank}.{DOMAIN}"


def named_rank(certificate: Mapping[str, Any] | None) -> int | None:
    """The one rank that a verified peer's certificate (`getpeercert`) names, or None."""
    names = [
        value for kind, value in (certificate or {}).get("subjectAltName", ()) if kind == "DNS"
    ]
    ranks = [match for match in map(RANK_NAME.fullmatch, names) if match]
    return int(ranks[0][1]) if len(ranks) == 1 else None


def hosts_of(certificate: Mapping[str, Any] | None) -> list[str]:
    """The addresses to which a certificate is bound; usually none."""
    names = [value for _, value in (certificate or {}).get("subjectAltName", ())]
    return [name for name in names if not RANK_NAME.fullmatch(name)]


def is_bound_to(certificate: Mapping[str, Any] | None, host: str) -> bool:
    """Whether a certificate may be shown at `host`: it names it, or no host at all."""
    hosts = hosts_of(certificate)
    return not hosts or _normal(host) in map(_normal, hosts)


def _normal(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower().rstrip(".")
