"""Keys of a run as a rank uses them: its TLS contexts, and what a peer's certificate says.

A folder of keys, as `astra keys init` writes it:

    authority.key       signs certificates; belongs on no device
    authority.pem
    rank-0/             all that rank 0 needs: authority.pem, certificate.pem, key.pem
    rank-1/ …

Python alone is enough here; `certificates.py` makes keys.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import os
import re
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from astra_runtime.errors import AstraError

AUTHORITY: Final = "authority.pem"
CERTIFICATE: Final = "certificate.pem"
KEY: Final = "key.pem"
DOMAIN: Final = "astra.internal"  # a top-level name that is reserved for private use
ENVIRONMENT: Final = "ASTRA_KEYS"
_PEM: Final = re.compile(
    r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL | re.ASCII
)
RANK_NAME: Final = re.compile(r"rank-(0|[1-9][0-9]{0,4})\.astra\.internal")
_FOLDER: Final = re.compile(r"rank-(0|[1-9][0-9]{0,4})")

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

    def ranks(self) -> list[int]:
        """The ranks that have a folder of their own here; of a copy of one of them, none."""
        found = (_FOLDER.fullmatch(path.name) for path in self.folder.glob("rank-*"))
        return sorted(int(match[1]) for match in found if match)

    def contexts(self, rank: int) -> Contexts:
        """Reads the keys of `rank`; what is made from them stays usable without the folder.

        Raises KeysError for a file that is missing, damaged or not of these dates, by its name.
        """
        folder = self.of(rank)
        _check_dates(folder / AUTHORITY, _validities(folder / AUTHORITY))
        _check_dates(folder / CERTIFICATE, _validities(folder / CERTIFICATE)[:1])
        _check_key(folder / KEY)
        return Contexts(_context(folder, accepting=True), _context(folder, accepting=False))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError as error:
        raise KeysError(f"keys: cannot read {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise KeysError(f"keys: expected PEM in {str(path)!r}, got other bytes") from error


def _validities(path: Path) -> list[tuple[datetime, datetime]]:
    """When the certificates of a file are valid, in its order."""
    texts = _PEM.findall(_read(path))
    try:
        dates = [validity(ssl.PEM_cert_to_DER_cert(text)) for text in texts]
    except (ValueError, IndexError) as error:
        raise KeysError(f"keys: {str(path)!r} holds a damaged certificate") from error
    if not dates:
        raise KeysError(f"keys: expected a certificate in {str(path)!r}, got none")
    return dates


def _check_dates(path: Path, dates: list[tuple[datetime, datetime]]) -> None:
    """Refuses a file of which no certificate is valid now."""
    now = datetime.now(UTC)
    wrongs = [why_not_valid(begins, ends, now) for begins, ends in dates]
    if all(wrongs):
        raise KeysError(
            f"keys: {str(path)!r} {wrongs[-1]}. Make new keys with `astra keys init`, or set the "
            "clock"
        )


def why_not_valid(begins: datetime, ends: datetime, now: datetime) -> str:
    """What is wrong with a certificate of these dates, as the end of a sentence; "": nothing."""
    if begins <= now <= ends:
        return ""
    wrong = "has expired" if now > ends else "is not valid yet"
    return (
        f"{wrong}: it is valid from {begins:%Y-%m-%d %H:%M} to {ends:%Y-%m-%d %H:%M}, and this "
        f"machine's clock says {now:%Y-%m-%d %H:%M} (UTC)"
    )


def validity(der: bytes) -> tuple[datetime, datetime]:
    """When a certificate is valid, first and last moment (RFC 5280, 4.1). ValueError or IndexError
    for something else."""
    _, certificate, _ = _element(der, 0)
    _, fields, _ = _element(certificate, 0)
    tag, _, position = _element(fields, 0)
    if tag == 0xA0:  # the version, which may be absent
        _, _, position = _element(fields, position)
    for _ in range(2):  # serial number before; algorithm and issuer
        _, _, position = _element(fields, position)
    _, dates, _ = _element(fields, position)
    tag, begins, position = _element(dates, 0)
    last_tag, ends, _ = _element(dates, position)
    return _moment(tag, begins), _moment(last_tag, ends)


def _element(der: bytes, position: int) -> tuple[int, bytes, int]:
    """The tag and content of the DER element at `position`, and where the next one begins."""
    tag, length = der[position], der[position + 1]
    start = position + 2
    if length & 0x80:
        count = length & 0x7F
        length = int.from_bytes(der[start : start + count], "big")
        start += count
    if start + length > len(der):
        raise ValueError("a DER element that is cut short")
    return tag, der[start : start + length], start + length


def _moment(tag: int, text: bytes) -> datetime:
    """UTCTime (years 1950 to 2049) or GeneralizedTime."""
    if tag == 0x17:
        text = (b"20" if int(text[:2]) < 50 else b"19") + text
    return datetime.strptime(text.decode("ascii"), "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


def _check_key(path: Path) -> None:
    if "PRIVATE KEY-----" not in _read(path):
        raise KeysError(f"keys: expected a private key in {str(path)!r}, got none")
    warn_if_readable(path)


def warn_if_readable(path: Path) -> None:
    """Warns of a private file that others than its owner can read."""
    if path.stat().st_mode & 0o077:
        _warn_of_readable(path)


@functools.cache
def _warn_of_readable(path: Path) -> None:
    """Once for each file, however often it is read."""
    log.warning("%s can be read by others than its owner; chmod 600", path)


def _context(folder: Path, *, accepting: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if accepting else ssl.PROTOCOL_TLS_CLIENT)
    # Names are checked by `named_rank`: exactly one, no wildcards, and in words for both sides.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    if accepting:
        context.num_tickets = 0  # no session is ever resumed
    try:
        context.load_verify_locations(folder / AUTHORITY)  # nobody else is trusted
    except OSError as error:  # ssl.SSLError is one, too
        raise KeysError(f"keys: cannot use {str(folder / AUTHORITY)!r}: {error}") from error
    try:
        context.load_cert_chain(folder / CERTIFICATE, folder / KEY, password=_no_password)
    except OSError as error:
        raise KeysError(
            f"keys: {KEY} and {CERTIFICATE} of {str(folder)!r} cannot be used together: {error}"
        ) from error
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
