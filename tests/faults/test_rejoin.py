"""Over torch.distributed, too, a rank that was killed is replaced, and the rest goes on."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from astra_runtime.errors import AstraError, ConnectFailed
from astra_runtime.transport import connect
from tests.runtime.ranks import MAKERS, environment, free_ports

from .forks import Forks, Told
from .rank import _answer, subject

TURNS = 3
ANSWERED = 0xFFE0  # a control message: the sender has its answer


def survivor(
    told: Told, number: int, peers: list[str], sleep: float = 0.0, turns: int = TURNS
) -> None:
    """Answers, meets a failure, rejoins and answers again; the failures are told."""
    from astra_runtime import Engine

    model, book, inputs = subject()
    mesh = connect(number, len(peers), peers, backend="gloo", timeout=20, connect_timeout=40)
    failed: list[AstraError] = []  # kept, and what their tracebacks hold with them
    answers = []
    with Engine(model, book, mesh) as engine:
        for turn in range(turns):
            if turn:
                try:
                    engine(**inputs)
                except AstraError as error:
                    failed.append(error)
                time.sleep(sleep)
                engine.rejoin()
            answers.append(_answer(engine, inputs)["digest"])
            if turn < turns - 1:
                engine.mesh.send(b"!", block=ANSWERED, plan=turn, to=[1 - number])
        told(answers=answers, failed=[type(error).__name__ for error in failed])
        engine.mesh.close()


def short_lived(told: Told, number: int, peers: list[str]) -> None:
    """One answer, and killed in the next call; its successors do the same but for the last."""
    import os
    import signal

    from astra_runtime import Engine

    for turn in range(TURNS):
        child = os.fork() if turn < TURNS - 1 else 0
        if child:
            os.waitpid(child, 0)
            continue
        model, book, inputs = subject()
        mesh = connect(number, len(peers), peers, backend="gloo", timeout=20, connect_timeout=40)
        with Engine(model, book, mesh) as engine:
            answer = _answer(engine, inputs)["digest"]
            told(**{f"answer{turn}": answer})
            if turn < TURNS - 1:
                # gloo may not have sent the answer yet: this turn is not to fail
                mesh.receive({1 - number: 1}, block=ANSWERED, plan=turn)
                os.kill(os.getpid(), signal.SIGKILL)
            mesh.close()


@pytest.mark.parametrize(("victim", "sleep"), [(1, 0.0), (0, 0.0), (1, 0.7)])
def test_a_killed_rank_is_replaced(forks: Forks, victim: int, sleep: float) -> None:
    """Twice; also where rank 0 is slow to notice, and where it is rank 0 itself."""
    peers = free_ports(2)
    tasks: list[tuple[str, dict[str, Any]]] = [
        ("tests.faults.test_rejoin:survivor", {"number": n, "peers": peers, "sleep": sleep})
        for n in range(2)
    ]
    tasks[victim] = ("tests.faults.test_rejoin:short_lived", {"number": victim, "peers": peers})
    told = [outcome.told for outcome in forks.run(tasks, seconds=100)]
    stayed, left = told[1 - victim], told[victim]
    assert stayed["failed"] == ["PeerLost"] * (TURNS - 1)
    assert len(stayed["answers"]) == len(left) == TURNS
    assert len({*stayed["answers"], *left.values()}) == 1


TORCHRUN = """
import sys
from tests.faults.rank import _answer, subject
from tests.faults.test_rejoin import ANSWERED
from astra_runtime import Engine
from astra_runtime.errors import AstraError
from astra_runtime.transport import connect

model, book, inputs = subject()
with Engine(model, book, connect(backend="gloo", timeout=20)) as engine:
    answers, failed, send = [], [], engine.mesh.send
    for turn in range(3):
        answers.append(_answer(engine, inputs)["digest"])
        if turn == 2:
            break
        if engine.rank == 1:
            # rank 0 has its answer, which gloo may not have sent until now
            engine.mesh.receive({0: 1}, block=ANSWERED, plan=turn)
            engine.mesh.send = lambda *_, **__: 1 / 0
        else:
            engine.mesh.send(b"!", block=ANSWERED, plan=turn, to=[1])
        try:
            engine(**inputs)
        except (AstraError, ZeroDivisionError) as error:
            failed.append(error)
        engine.rejoin()
    engine.mesh.close()
assert len(set(answers)) == 1, answers
with open(f"{__file__}.{engine.rank}", "w") as done:
    done.write(" ".join(type(error).__name__ for error in failed))
"""


@pytest.mark.faults
def test_under_torchrun(tmp_path: Path) -> None:
    """Whose agent keeps the store, with all that former groups have left in it."""
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN)
    port = free_ports(1)[0].rpartition(":")[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", port, str(script)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    written = [Path(f"{script}.{rank}").read_text() for rank in range(2)]
    assert written == ["PeerLost PeerLost", "ZeroDivisionError ZeroDivisionError"]


def test_a_group_of_somebody_else_is_not_made_again() -> None:
    meshes = MAKERS["gloo"](2)
    for mesh in meshes:
        with pytest.raises(AstraError, match=r"expected a process group that `connect` has made"):
            mesh.reconnect()
        mesh.close()


def test_who_is_missing_is_said() -> None:
    start = time.monotonic()
    with pytest.raises(ConnectFailed, match="rank 1 did not join the gloo group") as caught:
        connect(0, 2, free_ports(2), backend="gloo", connect_timeout=0.5)
    assert caught.value.missing == (1,)
    assert time.monotonic() - start < 30
    with pytest.raises(ConnectFailed, match="rank 1 could not join the gloo group"):
        connect(1, 2, free_ports(2), backend="gloo", connect_timeout=0.5)
