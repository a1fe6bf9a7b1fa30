"""`astra keys`, and the commands that need keys."""

from __future__ import annotations

import datetime
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from astra_runtime.cli import main

from ..ranks import key_folder

pytest.importorskip("cryptography.x509")


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    """The command changes what the signal does to this process."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def astra(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        assert main(arguments) == code
        return capsys.readouterr()

    return run


def test_init_and_show(astra: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    folder = str(tmp_path / "keys")
    asked = ["--output", folder, "--hosts", "[2001:DB8::1], pi-2.local", "--days", "9"]
    made = json.loads(astra("keys", "init", "--ranks", "2", *asked, "--json")[0])
    assert made["ranks"] == 2
    assert made["folders"] == [f"{folder}/rank-0", f"{folder}/rank-1"]
    assert Path(made["authority_key"]).is_file()
    shown = json.loads(astra("keys", "show", folder, "--json")[0])["ranks"]
    assert [(one["rank"], one["hosts"]) for one in shown] == [
        (0, ["2001:db8::1"]),
        (1, ["pi-2.local"]),
    ]
    assert {one["expires"] for one in shown} == {made["expires"]}
    assert [one["valid"] for one in shown] == [True, True]
    out, _ = astra("keys", "show", f"{folder}/rank-1")
    assert out.startswith("rank 1")
    assert "at pi-2.local only" in out
    _, said = astra("keys", "init", "--ranks", "2", "--output", folder, code=1)
    assert "holds keys already" in said
    _, said = astra("keys", "show", str(tmp_path), code=1)
    assert "expected a folder written by `astra keys init`" in said


@pytest.mark.parametrize(
    ("days", "words"), [(500, "has expired"), (-500, "is not valid yet"), (0, None)]
)
def test_show_marks_what_is_not_valid_now(
    astra: Callable[..., tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    days: int,
    words: str | None,
) -> None:
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    clock = SimpleNamespace(datetime=SimpleNamespace(now=lambda _: moment), UTC=datetime.UTC)
    monkeypatch.setattr("astra_runtime.cli.keys.datetime", clock)
    out, _ = astra("keys", "show", str(key_folder()))
    lines = out.splitlines()
    assert len(lines) > 1
    assert all(line.endswith(f"UTC: {words}" if words else "UTC") for line in lines)
    shown = json.loads(astra("keys", "show", str(key_folder()), "--json")[0])["ranks"]
    assert {one["valid"] for one in shown} == {words is None}


def test_show_marks_what_is_damaged(astra: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    shutil.copytree(key_folder(), folder)
    (folder / "rank-1" / "key.pem").write_text("x")
    lines = astra("keys", "show", str(folder))[0].splitlines()
    assert lines[0].endswith("UTC")
    assert "expected a private key in" in lines[1]
    shown = json.loads(astra("keys", "show", str(folder), "--json")[0])["ranks"]
    assert [one["valid"] for one in shown[:2]] == [True, False]
    assert "expected a private key in" in shown[1]["problem"]


def test_init_says_what_to_do_with_the_keys(
    astra: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    out, said = astra("keys", "init", "--ranks", "2", "--output", str(tmp_path / "keys"))
    assert out.split() == [str(tmp_path / "keys" / f"rank-{rank}") for rank in range(2)]
    assert "authority.key belongs on none of them" in said


@pytest.mark.parametrize("command", ["init", "show"])
def test_help_of_the_actions(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["keys", command, "--help"])
    assert left.value.code == 0
    assert f"astra keys {command} " in capsys.readouterr().out.split("example")[1]


@pytest.mark.parametrize("extra", [[], ["--insecure"]], ids=["no-keys", "insecure"])
def test_plaintext_between_devices_is_refused_before_a_model_is_loaded(
    extra: list[str], astra: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ASTRA_KEYS", raising=False)
    addresses = ["--peers", "10.0.0.1:7000,10.0.0.2:7000", "--model", "/no/such/model"]
    _, said = astra("worker", "--rank", "1", *addresses, *extra, code=1)
    assert "plaintext stays on one machine" in said
    _, said = astra("run", "--rank", "0", "--prompt", "x", *addresses, *extra, code=1)
    assert "plaintext stays on one machine" in said
