"""What a forked process does: a rank of a tiny encoder, and a fault at a known place.

An encoder, since every rank then waits for every other in every block.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from astra_runtime import AstraError, Codebook, Engine
from astra_runtime.control import is_control
from astra_runtime.transport import connect, fragments
from astra_runtime.transport.datagram import DatagramMesh
from astra_runtime.transport.tcp import TcpMesh
from astra_runtime.wire import Frame
from tests.runtime.models import inputs_for, tiny, windows_for

from .forks import Told

BLOCKS = 12
TOKENS = 48
JOINED, STRUCK, GIVEN_UP = range(3)  # where the processes of a case wait for one another


@functools.cache
def subject() -> tuple[Any, Codebook, dict[str, torch.Tensor]]:
    """Model, codebook and input, the same in every process: made before the server forks."""
    torch.set_num_threads(1)
    model = tiny("bert", num_hidden_layers=BLOCKS)
    options: dict[str, Any] = {"codewords": 32, "iterations": 2, "held_back": 0}
    book = Codebook.fit(model, windows_for("bert"), space="kv", groups=6, **options)
    inputs = inputs_for("bert", TOKENS)
    with torch.inference_mode():
        model(**inputs)
    return model, book, inputs


def prepare() -> None:
    subject()


SocketMesh = TcpMesh | DatagramMesh


class Moments:
    """When this rank last began to send or to wait, for which block, and when that ended.

    noticed: start and end of the first call after which somebody was known to be lost.
    """

    def __init__(self, mesh: SocketMesh) -> None:
        self.began = self.ended = time.monotonic()
        self.block = -1
        self.noticed: tuple[float, float] | None = None
        self._mesh = mesh
        for name in ("send", "receive"):
            setattr(mesh, name, self._watched(getattr(mesh, name)))

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, block: int, **options: Any) -> Any:
            self.began, self.block = time.monotonic(), block
            try:
                return call(*arguments, block=block, **options)
            finally:
                self.ended = time.monotonic()
                if self.noticed is None and self._mesh.lost:
                    self.noticed = self.began, self.ended

        return watched


def give_up(mesh: SocketMesh, told: Told, block: int, seconds: float) -> None:
    """Has the first wait for a block end after `seconds`, where nothing comes.

    They begin once the fault has happened and all others have sent: however slow this machine is,
    only the victim is late. `block`: after the last one comes the answer.
    """
    receive = mesh.receive

    def impatient(*arguments: Any, block: int, **options: Any) -> Any:
        if waits_there(block) and waits:
            waits.clear()
            told.meet(STRUCK)
            options["timeout"] = seconds
            try:
                return receive(*arguments, block=block, **options)
            finally:
                told.arrive(GIVEN_UP)
        return receive(*arguments, block=block, **options)

    waits_there, waits = is_control if block == BLOCKS else block.__eq__, [True]
    mesh.receive = impatient  # type: ignore[method-assign]


def arm(mesh: SocketMesh, told: Told, fault: dict[str, Any]) -> None:
    """Has `fault` happen once, around the sending of one block's frame."""
    send = mesh.send
    pending = [fault]

    def faulty(payload: Any, *, block: int, plan: int, to: Sequence[int], **options: Any) -> None:
        if block != fault["block"] or not pending:
            send(payload, block=block, plan=plan, to=to, **options)
            return
        pending.clear()
        if fault["moment"] == "after":
            send(payload, block=block, plan=plan, to=to, **options)
        elif fault["moment"] == "mid":
            _send_part(mesh, payload, block, plan, to, random.Random(fault["seed"]))
        _strike(told, fault)
        if fault["moment"] == "before":
            send(payload, block=block, plan=plan, to=to, **options)

    mesh.send = faulty  # type: ignore[method-assign]


def _send_part(
    mesh: SocketMesh, frame: Frame, block: int, plan: int, to: Sequence[int], draw: random.Random
) -> None:
    """To each receiver the beginning of its frame: what a rank that ends within a call has sent."""
    for number in to:
        if isinstance(mesh, DatagramMesh):
            way = mesh._peers[number]
            datagrams = way.outbox.frame(frame.payload, block, plan)
            assert len(datagrams) > 1, "a frame of one datagram has no middle"
            for datagram in datagrams[: draw.randrange(1, len(datagrams))]:
                way.transmit(datagram)
            continue
        peer = mesh._peers[number]
        data = b"".join(peer.stream.seal(frame.stamp(peer.num_sent, plan, block, mesh.rank)))
        peer.sock.send(data[: draw.randrange(1, len(data))])


def _strike(told: Told, fault: dict[str, Any]) -> None:
    if "relay" in fault:
        host, port = fault["relay"].split(":")
        with socket.create_connection((host, int(port))) as control:
            control.sendall(b"x")
            control.recv(1)
    told(struck=time.monotonic())
    told.arrive(STRUCK)
    if fault.get("late"):
        told.meet(GIVEN_UP)
    time.sleep(fault.get("sleep", 0.0))
    name = fault.get("signal")
    if name is not None:
        os.kill(os.getpid(), getattr(signal, name))


def _answer(engine: Engine, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    start = time.monotonic()
    answer = engine(**inputs).last_hidden_state
    return {
        "ms": 1e3 * (time.monotonic() - start),
        "digest": hashlib.sha256(answer.numpy().tobytes()).hexdigest(),
        "degraded": engine.degraded,
        "missing": engine.missing,
    }


def rank(
    told: Told,
    number: int,
    peers: list[str],
    *,
    keys: str | None = None,
    backend: Literal["tcp", "datagram"] = "tcp",
    fragment_size: int = fragments.FRAGMENT_SIZE,
    timeout: float = 20.0,
    fault: dict[str, Any] | None = None,
    patience: tuple[int, float] | None = None,
    calls: int = 1,
    ballast: int = 0,
    **engine_options: Any,
) -> None:
    """Joins, answers `calls` times, and tells how it ended.

    Told: `joined`; `struck`, when the fault happened; the `answers`, or `error` with its fields and
    `raised`; `began`, `ended` and `waited`, start, end and block of the last send or
    wait; `noticed`, see `Moments`, and the errors of the `lost` by rank.

    patience: of `give_up`.
    fragment_size: bytes in a datagram, so that a tiny model's frames have several.
    ballast: bytes of memory that this process holds, as one with a large model does.
    """
    model, book, inputs = subject()
    held = torch.ones(ballast, dtype=torch.uint8)
    moments = None
    fragments.FRAGMENT_SIZE = fragment_size  # in this process alone
    options: dict[str, Any] = {"keys": keys, "backend": backend, "timeout": timeout}
    try:
        with connect(number, len(peers), peers, **options) as mesh:
            assert isinstance(mesh, SocketMesh)
            with Engine(model, book, mesh, **engine_options) as engine:
                moments = Moments(mesh)
                told(joined=True)
                # one that still joins would hear of a loss there, and not wait for it
                told.meet(JOINED)
                if patience is not None:
                    give_up(mesh, told, *patience)
                if fault is not None:
                    arm(mesh, told, fault)
                told(answers=[_answer(engine, inputs) for _ in range(calls)])
                told(noticed=moments.noticed, lost=_named(mesh))
    except AstraError as error:
        raised = time.monotonic()
        told(error=type(error).__name__, text=str(error), raised=raised)
        told(**{name: getattr(error, name, None) for name in ("rank", "block", "seconds")})
        if moments is not None:
            told(began=moments.began, ended=moments.ended, waited=moments.block)
            told(noticed=moments.noticed)
    del held


def _named(mesh: SocketMesh) -> dict[int, str]:
    return {number: type(error).__name__ for number, error in mesh.lost.items()}
