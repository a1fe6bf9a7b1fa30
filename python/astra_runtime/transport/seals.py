"""Seals of datagrams: a receiver takes nothing that its peer has not sealed with their secret."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Final, Protocol

HEADER_SIZE: Final = 28  # of a fragment; its first 8 bytes are the packet's number
SEAL_SIZE: Final = 16
SECRET_SIZE: Final = 32

Buffer = bytes | bytearray | memoryview


class Seal(Protocol):
    """Seals one direction's datagrams, or opens them."""

    def seal(self, header: bytes, fragment: Buffer) -> Sequence[Buffer]:
        """The datagram, in pieces for one `sendmsg`."""

    def open(self, datagram: memoryview) -> Buffer | None:
        """The fragment inside; None: whoever sealed this does not have the secret."""


class EncryptedSeal:
    """AES-256-GCM. The header stays readable and is authenticated; its number is the nonce."""

    def __init__(self, secret: bytes) -> None:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._cipher, self._invalid = AESGCM(secret), InvalidTag

    def seal(self, header: bytes, fragment: Buffer) -> Sequence[Buffer]:
        return header, self._cipher.encrypt(header[:8] + bytes(4), fragment, header)

    def open(self, datagram: memoryview) -> Buffer | None:
        header, nonce = datagram[:HEADER_SIZE], bytes(datagram[:8]) + bytes(4)
        try:
            return self._cipher.decrypt(nonce, datagram[HEADER_SIZE:], header)
        except self._invalid:
            return None


class PlainSeal:
    """For loopback without keys: fragments as they are, then a token that was sent over TCP.

    It keeps out what strays here or was meant for another run, not who can read this machine's
    packets.
    """

    def __init__(self, secret: bytes) -> None:
        self._token = secret[:SEAL_SIZE]

    def seal(self, header: bytes, fragment: Buffer) -> Sequence[Buffer]:
        return header, fragment, self._token

    def open(self, datagram: memoryview) -> Buffer | None:
        if not hmac.compare_digest(datagram[-SEAL_SIZE:], self._token):
            return None
        return datagram[HEADER_SIZE:-SEAL_SIZE]
