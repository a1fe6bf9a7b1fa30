"""Who may ask: keys, hosts, and what a server may listen at without a key.

Web pages in a browser on the same machine reach loopback. A request therefore needs a Host that is
an address or a name of this server (a page that rebinds its own name to 127.0.0.1 has another), and
a body of type application/json, for which a browser asks first, and is refused without CORS.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...errors import AstraError
from ...transport.addresses import parse_host
from ...transport.credentials import warn_if_readable
from .errors import ApiError

KEY_VARIABLE = "ASTRA_API_KEY"
# As browsers write it: lower case, no path; the scheme's own port is left out.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@A-Z]+")


def read_api_keys(
    given: str | None = None, file: str | os.PathLike[str] | None = None
) -> tuple[str, ...]:
    """The keys that clients may use: `given`, those in a file, one a line, or the variable's.

    Lines of the file that begin with # are comments; a file that others than its owner can read is
    warned of. An option takes precedence over the variable `ASTRA_API_KEY`.

    Raises:
        AstraError: the file cannot be read, or there is no key where one was named.
    """
    if given is not None:
        keys = [given]
    elif file is not None:
        try:
            lines = [line.strip() for line in Path(file).read_text("utf-8").splitlines()]
            warn_if_readable(Path(file))
        except (OSError, UnicodeDecodeError) as error:
            raise AstraError(f"API keys: cannot read {str(file)!r}: {error}") from error
        keys = [line for line in lines if line and not line.startswith("#")]
    elif KEY_VARIABLE in os.environ:
        keys = [os.environ[KEY_VARIABLE]]
    else:
        return ()
    usable = keys and all(key.isascii() and key.isprintable() and " " not in key for key in keys)
    if not usable or not all(keys):
        raise AstraError(
            "API key: expected printable ASCII characters without spaces, one key a line"
        )
    return tuple(keys)


def is_loopback(host: str) -> bool:
    """Whether a server at `host` is reached from this machine alone."""
    name = parse_host(host)
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, api_keys: Sequence[str], insecure: bool = False) -> None:
    """Refuses to listen off loopback without a key.

    Raises:
        AstraError: other machines reach `host`, and there is neither a key nor `insecure`.
    """
    if not (is_loopback(host) or api_keys or insecure):
        raise AstraError(
            f"--host {host}: other machines reach it, so expected an API key (--api-key, "
            f"--api-key-file or {KEY_VARIABLE}); --insecure serves everybody"
        )


class Keys:
    """The API keys, compared in a time that says nothing of them."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None) -> None:
        """Refuses an Authorization header that brings none of the keys, with 401."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise _unauthorized(
                "You didn't provide an API key. Provide it in an Authorization header using "
                "Bearer auth (i.e. Authorization: Bearer YOUR_KEY).",
                None,
            )
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise _unauthorized("Incorrect API key provided.", "invalid_api_key")


def _unauthorized(message: str, code: str | None) -> ApiError:
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": "Bearer"})


class Hosts:
    """The names by which this server may be called; addresses always are.

    Args:
        host: what it listens at.
        more: other names, of a reverse proxy for example.
    """

    def __init__(self, host: str, more: Iterable[str] = ()) -> None:
        own = {socket.gethostname(), parse_host(host), "localhost"}
        self._names = {name.lower().rstrip(".") for name in (*own, *more)}

    def check(self, header: str | None) -> None:
        """Refuses a Host header with another name, with 403. Browsers always send one."""
        if header is None or is_address(name := host_name(header)) or name in self._names:
            return
        raise ApiError(
            403,
            f"Host {header[:80]!r} is no name of this server (--allowed-host adds one)",
            code="host_not_allowed",
        )


def check_names(hosts: Iterable[str], origins: Iterable[str]) -> None:
    """Refuses names and origins that no header will ever be equal to.

    Raises:
        ValueError: a name with a scheme or a port; an origin with a path, or as browsers do not
            write it.
    """
    for name in hosts:
        if not (re.fullmatch(r"[^\s:/?#@*]+", name) or is_address(name)):
            raise ValueError(
                "allowed_hosts (--allowed-host): expected a name without scheme and port, such as "
                f"api.example.org, got {name!r}"
            )
    for origin in origins:
        standard = origin.startswith("http://") and origin.endswith(":80")
        standard = standard or (origin.startswith("https://") and origin.endswith(":443"))
        if origin not in ("*", "null") and (standard or not _ORIGIN.fullmatch(origin)):
            raise ValueError(
                "cors_origins (--cors-origin): expected an origin as browsers send it, such as "
                f"https://example.org, or *, got {origin!r}"
            )


def host_name(header: str) -> str:
    """The name in a Host header, without its port."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
