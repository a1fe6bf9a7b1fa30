"""Where the server listens, and its certificate: both are judged before a model is loaded."""

from __future__ import annotations

import errno
import re
import socket
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NoReturn

from ...errors import AstraError
from ...transport.addresses import Endpoint, parse_host, resolve
from ...transport.credentials import validity, warn_if_readable, why_not_valid

BACKLOG: Final = 1024
_TRIES: Final = 20  # any free port is looked for, at all addresses
_ABSENT: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_CERTIFICATE: Final = re.compile(
    r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL
)


def open_listeners(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at every address of this machine that `host` stands for.

    Who connects from now on is answered as soon as a server runs.

    Args:
        port: 0: any free one, the same at all addresses.

    Raises:
        AstraError: the port is in use, or the host is none of this machine's.

    Example:
        >>> [listener.getsockname()[0] for listener in open_listeners("127.0.0.1", 0)]
        ['127.0.0.1']
    """
    try:
        endpoints = resolve(parse_host(host), port, passive=True)
        for _ in range(_TRIES if port == 0 else 0):
            try:
                return _listen_everywhere(endpoints, 0)
            except OSError as error:  # at another of the addresses that port is in use
                if error.errno != errno.EADDRINUSE:
                    raise
        return _listen_everywhere(endpoints, port)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise AstraError(f"cannot listen at {host} port {port}: {why}") from error


def _listen_everywhere(endpoints: Sequence[Endpoint], port: int) -> list[socket.socket]:
    """At those of the addresses that this machine has, at least one."""
    listeners: list[socket.socket] = []
    absent: OSError | None = None
    try:
        for endpoint in endpoints:
            taken = listeners[0].getsockname()[1] if listeners else port
            try:
                listeners.append(_listen_at(endpoint, taken))
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                absent = error
        if absent is not None and not listeners:
            raise absent
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _listen_at(endpoint: Endpoint, port: int) -> socket.socket:
    listener = socket.socket(endpoint.family, endpoint.kind, endpoint.protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((endpoint.address[0], port, *endpoint.address[2:]))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def url_of(listener: socket.socket, host: str, *, tls: bool) -> str:
    """Where clients reach a listener, by the name that it was given."""
    name = parse_host(host)
    name = f"[{name}]" if ":" in name else name
    return f"{'https' if tls else 'http'}://{name}:{listener.getsockname()[1]}"


def tls_context(certfile: str | None, keyfile: str | None = None) -> ssl.SSLContext | None:
    """What https is served with; None: there is no certificate, and http is meant.

    Args:
        certfile, keyfile: PEM files; the key may be in the certificate's file.

    Raises:
        AstraError: a key without a certificate; files that cannot be read or do not belong
            together; a certificate that has expired, or is not valid yet.
    """
    if certfile is None:
        if keyfile is not None:
            raise AstraError("TLS: expected a certificate (--tls-cert) beside the key (--tls-key)")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certfile, keyfile, password=_no_password)
    except OSError as error:
        raise AstraError(f"TLS: cannot use {certfile!r} and its key: {error}") from error
    warn_if_readable(Path(keyfile or certfile))
    _check_dates(certfile)
    return context


def _no_password() -> NoReturn:
    """Otherwise OpenSSL asks at the terminal, and a service has none."""
    raise AstraError("TLS: expected a key without a password")


def _check_dates(certfile: str) -> None:
    """The server's own certificate is the first of its file."""
    found = _CERTIFICATE.search(Path(certfile).read_text("ascii", errors="replace"))
    if found is None:
        return
    wrong = why_not_valid(*validity(ssl.PEM_cert_to_DER_cert(found[0])), datetime.now(UTC))
    if wrong:
        raise AstraError(f"TLS: {certfile!r} {wrong}")
