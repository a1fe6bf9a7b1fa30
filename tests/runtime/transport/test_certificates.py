"""Keys: who can read them, what they say, how they are made and told of."""

from __future__ import annotations

import argparse
import datetime
import shutil
import signal
import ssl
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from astra_runtime import errors
from astra_runtime.cli import doctor, main
from astra_runtime.cli.cluster import local_keys
from astra_runtime.transport import certificates, check_keys, connect, credentials
from astra_runtime.transport.certificates import ephemeral_keys, make_keys, show_keys
from astra_runtime.transport.credentials import Keys, KeysError, is_bound_to, named_rank

from ..ranks import all_to_all, as_ranks, free_ports, key_folder, together

x509 = pytest.importorskip("cryptography.x509")
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    """The command changes what the signal does to this process."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_private_keys_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    made = make_keys(tmp_path / "keys", 3, days=30)
    private = [tmp_path / "keys" / "authority.key"]
    private += [tmp_path / "keys" / f"rank-{rank}" / "key.pem" for rank in range(3)]
    assert [mode(path) for path in private] == [0o600] * 4
    assert mode(tmp_path / "keys" / "rank-1") == 0o700
    assert {path.name for path in (tmp_path / "keys" / "rank-1").iterdir()} == {
        "authority.pem",
        "certificate.pem",
        "key.pem",
    }
    left = made.expires - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=29) < left <= datetime.timedelta(days=30)


def test_a_certificate_names_its_rank_and_nothing_else(tmp_path: Path) -> None:
    make_keys(tmp_path, 2)
    raw = (tmp_path / "rank-1" / "certificate.pem").read_bytes()
    certificate = x509.load_pem_x509_certificate(raw)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.DNSName("rank-1.astra.internal")]
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert not basic.ca
    assert isinstance(certificate.public_key().curve, ec.SECP256R1)
    authority = x509.load_pem_x509_certificate((tmp_path / "authority.pem").read_bytes())
    certificate.verify_directly_issued_by(authority)


@pytest.mark.parametrize(
    ("names", "rank"),
    [
        (["rank-0.astra.internal"], 0),
        (["rank-65534.astra.internal", "pi.local"], 65534),
        (["rank-1.astra.internal", "rank-2.astra.internal"], None),
        (["*.astra.internal"], None),
        (["rank-01.astra.internal"], None),
        (["rank-1.astra.internal.evil.org"], None),
        (["evil.rank-1.astra.internal"], None),
        (["rank-1.astra.internal\n"], None),
        (["rank-١.astra.internal"], None),
        ([], None),
    ],
)
def test_the_rank_that_a_certificate_names(names: list[str], rank: int | None) -> None:
    assert named_rank({"subjectAltName": [("DNS", name) for name in names]}) == rank


def test_a_name_that_is_no_host_name_names_no_rank() -> None:
    assert named_rank({"subjectAltName": [("URI", "rank-1.astra.internal")]}) is None
    assert named_rank({}) is None
    assert named_rank(None) is None


def test_addresses_that_a_certificate_is_bound_to() -> None:
    rank = ("DNS", "rank-1.astra.internal")
    assert is_bound_to({"subjectAltName": [rank]}, "10.0.0.1")
    bound = {"subjectAltName": [rank, ("DNS", "Pi.local"), ("IP Address", "0:0:0:0:0:0:0:1")]}
    assert is_bound_to(bound, "pi.LOCAL.")
    assert is_bound_to(bound, "::1")
    assert not is_bound_to(bound, "10.0.0.1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": 0}, r"ranks: expected 1\.\.65535, got 0"),
        ({"ranks": 2, "hosts": ["a"]}, "hosts: expected 2, one for each rank, got 1"),
        ({"ranks": 1, "hosts": ["a:7000"]}, "hosts: expected a name or an IP address"),
        ({"ranks": 1, "hosts": ["rank-3.astra.internal"]}, "hosts: expected a name"),
        ({"ranks": 1, "days": 0}, "days: expected"),
    ],
)
def test_bad_wishes(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        make_keys(tmp_path / "keys", **options)
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("there", [False, True])
def test_keys_are_written_all_or_none(
    tmp_path: Path, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, written = tmp_path / "keys", []

    def write(path: Path, key: Any) -> None:
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        path.write_text("a key")

    monkeypatch.setattr(certificates, "_write_private", write)
    if there:
        folder.mkdir()
        (folder / "notes").write_text("")
    with pytest.raises(OSError, match="No space left"):
        make_keys(folder, 2)
    assert [path.name for path in tmp_path.glob("keys/*")] == (["notes"] if there else [])
    assert folder.exists() is there


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    make_keys(tmp_path, 1)
    before = (tmp_path / "rank-0" / "key.pem").read_bytes()
    for folder in (tmp_path, tmp_path / "rank-0"):
        with pytest.raises(KeysError, match="holds keys already"):
            make_keys(folder, 1)
    assert (tmp_path / "rank-0" / "key.pem").read_bytes() == before


def test_ephemeral_keys_are_private_and_leave_nothing() -> None:
    with ephemeral_keys(2) as folder:
        assert mode(folder) == 0o700
        assert not (folder / "authority.key").exists()
        assert Keys(folder).contexts(1).dialing.verify_mode == ssl.CERT_REQUIRED
        left = show_keys(folder)[0].expires - datetime.datetime.now(datetime.UTC)
        assert left <= datetime.timedelta(days=1)
    assert not folder.exists()
    with pytest.raises(ZeroDivisionError), ephemeral_keys(2) as folder:
        raise ZeroDivisionError
    assert not folder.exists()


@pytest.mark.parametrize("trouble", ["none", "expired", "taken", "replaced"])
def test_ephemeral_keys_are_renewed(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service runs for longer than they are valid, and than temporary files are kept."""
    with ephemeral_keys(2) as folder:
        serial = show_keys(folder)[0].serial
        if trouble == "expired":
            past = credentials.why_not_valid
            monkeypatch.setattr(
                credentials,
                "why_not_valid",
                lambda begins, ends, now: past(begins, ends, now + datetime.timedelta(days=2)),
            )
            with pytest.raises(KeysError, match="has expired"):
                Keys(folder).contexts(0)
        if trouble in ("taken", "replaced"):
            shutil.rmtree(folder)
        if trouble == "replaced":
            folder.write_text("of somebody else")
            with pytest.raises(KeysError, match="cannot make .* anew"):
                certificates.renew_ephemeral_keys(folder, 2)
            folder.unlink()
        certificates.renew_ephemeral_keys(folder, 2)
        monkeypatch.undo()
        Keys(folder).contexts(1)
        assert mode(folder) == 0o700
        assert (show_keys(folder)[0].serial == serial) is (trouble == "none")


def test_contexts_speak_nothing_below_tls_1_3() -> None:
    for context in Keys(key_folder()).contexts(0):
        assert context.minimum_version == context.maximum_version == ssl.TLSVersion.TLSv1_3
        assert context.verify_mode == ssl.CERT_REQUIRED
        assert len(context.get_ca_certs()) == 1  # nobody but the authority of these keys


def test_keys_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="expected certificate.pem or rank-9/certificate.pem"):
        Keys(key_folder()).contexts(9)
    shutil.copytree(key_folder() / "rank-0", tmp_path / "mixed")
    shutil.copy(key_folder() / "rank-1" / "key.pem", tmp_path / "mixed" / "key.pem")
    with pytest.raises(KeysError, match="cannot be used together: .*mismatch"):
        Keys(tmp_path / "mixed").contexts(0)


DAMAGE: dict[str, tuple[str, str]] = {
    "other bytes": ("\N{SNOWMAN}", "got other bytes"),
    "text": ("x", "got none"),
    "nothing": ("", "got none"),
    "cut": ("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n", "damaged|got none"),
}


@pytest.mark.parametrize("damage", ["missing", *DAMAGE])
@pytest.mark.parametrize("name", ["authority.pem", "certificate.pem", "key.pem"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "keys"
    shutil.copytree(key_folder() / "rank-0", folder)
    words = "No such file"
    if damage == "missing":
        (folder / name).unlink()
        if name == "certificate.pem":
            words = "expected certificate.pem"
    else:
        text, words = DAMAGE[damage]
        (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(KeysError, match=words) as caught:
        Keys(folder).contexts(0)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("days", "words"), [(500, "has expired"), (-500, "is not valid yet"), (0, "")]
)
def test_dates_are_looked_at_before_anybody_is_dialed(
    monkeypatch: pytest.MonkeyPatch, days: int, words: str
) -> None:
    """A clock that is off is said with both dates; who joins later has the same keys."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
            moment = datetime.datetime.now(tz) + datetime.timedelta(days=days)
            return cls.fromtimestamp(moment.timestamp(), tz)

    monkeypatch.setattr(credentials, "datetime", Clock)
    peers, keys = ["10.0.0.1:7000", "10.0.0.2:7000"], key_folder()
    if not words:
        check_keys(0, peers, keys)
        return
    said = f"'.*authority.pem' {words}: .* this machine's clock says "
    with pytest.raises(KeysError, match=said):
        check_keys(0, peers, keys)
    with pytest.raises(KeysError, match=said):
        connect(0, 2, peers, keys=keys)


def test_validity_is_that_of_the_certificate() -> None:
    for path in (key_folder() / "authority.pem", key_folder() / "rank-3" / "certificate.pem"):
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        dates = credentials.validity(ssl.PEM_cert_to_DER_cert(path.read_text()))
        assert dates == (certificate.not_valid_before_utc, certificate.not_valid_after_utc)


def test_an_authority_beside_an_expired_one_is_enough(tmp_path: Path) -> None:
    """Rotating keys: both are trusted for a while."""
    valid = credentials._validities(key_folder() / "authority.pem")
    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    credentials._check_dates(tmp_path, [(past, past), *valid])
    with pytest.raises(KeysError, match="has expired"):
        credentials._check_dates(tmp_path, [(past, past)])


def test_a_key_that_others_can_read_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(key_folder() / "rank-0", tmp_path / "open")
    (tmp_path / "open" / "key.pem").chmod(0o644)
    for _ in range(2):
        Keys(tmp_path / "open").contexts(0)
    assert caplog.text.count("can be read by others") == 1


@pytest.mark.parametrize("options", [{}, {"insecure": True}], ids=["no-keys", "insecure"])
@pytest.mark.parametrize("address", ["10.0.0.1", "0.0.0.0", "[2001:db8::1]", "no-such-host"])
def test_plaintext_is_refused_off_loopback(
    options: dict[str, Any], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ASTRA_KEYS", raising=False)
    peers = ["127.0.0.1:7000", f"{address}:7000"]
    with pytest.raises(KeysError, match="plaintext stays on one machine"):
        connect(0, 2, peers, **options)
    with pytest.raises(ValueError, match="not on loopback"):
        check_keys(0, peers, **options)


def test_listening_off_loopback_in_plaintext_is_refused() -> None:
    with pytest.raises(errors.AstraError, match="since 0.0.0.0 is not on loopback"):
        connect(0, 2, free_ports(2), host="0.0.0.0", insecure=True)


def test_contradictions_are_refused() -> None:
    with pytest.raises(KeysError, match="insecure: expected without keys"):
        connect(0, 2, free_ports(2), keys=key_folder(), insecure=True)
    with pytest.raises(KeysError, match="expected none with backend 'gloo'"):
        connect(0, 2, free_ports(2), keys=key_folder(), backend="gloo")


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_backends_that_know_no_keys_do_not_ignore_them(
    monkeypatch: pytest.MonkeyPatch, backend: Any
) -> None:
    """Nor does their plaintext leave the machine unless that is asked for by name."""
    monkeypatch.setenv("ASTRA_KEYS", str(key_folder()))
    with pytest.raises(KeysError, match="ASTRA_KEYS names some.*plaintext.*--insecure"):
        connect(0, 2, free_ports(2), backend=backend)
    monkeypatch.delenv("ASTRA_KEYS")
    peers = ["192.0.2.1:7000", "127.0.0.1:7000"]
    with pytest.raises(KeysError, match="--insecure.*off loopback, at 192.0.2.1: .*plaintext"):
        connect(1, 2, peers, backend=backend)
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    monkeypatch.setenv("MASTER_PORT", "7000")
    with pytest.raises(KeysError, match="off loopback, at 192.0.2.1"):
        connect(0, 2, backend=backend)
    with pytest.raises(errors.ConnectFailed):  # asked for by name
        connect(1, 2, peers, backend=backend, insecure=True, connect_timeout=0.5)


@pytest.mark.parametrize("insecure", [False, True])
def test_keys_of_the_environment(insecure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASTRA_KEYS", str(key_folder()))
    peers = free_ports(2)
    meshes = together([lambda r=r: connect(r, 2, peers, insecure=insecure) for r in range(2)])
    assert [mesh.encrypted for mesh in meshes] == [not insecure] * 2
    as_ranks(meshes, lambda mesh: all_to_all(mesh, 1, 10))


def test_the_doctor_looks_at_keys_as_a_rank_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "keys"
    shutil.copytree(key_folder(), folder)
    for named in (folder, folder / "rank-1"):
        monkeypatch.setenv("ASTRA_KEYS", str(named))
        assert doctor._check_keys() == "made and read; those of ASTRA_KEYS are valid"
    (folder / "rank-1" / "key.pem").write_text("x")
    for named in (folder, folder / "rank-1", tmp_path):
        monkeypatch.setenv("ASTRA_KEYS", str(named))
        with pytest.raises(KeysError):
            doctor._check_keys()


@pytest.fixture
def without_cryptography(monkeypatch: pytest.MonkeyPatch) -> None:
    key_folder()  # made before
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)


@pytest.mark.usefixtures("without_cryptography")
def test_the_extra_is_named_where_it_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "init", "--ranks", "2", "--output", str(tmp_path / "keys")]) == 1
    assert 'pip install "astra-inference[security]"' in capsys.readouterr().err
    assert not (tmp_path / "keys").exists()


@pytest.mark.usefixtures("without_cryptography")
def test_using_keys_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = free_ports(2)
    meshes = together([lambda r=r: connect(r, 2, peers, keys=key_folder()) for r in range(2)])
    assert all(mesh.encrypted for mesh in meshes)
    as_ranks(meshes, lambda mesh: all_to_all(mesh, 1, 10))
    monkeypatch.setenv("ASTRA_KEYS", str(key_folder()))
    assert doctor._check_keys().endswith("those of ASTRA_KEYS are valid")


@pytest.mark.usefixtures("without_cryptography")
def test_processes_of_one_command_then_speak_plaintext_and_say_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with local_keys(argparse.Namespace(keys=None, insecure=False), 2) as keys:
        assert keys is None
    assert "astra-inference[security]" in capsys.readouterr().err


def test_processes_of_one_command_get_ephemeral_keys(tmp_path: Path) -> None:
    with local_keys(argparse.Namespace(keys=None, insecure=False), 2) as keys:
        assert keys is not None
        check_keys(1, ["10.0.0.1:1", "10.0.0.2:2"], keys)
    assert not Path(keys).exists()
    with local_keys(argparse.Namespace(keys=str(tmp_path), insecure=False), 2) as keys:
        assert keys == str(tmp_path)
    with local_keys(argparse.Namespace(keys=None, insecure=True), 2) as keys:
        assert keys is None
