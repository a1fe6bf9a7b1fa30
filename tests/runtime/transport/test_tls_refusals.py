"""Who gets into a mesh with TLS, who is refused with which words on both sides, what a stranger
costs."""

from __future__ import annotations

import contextlib
import datetime
import logging
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import astra_runtime.transport.certificates as keys_module
from astra_runtime import errors, wire
from astra_runtime.transport import Mesh, bootstrap, connect, credentials, pending
from astra_runtime.transport.acceptor import LOGGED_REFUSALS, MAX_PENDING
from astra_runtime.transport.certificates import make_keys
from astra_runtime.transport.credentials import Keys
from astra_runtime.transport.stream import UNTRUSTED_BYTES
from astra_runtime.wire import Hello

from ..ranks import (
    Deadlines,
    all_to_all,
    as_ranks,
    dial,
    environment,
    free_ports,
    key_folder,
    met_by,
    open_files,
    read_all,
    tls_mesh,
    together,
    wait_for,
)

pytest.importorskip("cryptography")

Peers = list[str]


def variant(tmp_path: Path, certificate: Path, authority: Path) -> Path:
    """One rank's folder that trusts another authority than the one that signed it."""
    folder = tmp_path / "variant"
    shutil.copytree(certificate, folder)
    shutil.copy(authority / "authority.pem", folder / "authority.pem")
    return folder


def expired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Keys of rank 1 that ended years ago, and keys of rank 0 that would trust them otherwise."""

    class Past(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime(2020, 1, 1, tzinfo=tz)

    with monkeypatch.context() as patch:
        patch.setattr(
            keys_module, "datetime", SimpleNamespace(**vars(datetime) | {"datetime": Past})
        )
        make_keys(tmp_path / "old", 2)
    old, trusting = tmp_path / "old" / "rank-1", tmp_path / "trusting"
    shutil.copytree(key_folder() / "rank-0", trusting)
    with open(trusting / "authority.pem", "a") as file:
        file.write((old / "authority.pem").read_text())
    shutil.copy(key_folder() / "authority.pem", old / "authority.pem")
    return trusting, old


def refuse_then_admit(
    keys: Path | None,
    caller: Callable[[Peers], Any],
    good: Path | None,
    caplog: pytest.LogCaptureFixture,
    **options: Any,
) -> tuple[str, Any]:
    """What rank 0 logged of a caller, and what that caller met; then the right rank 1 joins."""
    peers = free_ports(2)
    result: list[Any] = []

    def attempt() -> Mesh:
        try:
            result.append(caller(peers))
        except errors.AstraError as error:
            result.append(error)
        return connect(1, 2, peers, keys=good)

    with caplog.at_level(logging.WARNING, "astra_runtime.transport"):
        meshes = together([lambda: connect(0, 2, peers, keys=keys, **options), attempt])
    as_ranks(meshes, lambda mesh: all_to_all(mesh, 2, 50))
    return caplog.text, result[0]


def assert_refused(met: Any, said: str, reason: str) -> None:
    """Both sides tell the same reason."""
    assert isinstance(met, errors.HandshakeRefused)
    assert reason in met.reason
    assert reason in said


def as_rank_1(keys: Path | None, **options: Any) -> Callable[[Peers], Any]:
    return lambda peers: connect(1, 2, peers, keys=keys, **options)


def test_another_authority_is_refused_by_the_dialer(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = key_folder(), key_folder("theirs")
    said, met = refuse_then_admit(ours, as_rank_1(theirs), ours, caplog)
    assert isinstance(met, errors.HandshakeRefused)
    assert "has a certificate of another authority" in met.reason
    assert "refused this rank's certificate: unknown authority" in said


def test_another_authority_is_refused_by_the_acceptor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = key_folder()
    forged = variant(tmp_path, key_folder("theirs") / "rank-1", ours)
    said, met = refuse_then_admit(ours, as_rank_1(forged), ours, caplog)
    assert isinstance(met, errors.HandshakeRefused)
    assert "refused this rank's certificate: unknown authority" in met.reason
    assert "has a certificate of another authority" in said


def test_a_certificate_that_signs_for_itself_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours, alone = key_folder(), tmp_path / "alone"
    shutil.copytree(ours / "rank-1", alone)
    shutil.copy(key_folder("theirs") / "authority.pem", alone / "certificate.pem")
    shutil.copy(key_folder("theirs") / "authority.key", alone / "key.pem")
    said, met = refuse_then_admit(ours, as_rank_1(alone), ours, caplog)
    assert isinstance(met, errors.HandshakeRefused)
    assert "refused this rank's certificate" in met.reason
    assert "certificate" in said


def test_an_expired_certificate_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trusting, old = expired(tmp_path, monkeypatch)
    monkeypatch.setattr(credentials, "_check_dates", lambda *_: None)  # as by a clock that is off
    said, met = refuse_then_admit(trusting, as_rank_1(old), key_folder(), caplog)
    assert isinstance(met, errors.HandshakeRefused)
    assert "refused this rank's certificate: it has expired" in met.reason
    assert "certificate has expired" in said


def test_the_certificate_of_another_rank_is_refused_by_the_acceptor(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours = key_folder()
    said, met = refuse_then_admit(ours, as_rank_1(ours / "rank-2"), ours, caplog)
    reason = "the certificate of rank 2 was shown for rank 1"
    assert_refused(met, said, reason)


@pytest.mark.parametrize("rank", [0, 2])
def test_another_rank_may_not_stand_in(rank: int, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever holds one rank's keys can be no other rank, not even with the right HELLO."""
    ours = key_folder()

    def caller(peers: Peers) -> bytes:
        context = Keys(ours / f"rank-{rank}").contexts(rank).dialing
        with context.wrap_socket(dial(peers[0])) as tls:
            tls.sendall(Hello(2, 1, 0).encode())
            return read_all(tls)

    said, reply = refuse_then_admit(ours, caller, ours, caplog)
    reason = f"the certificate of rank {rank} was shown for rank 1"
    assert reason in said
    assert reply[wire.HELLO_SIZE :].decode() == reason


def test_the_certificate_of_another_rank_is_refused_by_the_dialer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours, peers, deadlines = key_folder(), free_ports(2), Deadlines()
    monkeypatch.setattr(bootstrap, "time", deadlines)
    reason = "the certificate of rank 3 was shown for rank 0"

    def dialer() -> None:
        try:
            connect(1, 2, peers, keys=ours)
        finally:
            wait_for(lambda: reason in caplog.text)
            deadlines.over()

    results = together(
        [lambda: connect(0, 2, peers, keys=ours / "rank-3"), dialer], errors_too=True
    )
    assert isinstance(results[1], errors.HandshakeRefused)
    # the acceptor waits on, since anybody could have called, and tells it at its deadline
    assert isinstance(results[0], errors.PeersRefused)
    assert isinstance(results[0], errors.HandshakeRefused)
    assert isinstance(results[0], errors.ConnectFailed)
    assert results[0].missing == (1,)
    for result in results:
        assert reason in result.reason


def test_a_certificate_bound_to_another_address_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bound = make_keys(tmp_path / "bound", 2, hosts=["127.0.0.1", "127.0.0.1"]).folder

    def caller(peers: Peers) -> Mesh:
        elsewhere = peers[0].replace("127.0.0.1", "127.0.0.2")
        return connect(1, 2, [elsewhere, peers[1]], keys=bound)

    said, met = refuse_then_admit(bound, caller, bound, caplog, host="0.0.0.0")
    reason = "the certificate of rank 0 is not for the address 127.0.0.2"
    assert_refused(met, said, reason)


def test_a_caller_without_a_certificate_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    ours = key_folder()

    def caller(peers: Peers) -> str:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with context.wrap_socket(dial(peers[0])) as tls:
            tls.sendall(Hello(2, 1, 0).encode())
            try:
                return repr(tls.recv(100))
            except ssl.SSLError as error:
                return str(error.reason)

    said, met = refuse_then_admit(ours, caller, ours, caplog)
    assert met == "TLSV13_ALERT_CERTIFICATE_REQUIRED"
    assert "showed no certificate" in said


def test_older_tls_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    ours = key_folder()

    def caller(peers: Peers) -> str:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(ssl.SSLError) as caught, dial(peers[0]) as sock:
            context.wrap_socket(sock)
        return str(caught.value.reason)

    said, met = refuse_then_admit(ours, caller, ours, caplog)
    assert met == "TLSV1_ALERT_PROTOCOL_VERSION"
    assert "speaks another version of TLS than 1.3" in said


def test_plaintext_to_a_tls_port(caplog: pytest.LogCaptureFixture) -> None:
    ours = key_folder()
    said, met = refuse_then_admit(ours, as_rank_1(None), ours, caplog)
    reason = "plaintext came, and rank 0 accepts TLS only"
    assert_refused(met, said, reason)


def test_tls_to_a_plaintext_port(caplog: pytest.LogCaptureFixture) -> None:
    said, met = refuse_then_admit(None, as_rank_1(key_folder()), None, caplog)
    reason = "TLS came, and rank 0 has no keys"
    assert_refused(met, said, reason)


def test_strangers_learn_nothing_of_the_run(caplog: pytest.LogCaptureFixture) -> None:
    ours = key_folder()

    def caller(peers: Peers) -> bytes:
        with dial(peers[0]) as sock:
            sock.sendall(Hello(2, 1, 0).encode())
            return read_all(sock)

    _, reply = refuse_then_admit(ours, caller, ours, caplog)
    hello, size = wire.decode_hello(reply[: wire.HELLO_SIZE])
    assert (hello.world_size, hello.rank, hello.run) == (0, wire.NOBODY, wire.NO_RUN)
    assert len(reply) == wire.HELLO_SIZE + size


def test_a_downgrade_to_plaintext_is_refused() -> None:
    """Somebody in between who admits the dialer in plaintext gets no frame of it."""

    def impostor(link: socket.socket) -> None:
        assert link.recv(1) == b"\x16"
        link.sendall(Hello(2, 0, 1).encode())
        read_all(link)

    refused, _ = met_by(impostor, keys=key_folder())
    assert isinstance(refused, errors.HandshakeRefused)
    assert "it answered in plaintext, and rank 1 has keys" in refused.reason


@pytest.mark.parametrize(
    ("answer", "keys", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", True, "does not speak ASTRA"),
        (b"\x15\x03\x03\x00\x02\x02\x46", False, "speaks TLS, and rank 1 has no keys"),
    ],
    ids=["http", "tls"],
)
def test_dialed_strangers_are_refused(answer: bytes, keys: bool, words: str) -> None:
    def stranger(link: socket.socket) -> None:
        link.sendall(answer)
        read_all(link)

    refused, _ = met_by(stranger, keys=key_folder() if keys else None)
    assert isinstance(refused, errors.HandshakeRefused)
    assert words in refused.reason


def test_another_world_ends_both_sides() -> None:
    ours, peers = key_folder(), free_ports(3)
    results = together(
        [lambda: connect(0, 2, peers[:2], keys=ours), lambda: connect(1, 3, peers, keys=ours)],
        errors_too=True,
    )
    for result in results:
        assert isinstance(result, errors.HandshakeRefused)
        assert "rank 1 has world size 3, rank 0 has 2" in result.reason


def test_another_version_ends_both_sides() -> None:
    ours, peers = key_folder(), free_ports(2)

    def newer() -> bytes:
        context = Keys(ours).contexts(1).dialing
        with context.wrap_socket(dial(peers[0])) as tls:
            tls.sendall(Hello(2, 1, 0, version=7).encode())
            return read_all(tls)

    refused, reply = together([lambda: connect(0, 2, peers, keys=ours), newer], errors_too=True)
    reason = "protocol version 7 came, this rank speaks 2"
    assert isinstance(refused, errors.HandshakeRefused)
    assert reason in refused.reason
    assert reply[wire.HELLO_SIZE :].decode() == reason


def test_strangers_cannot_end_a_run_by_claiming_another_version(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours = key_folder()

    def caller(peers: Peers) -> bytes:
        with dial(peers[0]) as sock:
            sock.sendall(Hello(9, 1, 0, version=7).encode())
            return read_all(sock)

    said, reply = refuse_then_admit(ours, caller, ours, caplog)
    assert "plaintext came" in said
    assert b"plaintext came" in reply


def test_a_duplicate_rank_is_refused() -> None:
    ours, peers = key_folder(), free_ports(3)
    elsewhere = [peers[0], free_ports(1)[0], peers[2]]

    def two_of_one_rank() -> Any:
        context = Keys(ours).contexts(1).dialing
        with context.wrap_socket(dial(peers[0])) as first:
            first.sendall(Hello(3, 1, 0).encode())
            assert len(first.recv(wire.HELLO_SIZE)) == wire.HELLO_SIZE
            return connect(1, 3, elsewhere, keys=ours)

    left, refused = together(
        [lambda: connect(0, 3, peers, keys=ours), two_of_one_rank], errors_too=True
    )
    assert isinstance(refused, errors.HandshakeRefused)
    assert "rank 1 has joined already: two processes claim it" in refused.reason
    assert isinstance(left, errors.PeerLost)  # the first of them left without BYE


@pytest.mark.parametrize("fact", ["model", "codebook", "plan"])
def test_other_facts_are_refused_on_both_sides(fact: str) -> None:
    def work(mesh: Mesh) -> None:
        mesh.agree({"model": "a", "codebook": "b", "plan": "c"} | {fact: str(mesh.rank)})

    for result in as_ranks(tls_mesh(2), work, errors_too=True):
        assert isinstance(result, errors.HandshakeRefused)
        assert fact in result.reason


def test_a_stranger_may_send_so_many_bytes_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    """A first message that claims 64 KiB: TLS would collect it, this rank does not."""
    ours = key_folder()
    part = 16_000
    hello = b"\x01\x00\xff\xff" + bytes(65_535)
    records = b"".join(
        b"\x16\x03\x01" + len(hello[at : at + part]).to_bytes(2, "big") + hello[at : at + part]
        for at in range(0, len(hello), part)
    )

    def caller(peers: Peers) -> bool:
        with dial(peers[0]) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(records)
            read_all(sock)
            return True

    said, _ = refuse_then_admit(ours, caller, ours, caplog)
    assert f"sent {UNTRUSTED_BYTES} bytes and no HELLO" in said


@pytest.mark.parametrize("first", [b"", b"\x16\x03\x01"], ids=["silent", "begins-tls"])
def test_a_silent_caller_is_dropped_after_its_time(
    first: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pending, "HANDSHAKE_SECONDS", 0.5)
    ours = key_folder()

    peers = free_ports(2)

    def silent_then_good() -> Mesh:
        start = time.monotonic()
        with dial(peers[0]) as sock:
            sock.sendall(first)
            read_all(sock)
            assert time.monotonic() - start >= 0.5
        monkeypatch.setattr(pending, "HANDSHAKE_SECONDS", 60.0)
        return connect(1, 2, peers, keys=ours)

    with caplog.at_level(logging.WARNING, "astra_runtime.transport"):
        meshes = together([lambda: connect(0, 2, peers, keys=ours), silent_then_good])
    assert "sent no HELLO within" in caplog.text
    as_ranks(meshes, lambda mesh: all_to_all(mesh, 1, 10))


STRANGERS = """
import errno, os, select, socket, sys, time
host, port, silent, garbage = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
while True:
    try:
        socket.create_connection((host, port)).close()
        break
    except ConnectionRefusedError:
        time.sleep(0.01)
print("go", flush=True)
held = []
for number in range(silent + garbage):
    sock = socket.socket()
    sock.connect((host, port))
    sock.setblocking(False)
    if number % 2 and garbage:
        try:
            sock.send((b"\\x16" if number % 4 == 1 else b"") + os.urandom(200))
        except OSError:
            pass  # dropped already
    held.append(sock)
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("when", ["go", "open"], ids=["meanwhile", "before"])
def test_two_thousand_strangers_do_not_delay_peers(
    when: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 silent connections and 1,000 of garbage, some of it like TLS; ranks join beside them.

    On a free machine that takes well below a second. The bound here is what waiting for any
    stranger's time to end would exceed, so that a busy machine does not fail the test.
    """
    monkeypatch.setattr(pending, "HANDSHAKE_SECONDS", 50.0)
    ours, peers = key_folder(), free_ports(2)
    host, port = peers[0].split(":")
    took: list[float] = []
    descriptors: list[int] = []

    def good_peer() -> Mesh:
        command = [sys.executable, "-c", STRANGERS, host, port, "1000", "1000"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            while process.stdout.readline().strip() != when:
                pass
            start = time.monotonic()
            mesh = connect(1, 2, peers, keys=ours)
            took.append(time.monotonic() - start)
            descriptors.append(len(open_files() - before))
        finally:
            process.stdin.close()
            process.stdout.close()
            process.kill()
            process.wait()
        return mesh

    before = open_files()
    with caplog.at_level(logging.DEBUG, "astra_runtime.transport"):
        meshes = together([lambda: connect(0, 2, peers, keys=ours), good_peer])
    assert took[0] < 45
    assert descriptors[0] < MAX_PENDING + 20
    if when == "open":
        assert "too many connections without a HELLO" in caplog.text
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) <= LOGGED_REFUSALS + 1  # a flood of callers is no flood of lines
    as_ranks(meshes, lambda mesh: all_to_all(mesh, 2, 50))
