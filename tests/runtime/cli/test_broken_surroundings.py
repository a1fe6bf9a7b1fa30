"""Streams, disks and folders that fail: no answer and no work is lost to them."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from astra_kernels._cache import cache_folder
from astra_runtime import cli
from astra_runtime.cli import common, doctor, fitting
from astra_runtime.cli.options import model_name
from astra_runtime.console import say
from astra_runtime.deploy.jobs import Ranks
from astra_runtime.errors import AstraError, PeerLost
from astra_runtime.store import (
    load_model,
)
from astra_runtime.trace import write_timeline

from ..ranks import key_folder
from .commands import PROMPT, model_options

Here = Callable[..., tuple[str, str]]


def test_an_answer_survives_the_loss_of_its_timeline(
    home: Path,
    here: Here,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lose(ranks: Ranks) -> None:
        raise AstraError("the timeline is lost")

    monkeypatch.setattr(Ranks, "timeline", lose)
    asked = ["run", *model_options(home), "--prompt", PROMPT, "--max-new-tokens", "2", "--json"]
    out, told = here(*asked, "--trace", str(home / "lost.json"), code=1)
    assert len(json.loads(out)["text"].split()) == 2
    assert "the timeline is lost" in told


def test_a_demo_shows_what_it_measured_whatever_ends_it(
    home: Path,
    here: Here,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lose(ranks: Ranks, *_: Any) -> None:
        raise AstraError("the continuation is lost")

    monkeypatch.setattr(Ranks, "generate", lose)
    asked = [*model_options(home), "--text", str(home / "text.txt"), "--tokens", "70"]
    out, told = here("demo", *asked, "--world-size", "2", "--repeats", "1", "--mbit", "0", code=1)
    assert "dense sequence parallel" in out
    assert "the continuation is lost" in told


def test_a_timeline_into_a_pipe_leaves_it_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
    write_timeline(pipe, {0: [("compute", -1, 0, 5)]})
    assert json.loads(reader.communicate()[0])["traceEvents"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_output_that_is_not_utf8_loses_no_answer(home: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "astra_runtime"]
    shown = subprocess.run([*command, "finetune", "--help"], capture_output=True, env=environment)
    assert shown.returncode == 0
    code = "from astra_runtime import console; console.show_json({'text': 'мир'})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert json.loads(shown.stdout) == {"text": "мир"}


def test_streams_that_are_closed_are_opened_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`2>&-` leaves None, and `print` would put what is said on stdout, among the results."""
    opened: list[str] = []

    def fstat(number: int) -> None:
        if number == 2:
            raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(os, "fstat", fstat)
    monkeypatch.setattr(os, "open", lambda path, mode: opened.append(path))
    cli._open_standard_streams()
    replaced = sys.stderr
    monkeypatch.undo()
    assert opened == [os.devnull]
    assert replaced.name == os.devnull
    replaced.close()


def test_a_full_disk_is_told_of_and_ends_no_work(
    here: Here,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("cryptography")
    with open("/dev/full", "w") as full, open(os.devnull, "w") as nothing:
        with monkeypatch.context() as changed:
            changed.setattr(sys, "stdout", full)
            told = here("keys", "show", str(key_folder()), code=1)[1]
            assert sys.stdout.name == os.devnull
            sys.stdout.close()
        with monkeypatch.context() as changed:
            changed.setattr(sys, "stderr", full)
            say("a line for nobody")
        os.dup2(nothing.fileno(), full.fileno())  # what it still has goes nowhere
    assert "No space left on device" in told


def test_a_reader_who_leaves_is_no_error(
    home: Path,
    here: Here,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`astra run … | head -c 1`: the answer ends, and that is all."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as left, open(os.devnull, "w") as nothing:
        with monkeypatch.context() as changed:
            changed.setattr(sys, "stdout", left)
            told = here("run", *model_options(home), "--prompt", PROMPT, code=1)[1]
            sys.stdout.close()  # what stands in its place
        os.dup2(nothing.fileno(), writing)  # what it still has goes nowhere
    assert "error" not in told


def test_a_peer_whose_connection_broke_is_told_of(
    here: Here,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel's word for it is the one for a reader of stdout who has left."""

    def lose(options: argparse.Namespace) -> int:
        raise PeerLost(1, 2, "its process ended") from BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(doctor, "run", lose)
    assert "rank 1" in here("doctor", code=1)[1]


def test_a_folder_that_is_gone_is_told_of(
    here: Here,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "current folder has been removed" in here("doctor", code=1)[1]


def test_what_was_fitted_is_kept_where_the_folder_takes_nothing_more(tmp_path: Path) -> None:
    saved: list[Path] = []

    def save(folder: Path) -> None:
        saved.append(folder)
        if folder == tmp_path:
            raise OSError(errno.ENOSPC, "No space left on device")
        (folder / "result").write_text("whole")

    with pytest.raises(AstraError, match="No space left on device; what was made is in ") as error:
        common.save_result(save, tmp_path)
    assert str(error.value).endswith(str(saved[1]))
    assert (saved[1] / "result").read_text() == "whole"
    shutil.rmtree(saved[1])


def test_a_timeline_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TypeError):
        write_timeline(tmp_path / "t.json", {0: [("compute", -1, 0, 5)]}, about={1, 2})
    assert not list(tmp_path.iterdir())


def test_a_cache_that_can_only_be_read_will_do(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody else has fitted the codebook; no lock can be taken there."""
    monkeypatch.setenv("ASTRA_CACHE", str(tmp_path))
    model = load_model(str(home / "model"))
    folder = fitting._cache_folder("model", model)
    shutil.copytree(home / "codebook", folder)
    (folder.parent / f"{folder.name}.lock").mkdir()  # as good as a file that root cannot write
    options: Any = SimpleNamespace(model="model", codebook=None)
    assert fitting.ensure_codebook(options, model, None)[1] == folder


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"ASTRA_CACHE": "~/here"}, "/home/me/here"),
        ({"ASTRA_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/astra"),
        ({"ASTRA_CACHE": "", "XDG_CACHE_HOME": "/var/cache"}, "/var/cache/astra"),
    ],
)
def test_the_folder_of_the_cache(
    variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"HOME": "/home/me"} | variables).items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder()) == folder


def test_a_user_without_a_home_is_told_what_to_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASTRA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(OSError, match="expected a folder in ASTRA_CACHE"):
        cache_folder()


def test_what_a_model_is_called() -> None:
    names = [".", "adapted/", "org/name", "smollm2"]
    called = [model_name(argparse.Namespace(model=name)) for name in names]
    assert called == [Path.cwd().name, "adapted", "name", "smollm2"]
