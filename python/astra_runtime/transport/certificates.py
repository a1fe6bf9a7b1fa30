"""Making the keys of a run, and looking at them: a private authority, a certificate for each rank.

Needs the package `cryptography` (the extra `security`). `credentials.py` describes the folder and
uses it.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from astra_runtime.transport.credentials import (
    AUTHORITY,
    CERTIFICATE,
    KEY,
    RANK_NAME,
    Keys,
    KeysError,
    hosts_of,
    named_rank,
    rank_name,
)

AUTHORITY_KEY: Final = "authority.key"
EXTRA: Final = "astra-inference[security]"
MAX_RANKS: Final = 0xFFFF


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
class KeyFolder:
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
) -> KeyFolder:
    """Writes a new authority and the keys of `ranks` ranks into `folder`.

    hosts: an address or name for each rank, bound into its certificate: who dials that rank
        refuses the certificate at any other address. days: until everything expires.
    keep_authority: also write the authority's private key.

    Elliptic curve P-256; private keys are readable by their owner only. Existing keys are never
    overwritten, and where writing fails nothing is left of the new ones.
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
    names = None if hosts is None else [_general_name(host) for host in hosts]
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    # Small devices start with a clock that is behind.
    dates = now - datetime.timedelta(days=1), now + datetime.timedelta(days=days)
    signer = ec.generate_private_key(ec.SECP256R1())
    issuer = _name(f"ASTRA authority {secrets.token_hex(4)}")
    authority = _certificate(issuer, issuer, signer.public_key(), signer, dates, None)
    with _removed_on_failure(folder):
        if keep_authority:
            _write_private(folder / AUTHORITY_KEY, signer)
        _write_public(folder / AUTHORITY, authority)
        for rank in range(ranks):
            key = ec.generate_private_key(ec.SECP256R1())
            called = [x509.DNSName(rank_name(rank)), *([] if names is None else [names[rank]])]
            subject = _name(f"ASTRA rank {rank}")
            certificate = _certificate(subject, issuer, key.public_key(), signer, dates, called)
            own = folder / f"rank-{rank}"
            own.mkdir(mode=0o700)
            _write_private(own / KEY, key)
            _write_public(own / CERTIFICATE, certificate)
            _write_public(own / AUTHORITY, authority)
    return KeyFolder(folder, ranks, dates[1])


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    """Makes a folder for keys, which had none; where the block fails, none are left in it."""
    there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        yield
    except BaseException:
        for path in folder.glob("rank-*"):
            shutil.rmtree(path)
        for name in (AUTHORITY, AUTHORITY_KEY):
            (folder / name).unlink(missing_ok=True)
        if not there:
            folder.rmdir()
        raise


@contextlib.contextmanager
def ephemeral_keys(ranks: int) -> Iterator[Path]:
    """A private folder of keys for processes on this machine, for a day at most; then removed."""
    with tempfile.TemporaryDirectory(prefix="astra-keys-") as folder:  # mode 0700
        make_keys(folder, ranks, days=1, keep_authority=False)
        yield Path(folder)


def renew_ephemeral_keys(folder: Path, ranks: int) -> None:
    """Makes those in `folder` anew, unless all of them can be used now.

    Raises KeysError where somebody has put something else in its place meanwhile.
    """
    keys = Keys(folder)
    try:
        for rank in range(ranks):
            keys.contexts(rank)
        return
    except KeysError:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise KeysError(f"keys: cannot make {str(folder)!r} anew: {error.strerror}") from error
    make_keys(folder, ranks, days=1, keep_authority=False)


def _name(text: str) -> Any:
    x509 = _x509()
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _general_name(host: str) -> Any:
    """A host as `--peers` has it, without a port: blanks and the brackets of IPv6 are left out."""
    x509 = _x509()
    given, host = host, host.strip()
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not re.fullmatch(r"[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*", host) or RANK_NAME.fullmatch(host):
        raise ValueError(f"hosts: expected a name or an IP address without a port, got {given!r}")
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


@dataclass(frozen=True)
class RankCertificate:
    """One certificate of a folder, valid from `begins` to `expires`."""

    rank: int
    begins: datetime.datetime
    expires: datetime.datetime
    hosts: tuple[str, ...]
    serial: str  # hexadecimal

    def why_invalid(self, now: datetime.datetime) -> str:
        """ "has expired", "is not valid yet", or "" where it is valid."""
        if now > self.expires:
            return "has expired"
        return "is not valid yet" if now < self.begins else ""


def show_keys(folder: str | os.PathLike[str]) -> list[RankCertificate]:
    """The certificates in a folder of keys (all ranks', or one rank's), by rank."""
    x509 = _x509()
    paths = [Path(folder) / CERTIFICATE, *Path(folder).glob(f"rank-*/{CERTIFICATE}")]
    certificates = []
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
        subject = {"subjectAltName": kinds}
        rank = named_rank(subject)
        if rank is None:
            raise KeysError(f"keys: expected {str(path)!r} to name one rank, got {kinds}")
        dates = (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
        serial = f"{certificate.serial_number:x}"
        certificates.append(RankCertificate(rank, *dates, tuple(hosts_of(subject)), serial))
    if not certificates:
        raise KeysError(f"keys: expected a folder written by `astra keys init`, got {folder!s}")
    return sorted(certificates, key=lambda certificate: certificate.rank)
