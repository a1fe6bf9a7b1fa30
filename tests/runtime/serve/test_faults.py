"""A rank that is lost: noticed without a call, an error for what runs, and the mesh forms again."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from astra_runtime import Engine, connect
from astra_runtime.errors import AstraError
from astra_runtime.serve import patience, rounds
from astra_runtime.serve.leader import Leader
from astra_runtime.serve.rank import follow
from astra_runtime.serve.service import CLOSING, NotReady, ServiceFailed

from ..ranks import free_ports, wait_for
from .service import Numbers, alone, ask, led, prompt


class Rank:
    """Rank 1, a thread that joins again after whatever has ended its mesh, when it may."""

    def __init__(self, model: Any, peers: list[str]) -> None:
        self.may = threading.Event()
        self.may.set()
        self.over = False  # whether it does not join again
        self.engine: Any = None
        self.thread = threading.Thread(target=self._run, args=(model, peers), daemon=True)
        self.thread.start()

    def _run(self, model: Any, peers: list[str]) -> None:
        while True:
            assert self.may.wait(100)
            if self.over:
                return
            with (
                contextlib.suppress(AstraError),
                connect(1, peers=peers, timeout=20) as mesh,
                Engine(model, None, mesh) as self.engine,
            ):
                follow(self.engine)
                return

    def die(self) -> None:
        """Its connection ends without a word."""
        for connection in self.engine.mesh.connections.values():
            connection.sock.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def pair(model: Any, **options: Any) -> Iterator[tuple[Leader, Rank]]:
    peers = free_ports(2)
    other = Rank(model, peers)
    with connect(0, peers=peers, timeout=20) as mesh, Engine(model, None, mesh) as engine:
        with Leader(engine, Numbers(), **options) as leader:
            yield leader, other
        other.thread.join(60)
        engine.mesh.close()
    assert not other.thread.is_alive()


def test_a_rank_that_is_lost_comes_back(llama: Any) -> None:
    away: list[Exception] = []

    def on_away(error: Exception) -> None:
        away.append(error)
        raise OSError("no process can be started")  # which ends no service

    with pair(llama, on_away=on_away) as (leader, other):
        assert ask(leader, prompt(150)).wait().ids() == alone(llama, prompt(150), 5)
        other.may.clear()
        other.die()  # nothing is going on
        wait_for(lambda: not leader.status().ready)
        assert "rank 1" in leader.status().reason
        assert [peer.state for peer in leader.status().peers] == ["here", "away"]
        with pytest.raises(NotReady, match="waiting for all devices"):
            ask(leader, prompt(8))
        other.may.set()
        wait_for(lambda: leader.status().ready)
        assert away
        assert ask(leader, prompt(150)).wait().ids() == alone(llama, prompt(150), 5)
        assert (leader.status().lost, leader.status().rejoined) == (1, 1)


def test_a_service_ends_at_once_while_a_rank_is_away(llama: Any) -> None:
    """It waited on for the rank, for as long as a try to form the mesh again may take."""
    away: list[Exception] = []
    with pair(llama, on_away=away.append, rejoin_seconds=60) as (leader, other):
        other.may.clear()
        other.die()
        wait_for(lambda: bool(away))
        time.sleep(0.2)  # it waits for the rank by now
        began = time.monotonic()
        leader.close()
        assert time.monotonic() - began < 5
        assert len(away) == 1  # no process is started for a service that ends
        other.over = True
        other.may.set()


@pytest.mark.parametrize("busy", [False, True])
def test_a_service_ends_with_its_engine(
    llama: Any, busy: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It formed the mesh again and again, and told of an unexpected error each time."""
    with pair(llama) as (leader, _):
        heard = ask(leader, prompt(20), 200) if busy else None
        if heard is not None:
            assert heard.first.wait(60)
        leader.engine.close()
        wait_for(lambda: leader.status().reason == CLOSING)
        if heard is not None:
            assert isinstance(heard.wait().error(), ServiceFailed)
        with pytest.raises(NotReady):
            ask(leader, prompt(8))
    assert "unexpected" not in caplog.text
    assert "the engine was closed, so the service ends" in caplog.text


def test_what_runs_fails_and_what_waits_is_answered(llama: Any) -> None:
    with pair(llama) as (leader, other):
        with leader._changed:  # no round begins
            running = [ask(leader, prompt(8, n), 200, held=bool(n)) for n in range(2)]
        for one in running:
            assert one.first.wait(60)
        with leader._changed:  # no further round begins
            waiting = ask(leader, prompt(9), 5)
            other.die()
        running[1].resume.set()
        for one in running:
            assert isinstance(one.wait().error(), ServiceFailed)
            assert "rank 1 was lost" in str(one.error())
        heard = waiting.wait()
        assert heard.ids() == alone(llama, prompt(9), 5) or isinstance(heard.error(), ServiceFailed)
        assert ask_when_ready(leader) == alone(llama, prompt(150), 5)


def ask_when_ready(leader: Leader) -> list[int]:
    wait_for(lambda: leader.status().ready)
    return ask(leader, prompt(150)).wait().ids()


def test_an_ended_connection_is_seen_without_a_round(llama: Any) -> None:
    """Whatever the leader's thread computes meanwhile."""
    with pair(llama) as (leader, other):
        with leader._changed:  # no round begins
            other.may.clear()
            other.die()
            wait_for(lambda: not leader.status().ready)
            assert leader._reason == ""
            assert "rank 1 closed the connection" in leader.status().reason
            with pytest.raises(NotReady, match="rank 1"):
                ask(leader, prompt(8))
        other.may.set()
        wait_for(lambda: leader.status().rejoined == 1)


@pytest.mark.parametrize(
    ("own", "waits"),
    [
        (0.5, [3.5, 3.25]),  # of 4 s since the ranks were told to begin
        (3.9, [2.0, 1.75]),  # half as long at the least, since ranks are not equally quick
    ],
)
def test_silence_is_measured_from_when_the_ranks_were_told(
    monkeypatch: pytest.MonkeyPatch, own: float, waits: list[float]
) -> None:
    """The wait for a report does not add up with this rank's own work, nor with other waits."""
    now, waited = [100.0 + own], []

    def report(mesh: Any, rank: int, seconds: float) -> dict[str, Any]:
        waited.append(seconds)
        now[0] += 0.25
        return {}

    monkeypatch.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(rounds, "receive_report", report)
    engine = SimpleNamespace(mesh=SimpleNamespace(world_size=3, timeout=4.0))
    leader: Any = SimpleNamespace(engine=engine, _job_sent=100.0, _idle=False)
    assert list(rounds.Rounds._reports(leader)) == [{}, {}]
    assert waited == pytest.approx(waits)


def test_freed_memory_is_given_back(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the ranks are together, and after answers when there is nothing to do."""
    given: list[None] = []
    monkeypatch.setattr(rounds, "TIDY_SECONDS", 0.0)
    monkeypatch.setattr(rounds, "return_free_memory", lambda: given.append(None))
    with led(llama, 1) as leader:
        wait_for(lambda: len(given) > 0)
        before = len(given)
        ask(leader, prompt(9)).wait()
        wait_for(lambda: len(given) > before)


@pytest.mark.parametrize(
    ("states", "changes", "computes"),
    [
        ("R", {}, True),
        ("SD", {}, True),  # reads weights from a disk
        ("S", {}, False),  # waits for something
        ("TT", {}, False),  # was stopped
        ("R", {"begun": 7}, False),  # its number is another process's by now
        ("R", {"machine": "another"}, False),
        ("R", {"pid": os.getpid()}, False),  # a thread of the rank that waits
        ("", {}, False),  # it has ended
    ],
)
def test_a_slow_rank_of_this_machine_gets_more_time(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    states: str,
    changes: dict[str, Any],
    computes: bool,
) -> None:
    about = patience.about_this_process() | {"pid": 99, "begun": 5} | changes
    for number, state in enumerate(states):
        for stat in (tmp_path / "99", tmp_path / f"99/task/{number}"):
            stat.mkdir(parents=True, exist_ok=True)
            (stat / "stat").write_text(f"99 (a (name)) {state} {'0 ' * 18}5 0 0")
    monkeypatch.setattr(patience, "_PROCESSES", tmp_path)
    asked = patience.Patience(2.0, {1: about})
    assert asked((1,), 2.0) == (patience.LOOK_SECONDS if computes else 0.0)
    assert asked((1,), 2.0 * patience.MOST_PATIENCE) == asked((1, 2), 2.0) == 0.0


def test_a_worker_of_ones_own_rejoins(llama: Any) -> None:
    peers = free_ports(2)
    jobs: list[int] = []
    engines: list[Engine] = []

    def work() -> None:
        with connect(1, peers=peers, timeout=20) as mesh, Engine(llama, None, mesh) as engine:
            engines.append(engine)
            jobs.append(follow(engine, rejoin_seconds=60))
            engine.mesh.close()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    with connect(0, peers=peers, timeout=20) as mesh, Engine(llama, None, mesh) as engine:
        with Leader(engine, Numbers()) as leader:
            former = weakref.ref(leader._sequences)  # keys and values of the mesh that is lost
            for connection in engines[0].mesh.connections.values():  # type: ignore[attr-defined]
                connection.sock.shutdown(socket.SHUT_RDWR)
            wait_for(lambda: leader.status().rejoined == 1)
            wait_for(lambda: former() is None)
            assert ask_when_ready(leader) == alone(llama, prompt(150), 5)
        worker.join(60)
        engine.mesh.close()
    assert not worker.is_alive()
    assert jobs[0] > 0
