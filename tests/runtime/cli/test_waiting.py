"""Ranks that wait: for whom, how long, and what a standing worker survives."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from astra_runtime import AstraError, Codebook, connect, console
from astra_runtime.cli import finetune, main, worker
from astra_runtime.cli.waiting import Waiting
from astra_runtime.console import say, working
from astra_runtime.deploy import launch
from astra_runtime.deploy.jobs import Ranks
from astra_runtime.deploy.launch import WorkerFailed, Workers, import_path
from astra_runtime.errors import ConnectFailed, HandshakeRefused, PeerLost
from astra_runtime.store import load_model
from astra_runtime.transport import ConnectOptions, bootstrap, open_mesh
from astra_runtime.transport.credentials import KeysError
from tests.processes import Fork

from ..ranks import free_ports, wait_for
from .commands import PROMPT, model_options

Here = Callable[..., tuple[str, str]]


@pytest.fixture
def quick_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that wait say so after moments."""
    monkeypatch.setattr(bootstrap, "NOTICE_SECONDS", 0.02)


@pytest.mark.usefixtures("quick_notices")
def test_a_rank_says_for_whom_it_waits(capsys: pytest.CaptureFixture[str]) -> None:
    peers, lines = free_ports(3), []
    waiting = Waiting(0, peers, silence=0.1)

    def on_wait(missing: tuple[int, ...]) -> None:
        waiting(missing)
        lines.extend(capsys.readouterr().err.splitlines())
        if len(lines) == 2:
            raise WorkerFailed("both lines came")

    options = ConnectOptions(0, 3, tuple(peers), connect_timeout=60, on_wait=on_wait)
    with pytest.raises(WorkerFailed, match="both lines came"):
        open_mesh(options)
    assert all(f"rank 0 waits for rank 1 at {peers[1]}, rank 2 at {peers[2]}" in s for s in lines)


@pytest.mark.usefixtures("quick_notices")
def test_what_on_wait_raises_ends_the_wait() -> None:
    def give_up(missing: tuple[int, ...]) -> None:
        raise WorkerFailed(f"without {missing}")

    start = time.monotonic()
    with pytest.raises(WorkerFailed, match=r"without \(1,\)"):
        open_mesh(ConnectOptions(0, 2, tuple(free_ports(2)), on_wait=give_up))
    assert time.monotonic() - start < 30


def test_lines_come_with_changes_and_after_silence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    waiting = Waiting(0, ["a:1", "b:2", "c:3"], silence=8.0)
    for clock[0], missing in (
        (1.0, (1, 2)), (5.0, (1, 2)), (6.0, (1,)), (13.0, (1,)), (14.0, (1,)),
    ):  # fmt: skip
        waiting(missing)
    assert [line.rpartition("… ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "1 s",
        "6 s",
        "14 s",
    ]


def test_a_service_that_waits_for_days_says_so_more_and_more_rarely(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    waiting = Waiting(0, ["a:1", "b:2", "c:3"], silence=8.0, longest=30.0)
    for second in range(1, 120):
        clock[0] = float(second)
        waiting((1, 2) if second < 100 else (1,))
    lines = [line.rpartition("… ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["1 s", "9 s", "25 s", "55 s", "85 s", "100 s", "108 s"]


def test_long_work_is_not_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(console, "_last_line", 0.0)
    with working("reading", silence=0.1), working(lambda: "thinking", silence=0.1):
        clock[0] = 10.0  # nobody has said anything for so long
        first = wait_for(lambda: capsys.readouterr().err)
        say("a thought")
        told = [*first.splitlines(), *capsys.readouterr().err.splitlines()]
    assert told[0].startswith("thinking … 10 s")
    assert "a thought" in told
    assert not any(line.startswith("reading") for line in told)


class Script(worker._Worker):
    """A worker whose attempts end as they are told to: True stands for a mesh joined first."""

    def __init__(self, *attempts: tuple[bool, BaseException | int]) -> None:
        super().__init__(argparse.Namespace(rank=1), [], None, None, {})
        self.attempts = iter(attempts)

    def join_once(self) -> int:
        joined, ending = next(self.attempts)
        self.meshes += joined
        if isinstance(ending, int):
            return ending
        raise ending


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def test_a_standing_worker_tries_again_more_and_more_rarely(
    pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    late = ConnectFailed("nobody came", (0,))
    script = Script(
        (True, 3),
        (True, ValueError("max_new_tokens: expected less")),
        (True, PeerLost(0)),
        (True, RuntimeError("can't allocate memory")),
        (True, IndexError()),
        *[(False, late)] * 9,
        (True, 1),
        (False, ConnectFailed("port 7000 is in use")),  # of the mesh before, perhaps
        (False, HandshakeRefused("another codebook")),
        (False, KeyboardInterrupt()),
    )
    with pytest.raises(KeyboardInterrupt):
        script.serve()
    growing = [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 30.0]
    assert pauses == pytest.approx([0.2] * 5 + growing + [0.2, 1.0, 2.0])
    told = capsys.readouterr().err
    assert len(told.splitlines()) == len(pauses)  # one line each
    assert "max_new_tokens: expected less" in told
    assert "IndexError" in told


@pytest.mark.parametrize(
    "attempts",
    [
        [(False, ConnectFailed("port 7000 is in use"))],
        [(False, ValueError("peers: expected …"))],
        [(True, 1), (False, KeysError("expired"))],
    ],
)
def test_what_no_waiting_cures_ends_a_standing_worker(
    pauses: list[float], attempts: list[tuple[bool, Any]]
) -> None:
    with pytest.raises(type(attempts[-1][1])):
        Script(*attempts).serve()
    assert len(pauses) == len(attempts) - 1


def test_a_standing_worker_survives_whatever_its_leader_asks(
    home: Path,
    here: Here,
) -> None:
    peers = free_ports(2)
    common = [*model_options(home), "--peers", ",".join(peers)]
    standing = Fork(lambda: main(["worker", "--rank", "1", *common]))
    model, book = load_model(str(home / "model")), Codebook.from_pretrained(home / "codebook")
    ids = [list(range(1, 31))]
    requests: list[dict[str, Any]] = [
        {"do": "generate", "input_ids": ids, "space": "codes", "max_new_tokens": 100_000},
        {"do": "generate", "input_ids": ids, "space": "other", "max_new_tokens": 1},
        {"do": "prefill", "input_ids": [[1000]], "space": "codes", "repeats": 1},
        {"do": "probe", "tokens": 100_000, "codebook": book.digest},
        {"do": "dance"},
        {},
    ]
    try:
        for request in requests:
            with connect(0, 2, peers, connect_timeout=60) as mesh:
                ranks = Ranks(model, book, mesh)
                with contextlib.suppress(AstraError, ValueError, LookupError):
                    ranks.submit(**request)
                ranks.close()
            assert standing.poll() is None
        asked = ["run", *common, "--rank", "0", "--prompt", PROMPT, "--json"]
        assert json.loads(here(*asked)[0])["world_size"] == 2
        assert standing.poll() is None
    finally:
        standing.kill()
        standing.stdout.close()


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file of its own that is called like a module."""
    (tmp_path / "random.py").write_text("raise SystemError('a stranger was imported')")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_workers_import_nothing_from_the_working_folder(
    somewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for entry in ("", str(somewhere)):
        monkeypatch.setattr(sys, "path", [entry, *sys.path])
    path = import_path()
    assert str(somewhere) not in path
    command = [sys.executable, "-P", "-c", launch._CHILD, "\n".join(path), "worker", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    # what names the folder itself is obeyed, as it is by the leader
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}{somewhere}")
    assert str(somewhere) in import_path()


def test_what_a_worker_wrote_before_it_crashed_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "_CHILD", "raise SystemError('no such thing')")
    with Workers(2, [], 1) as workers, pytest.raises(WorkerFailed) as failed:
        workers.wait_ready(60)
    assert str(failed.value) == "rank 1 ended with status 1: SystemError: no such thing"
    assert "rank 1 wrote: Traceback (most recent call last):" in capsys.readouterr().err


def test_local_workers_have_the_connect_timeout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "_CHILD", "import time; time.sleep(60)")
    with Workers(3, [], 1) as workers:
        with pytest.raises(WorkerFailed, match=r"ranks \[1, 2\] were not ready within 0.3 s"):
            workers.wait_ready(0.3)
        workers.check([1, 2])
        workers.processes[2].kill()
        workers.processes[2].wait()
        with pytest.raises(WorkerFailed, match="rank 2 was ended by SIGKILL"):
            workers.check([1, 2])


def test_a_step_of_training_is_not_charged_with_an_evaluation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    log = finetune._Log()
    measured: Any = argparse.Namespace(
        metric="perplexity", astra=2.0, exact=1.0, local_only=3.0, gap_recovered=0.5
    )

    def step(number: int, measured: Any = None) -> Any:
        return argparse.Namespace(step=number, steps=2, loss=1.0, commitment=0.0, measured=measured)

    for clock[0], event in ((30.0, step(0, measured)), (36.0, step(1)), (42.0, step(2))):
        log(event)
    told = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[-1] for line in told if "s a step" in line] == ["6.00 s a step"] * 2
