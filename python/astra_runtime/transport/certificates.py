"""Keys of a run: a private authority, and for each rank a certificate that names it.

A folder of keys, as `astra keys init` writes it:

    authority.key       signs certificates; belongs on no device
    authority.pem
    rank-0/             all that rank 0 needs: authority.pem, certificate.pem, key.pem
    rank-1/ …

Making keys needs the package `cryptography` (the extra `security`); using them needs Python alone.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import logging
import os
import re
import secrets
import ssl
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from ..errors import AstraError

AUTHORITY: Final = "authority.pem"
AUTHORITY_KEY: Final = "authority.key"
CERTIFICATE: Final = "certificate.pem"
KEY: Final = "key.pem"
DOMAIN: Final = "astra.internal"  # a top-level name that is reserved for private use
ENVIRONMENT: Final = "ASTRA_KEYS"
EXTRA: Final = "astra-inference[security]"
MAX_RANKS: Final = 0xFFFF
_RANK_NAME: Final = re.compile(r"rank-(0|[1-9][0-9]{0,4})\.astra\.internal")

log = logging.getLogger("astra_runtime.transport.certificates")


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


# --- what a certificate says


def rank_name(rank: int) -> str:
    return f"rank-{rank}.{DOMAIN}"


def named_rank(certificate: Mapping[str, Any] | None) -> int | None:
    """The one rank that a verified peer's certificate (`getpeercert`) names, or None."""
    names = [
        value for kind, value in (certificate or {}).get("subjectAltName", ()) if kind == "DNS"
    ]
    ranks = [match for match in map(_RANK_NAME.fullmatch, names) if match]
    return int(ranks[0][1]) if len(ranks) == 1 else None


def hosts_of(certificate: Mapping[str, Any] | None) -> list[str]:
    """The addresses to which a certificate is bound; usually none."""
    names = [value for _, value in (certificate or {}).get("subjectAltName", ())]
    return [name for name in names if not _RANK_NAME.fullmatch(name)]


def is_bound_to(certificate: Mapping[str, Any] | None, host: str) -> bool:
    """Whether a certificate may be shown at `host`: it names it, or no host at all."""
    hosts = hosts_of(certificate)
    return not hosts or _normal(host) in map(_normal, hosts)


def _normal(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower().rstrip(".")


# --- making keys


def _x509() -> Any:
    try:
        from cryptography import x509
    except ModuleNotFoundError as error:
        raise KeysError(
            f'making or showing keys needs the package cryptography: pip install "{EXTRA}"'
        ) from error
    return x509


def can_make_keys() -> bool:
    """Whether the package that makes keys is installed."""
    try:
        _x509()
    except KeysError:
        return False
    return True


@dataclass(frozen=True)
class Made:
    """What `make_keys` wrote."""

    folder: Path
    ranks: int
    expires: datetime.datetime


def make_keys(
    folder: str | os.PathLike[str],
    ranks: int,
    *,
    hosts: Sequence[str] | None = None,
    days: int = 365,
    keep_authority: bool = True,
) -> Made:
    """Writes a new authority and the keys of `ranks` ranks into `folder`.

    hosts: an address or name for each rank, bound into its certificate: who dials that rank
        refuses the certificate at any other address. days: until everything expires.
    keep_authority: also write the authority's private key.

    Elliptic curve P-256; private keys are readable by their owner only. Existing keys are never
    overwritten.
    """
    x509 = _x509()
    from cryptography.hazmat.primitives.asymmetric import ec

    if not 1 <= ranks <= MAX_RANKS:
        raise ValueError(f"ranks: expected 1..{MAX_RANKS}, got {ranks}")
    if hosts is not None and len(hosts) != ranks:
        raise ValueError(f"hosts: expected {ranks}, one for each rank, got {len(hosts)}")
    if not 1 <= days <= 36_500:
        raise ValueError(f"days: expected 1..36500, got {days}")
    folder = Path(folder)
    used = any((folder / name).exists() for name in (AUTHORITY, AUTHORITY_KEY, CERTIFICATE, KEY))
    if used or any(folder.glob("rank-*")):
        raise KeysError(f"{str(folder)!r} holds keys already: remove it, or choose another folder")
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    # Small devices start with a clock that is behind.
    dates = now - datetime.timedelta(days=1), now + datetime.timedelta(days=days)
    signer = ec.generate_private_key(ec.SECP256R1())
    issuer = _name(f"ASTRA authority {secrets.token_hex(4)}")
    authority = _certificate(issuer, issuer, signer.public_key(), signer, dates, None)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if keep_authority:
        _write_private(folder / AUTHORITY_KEY, signer)
    _write_public(folder / AUTHORITY, authority)
    for rank in range(ranks):
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.DNSName(rank_name(rank))]
        names += [_general_name(hosts[rank])] if hosts is not None else []
        subject = _name(f"ASTRA rank {rank}")
        certificate = _certificate(subject, issuer, key.public_key(), signer, dates, names)
        own = folder / f"rank-{rank}"
        own.mkdir(mode=0o700)
        _write_private(own / KEY, key)
        _write_public(own / CERTIFICATE, certificate)
        _write_public(own / AUTHORITY, authority)
    return Made(folder, ranks, dates[1])


@contextlib.contextmanager
def ephemeral_keys(ranks: int) -> Iterator[Path]:
    """A private folder of keys for processes on this machine, for a day at most; then removed."""
    with tempfile.TemporaryDirectory(prefix="astra-keys-") as folder:  # mode 0700
        make_keys(folder, ranks, days=1, keep_authority=False)
        yield Path(folder)


def _name(text: str) -> Any:
    x509 = _x509()
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _general_name(host: str) -> Any:
    x509 = _x509()
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not re.fullmatch(r"[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*", host) or _RANK_NAME.fullmatch(host):
        raise ValueError(f"hosts: expected a name or an IP address without a port, got {host!r}")
    return x509.DNSName(host)


def _certificate(
    subject: Any,
    issuer: Any,
    public: Any,
    signer: Any,
    dates: tuple[datetime.datetime, datetime.datetime],
    names: list[Any] | None,
) -> Any:
    """An authority's certificate (`names` None), or a rank's, for both ends of a connection."""
    x509 = _x509()
    from cryptography.hazmat.primitives import hashes

    leaf = names is not None
    usages = dict.fromkeys(
        (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    usages["digital_signature" if leaf else "key_cert_sign"] = True
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(dates[0])
        .not_valid_after(dates[1])
        .add_extension(
            x509.BasicConstraints(ca=not leaf, path_length=None if leaf else 0), critical=True
        )
        .add_extension(x509.KeyUsage(**usages), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(identifier, critical=False)
    )
    if leaf:
        both = [x509.ExtendedKeyUsageOID.SERVER_AUTH, x509.ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(both), critical=False)
    return builder.sign(signer, hashes.SHA256())


def _write_private(path: Path, key: Any) -> None:
    from cryptography.hazmat.primitives import serialization

    data = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    # created with these permissions, so that nobody can open it in between
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _write_public(path: Path, certificate: Any) -> None:
    from cryptography.hazmat.primitives import serialization

    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


# --- looking at keys


@dataclass(frozen=True)
class Shown:
    """One certificate of a folder."""

    rank: int
    expires: datetime.datetime
    hosts: tuple[str, ...]
    serial: str  # hexadecimal


def show_keys(folder: str | os.PathLike[str]) -> list[Shown]:
    """The certificates in a folder of keys (all ranks', or one rank's), by rank."""
    x509 = _x509()
    paths = [Path(folder) / CERTIFICATE, *Path(folder).glob(f"rank-*/{CERTIFICATE}")]
    found = []
    for path in paths:
        if not path.is_file():
            continue
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except (ValueError, x509.ExtensionNotFound) as error:
            raise KeysError(f"keys: cannot read {str(path)!r}: {error}") from error
        kinds = [("DNS", name) for name in names.value.get_values_for_type(x509.DNSName)]
        kinds += [("IP", str(ip)) for ip in names.value.get_values_for_type(x509.IPAddress)]
        said = {"subjectAltName": kinds}
        rank = named_rank(said)
        if rank is None:
            raise KeysError(f"keys: expected {str(path)!r} to name one rank, got {kinds}")
        expires, serial = certificate.not_valid_after_utc, f"{certificate.serial_number:x}"
        found.append(Shown(rank, expires, tuple(hosts_of(said)), serial))
    if not found:
        raise KeysError(f"keys: expected a folder written by `astra keys init`, got {folder!s}")
    return sorted(found, key=lambda shown: shown.rank)
