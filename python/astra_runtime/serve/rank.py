"""A rank of a service that the leader has work: its rounds, and the reports of its tokens.

The leader's jobs are rounds that all ranks go through together. In a round a rank may read a whole
prompt by itself, a piece at a time; the ranks may read one together; and each rank decodes one
token of every answer that it owns. A rank's new tokens cross to the leader and to nobody else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..call import ending_together
from ..control import Control
from ..engine import Engine
from ..errors import AstraError, CallEnded, WireError
from ..trace import stage
from ..transport import Mesh
from ..transport.messages import receive_json, send_json
from .passes import Passes
from .patience import Patience, about_this_process
from .prompt import Move, Prompt
from .sequences import Sequences

log = logging.getLogger("astra_runtime.serve")

JOB = (Control.JOB_SIZE, Control.JOB)
ABOUT = (Control.SERVICE_SIZE, Control.SERVICE)
REPORT = (Control.TOKENS_SIZE, Control.TOKENS)
MAX_JOB = 16 << 20  # bytes of its JSON
MAX_REPORT = 16 << 20  # bytes of a rank's tokens of one round, with their alternatives


@contextmanager
def reporting(engine: Engine) -> Iterator[None]:
    """The part of a round that is no pass of all ranks: reports cross, in a call of their own."""
    engine.mesh.begin()
    with engine.calling(), ending_together(engine.mesh):
        yield


class _Interrupted(Exception):
    """A prompt that this rank reads is not wanted any more, and the next job is another round's."""


class Worker:
    """A rank other than 0: does what the leader's jobs say.

    Args:
        engine: of the same model, codebook and mesh as the leader's.
        idle: seconds to wait for a job.
    """

    def __init__(self, engine: Engine, idle: float) -> None:
        self.engine, self.mesh, self._idle = engine, engine.mesh, idle
        self.sequences = Sequences(engine)
        self.jobs = 0  # that were done
        self._next: dict[str, Any] | None = None  # received in the middle of a prompt
        self._problem: str | None = None  # not reported yet

    def follow(self) -> None:
        """Does jobs until one says stop."""
        while (job := self._next or self._receive())["do"] != "stop":
            self._next = None
            if job["do"] == "hello":
                self.mesh.more_time = Patience(self.mesh.timeout, {0: job["about"]})
                send_json(self.mesh, about_this_process(), blocks=ABOUT, to=(0,))
            elif job["do"] == "round":
                self.run(job)
            else:
                raise WireError("job", "hello, round or stop", job["do"], 0)
            self.jobs += 1

    def _receive(self) -> dict[str, Any]:
        options: dict[str, Any] = {"limit": MAX_JOB, "what": "job", "timeout": self._idle}
        return dict(receive_json(self.mesh, 0, blocks=JOB, **options))

    def run(self, job: dict[str, Any]) -> None:
        """A round, or several. Raises what ends the mesh; what ends a prompt alone is reported."""
        self.sequences.follow(job)
        if "encode" in job:
            self._encode(job)
            return
        self._problem = self._read_together(job) if job["prompt"] else self._move(job)
        lacks = bool(job["prompt"]) and self.engine.degraded
        with reporting(self.engine), suppress(_Interrupted):
            self._begin(job)
            if not job["prompt"]:
                self.sequences.run_round(job["long"], self._go_on)
            self._report(lacks)
            self.sequences.confirm()

    def _begin(self, job: dict[str, Any]) -> None:
        """What this rank reads by itself from this round on."""
        for prompt in job["alone"]:
            if self.mesh.rank in prompt["places"]:
                self.sequences.read_alone(Prompt(**prompt))

    def _go_on(self) -> None:
        """In the middle of a prompt that this rank reads: one round ends, the next begins."""
        self._report()
        self.sequences.confirm()
        job = self._receive()
        if job["do"] != "round" or "encode" in job or job["prompt"] or job["move"]:
            self._next = job
            raise _Interrupted
        self.jobs += 1
        self.sequences.follow(job)
        self.mesh.begin()
        self._begin(job)

    def _encode(self, job: dict[str, Any]) -> None:
        report = Passes(self.engine, job["pooling"]).run(job["encode"])
        with reporting(self.engine):
            send_json(self.mesh, report, blocks=REPORT, to=(0,))

    def _read_together(self, job: dict[str, Any]) -> str | None:
        """Why the ranks have not read the prompt; None: they have."""
        prompt = Prompt(**job["prompt"])

        def between(block: int) -> None:
            if block in pauses:
                self._pause()

        pauses = frozenset(job["pauses"])
        try:
            cache = self.sequences.read_together(prompt, between, beside=job["beside"])
        except (CallEnded, ValueError) as error:
            return str(error)
        if cache is not None:
            self.sequences.answer(prompt, cache)
        return None

    def _move(self, job: dict[str, Any]) -> str | None:
        """Why answers could not be moved; None: they were, or there are none to move."""
        try:
            if job["move"]:
                self.sequences.move(Move.from_json(job["move"]))
        except CallEnded as error:
            return str(error)
        return None

    def _pause(self) -> None:
        """In the middle of a prompt: a token of every answer, and all ranks go on together."""
        with stage("pause"):
            self.sequences.step()
            self._report()
            self.mesh.receive({0: 1}, block=Control.GO_ON, plan=0)
            self.sequences.confirm()

    def _report(self, lacks: bool = False) -> None:
        """`lacks`: of a prompt that all ranks have read, this one lacks tokens of a device."""
        report = self.sequences.report() | {"problem": self._problem, "degraded": lacks}
        self._problem = None
        send_json(self.mesh, report, blocks=REPORT, to=(0,))


def follow(engine: Engine, idle: float = 86_400.0, *, rejoin_seconds: float | None = None) -> int:
    """On a rank other than 0: does the leader's jobs until it says stop, and counts them.

    Args:
        engine: of the same model, codebook and mesh as the leader's.
        idle: seconds to wait for a job; a leader that is gone is noticed at once.
        rejoin_seconds: how long to try to form the mesh again when it has ended, as the leader
            does, before that raises; None: what ends the mesh is raised.
    """
    jobs = 0
    while True:
        try:
            return jobs + _follow_once(engine, idle)
        except AstraError as error:
            if rejoin_seconds is None:
                raise
            log.warning("rank %d: %s; it waits for the others again", engine.rank, error)
        engine.mesh.abort(AstraError("this rank forms the mesh again"))
        engine.rejoin(connect_timeout=rejoin_seconds)


def _follow_once(engine: Engine, idle: float) -> int:
    worker = Worker(engine, idle)
    worker.follow()
    return worker.jobs


def receive_report(mesh: Mesh, peer: int, seconds: float) -> dict[str, Any]:
    """What a rank reports within `seconds`."""
    options: dict[str, Any] = {"limit": MAX_REPORT, "what": "report", "timeout": seconds}
    return dict(receive_json(mesh, peer, blocks=REPORT, **options))
