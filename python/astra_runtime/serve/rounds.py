"""What every leader does, whatever is asked of it: rounds over a mesh that may end and form again.

A killed rank is noticed within `IDLE_SECONDS` although nothing is going on, a stopped one by the
beat, a round without work, or by the round that runs: silence is measured from the moment at which
the ranks were told to go on, whatever the leader has done meanwhile. A process of this machine that
computes, only slowly, gets more time (`patience`). Then everything that runs has failed, what waits
goes on waiting, and the ranks connect again; the model stays loaded.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Self

from ..cores import return_free_memory
from ..engine import Engine
from ..errors import AstraError
from ..transport import Mesh, peers_of
from ..transport.messages import LEAST_REST, receive_json, send_json
from .activity import Activity
from .patience import Patience, about_this_process
from .rank import ABOUT, JOB, receive_report
from .service import CLOSING, STARTING, NotReady, Peer, ServiceFailed

log = logging.getLogger("astra_runtime.serve")

IDLE_SECONDS = 0.1  # between looks at who is there, without work
BEAT_SECONDS = 1.0  # between rounds without work
MAX_ABOUT = 1 << 16  # bytes of what a worker says of itself
LEAST_PATIENCE = 0.5  # of a mesh's timeout
START_SECONDS = 60.0  # for the workers to begin
RETRY_SECONDS = 0.5  # between tries to form the mesh again
TIDY_SECONDS = 2.0  # without work, until memory that was freed goes back to the system


class Rounds(ABC):
    """Rank 0's thread, which has all ranks work in rounds; the other ranks run `follow`.

    Args:
        engine: rank 0's. It and its mesh belong to the caller, who closes them after this.
        rejoin_seconds: how long one try to form the mesh again may take.
        beat_seconds: between rounds without work.
        announce: called with a new mesh before the engine uses it, for workers that make their
            engines upon a job.
        on_away: called with the error that ended the mesh, or a try to form it, before the next
            try: the place to start processes anew.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        rejoin_seconds: float = 30.0,
        beat_seconds: float = BEAT_SECONDS,
        announce: Callable[[Mesh], None] = lambda mesh: None,
        on_away: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        if engine.rank != 0:
            raise ValueError(f"engine: expected that of rank 0, got rank {engine.rank}")
        self.engine = engine
        self._rejoin_seconds, self._beat_seconds = rejoin_seconds, beat_seconds
        self._announce, self._on_away = announce, on_away
        self._changed = threading.Condition()
        self._reason = STARTING
        self._closing = self._ended = self._idle = False
        self._about: dict[int, dict[str, Any]] = {}
        self._counts: Counter[str] = Counter()
        self._beaten = self._job_sent = self._worked = 0.0
        self._tidy = True  # nothing was freed since memory was given back
        self._activity = Activity(engine.mesh.world_size)
        self._thread = threading.Thread(target=self._serve, name="astra-leader", daemon=True)

    # What a kind of service says of itself; the lock is held where nothing else is said.

    @abstractmethod
    def _next_round(self) -> None:
        """One round, or a wait for work; without the lock."""

    @abstractmethod
    def _beat(self) -> None:
        """A round without work, which every rank answers; without the lock."""

    @abstractmethod
    def _is_busy(self) -> bool:
        """Whether a request waits or is worked on."""

    @abstractmethod
    def _end_running(self, error: AstraError) -> None:
        """Fails all that is worked on; without the lock."""

    @abstractmethod
    def _end_all(self, error: AstraError) -> None:
        """Fails what waits, too; without the lock."""

    @abstractmethod
    def _begin_mesh(self) -> None:
        """All ranks are there, for the first time or again: nothing is known of earlier rounds."""

    # For everybody.

    def wait_ready(self, seconds: float) -> bool:
        """Whether requests are answered, by then at the latest."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._reason or self._ended, seconds)

    def close(self, drain_s: float = 0.0) -> None:
        """Takes no request any more, lets those that it has end for so long, and ends the rest.

        The engine and its mesh stay open; the workers' `follow` returns.
        """
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: self._ended or not self._is_busy(), drain_s)
            self._ended = True
            self._changed.notify_all()
        self.engine.cancel()
        self._thread.join()

    def check_open(self) -> None:
        """Raises NotReady where no request can be taken; with the lock."""
        if self._closing or self._ended:
            raise NotReady(CLOSING)
        if reason := self.reason:
            raise NotReady(reason)

    @property
    def reason(self) -> str:
        """Why nothing is answered at the moment; "": it is.

        A connection that has ended is seen here before the leader's thread comes to it.
        """
        if self._closing or self._reason:
            return CLOSING if self._closing else self._reason
        gone = self.engine.mesh.disconnected()
        ranks = ", ".join(f"rank {rank}" for rank in gone)
        return f"waiting for all devices: {ranks} closed the connection" if gone else ""

    def peer(self, rank: int, running: int, tokens_per_s: float | None) -> Peer:
        mesh = self.engine.mesh
        stats = mesh.stats if rank == 0 else mesh.peer_stats.get(rank)
        options, about = mesh.options, self._about.get(rank, {})
        activity, trip = self._activity, self._activity.round_trip(rank)
        sent, received = activity.bytes_per_s(rank) or (None, None)
        away = rank != 0 and (self._reason or rank in mesh.disconnected())
        return Peer(
            rank,
            options.peers[rank] if options is not None and options.peers else "this process",
            "away" if away else "here",
            running,
            0 if stats is None else stats.bytes_sent_total,
            0 if stats is None else stats.bytes_received_total,
            tokens_per_s,
            activity.tokens_per_s(rank),
            about.get("pid"),
            activity.busy(rank),
            sent,
            received,
            None if trip is None else 1e3 * trip,
        )

    # The thread.

    def _serve(self) -> None:
        formed = True
        while not self._ended:
            try:
                if not formed:
                    self._form()
                formed = True
                self._greet()
                while not self._ended:
                    self._next_round()
            except Exception as error:
                formed = False
                if self.engine.closed:
                    self._end_without_engine()
                else:
                    self._away(error)
        with suppress(AstraError):
            self._send_job(do="stop")
        self._end_all(NotReady(CLOSING))

    def _end_without_engine(self) -> None:
        """Who made the engine has closed it, and no other try would find it open."""
        log.warning("the engine was closed, so the service ends")
        with self._changed:
            self._closing = self._ended = True
            self._changed.notify_all()
        self._end_running(ServiceFailed("the answer could not be finished: the engine was closed"))

    def _send_job(self, **job: Any) -> None:
        send_json(self.engine.mesh, job, blocks=JOB, to=peers_of(self.engine.mesh))
        self._job_sent = time.monotonic()
        if not self._idle:
            self._worked, self._tidy = self._job_sent, False

    def _reports(self) -> Iterator[dict[str, Any]]:
        """What the other ranks report of a round, or of its part up to a pause, by rank.

        They have as long as the mesh waits, from when they were told to begin; where this rank has
        taken most of that itself, `LEAST_PATIENCE` of it from now on. All of them together.
        """
        mesh = self.engine.mesh
        now = time.monotonic()
        until = max(self._job_sent + mesh.timeout, now + LEAST_PATIENCE * mesh.timeout)
        for rank in range(1, mesh.world_size):
            yield receive_report(mesh, rank, max(LEAST_REST, until - time.monotonic()))
            if self._idle:
                self._activity.answered(rank, time.monotonic() - self._job_sent)

    def _note(self, rank: int, report: dict[str, Any], tokens: int = 0) -> None:
        """What a report says of the rank's work, and the mesh of its link."""
        mesh = self.engine.mesh
        stats = mesh.stats if rank == 0 else mesh.peer_stats[rank]
        self._activity.record(rank, report["busy"], tokens, stats)

    def _greet(self) -> None:
        """Hears of every worker what it has, and is ready from then on."""
        mesh = self.engine.mesh
        about = {0: about_this_process()}
        self._send_job(do="hello", about=about[0])
        for rank in range(1, mesh.world_size):
            about[rank] = receive_json(
                mesh, rank, blocks=ABOUT, limit=MAX_ABOUT, what="description of a worker"
            )
        mesh.more_time = Patience(mesh.timeout, about)
        with self._changed:
            self._about = about
            self._activity = Activity(mesh.world_size)
            self._begin_mesh()
            self._reason = ""
            self._changed.notify_all()
        self._tidy_up()  # after the mesh before this one

    def _form(self) -> None:
        """Connects the ranks again."""
        mesh = self.engine.mesh.reconnect(self._rejoin_seconds, check=self._check_not_ended)
        self._announce(mesh)
        self.engine.rejoin(mesh)
        self._counts["rejoined"] += 1
        log.warning("all %d ranks are here again", mesh.world_size)

    def _check_not_ended(self) -> None:
        if self._ended:
            raise NotReady(CLOSING)

    def _away(self, error: Exception) -> None:
        """The mesh has ended, or could not be formed again."""
        first = not self._reason
        text = str(error) if isinstance(error, AstraError) else f"{type(error).__name__}: {error}"
        if not isinstance(error, AstraError):
            log.error("the service met an unexpected error", exc_info=error)
        with self._changed:
            self._reason = f"waiting for all devices: {text}"
            self._counts["lost"] += first
        if first:
            log.warning("the mesh has ended: %s", text)
        self.engine.mesh.abort(error)
        self._end_running(ServiceFailed(f"the answer could not be finished: {text}"))
        if self._ended:
            return
        try:
            self._on_away(error)
        except Exception as problem:  # no process can be started, say: the next try may do better
            log.error("nothing could be started anew: %s", problem)
        if not first:
            with self._changed:
                self._changed.wait_for(lambda: self._ended, RETRY_SECONDS)

    def _watch(self) -> None:
        """Without work: a round where somebody seems to be gone, and one in a while anyway."""
        mesh = self.engine.mesh
        if not self._tidy and time.monotonic() - self._worked > TIDY_SECONDS:
            self._tidy_up()
        lost = set(range(mesh.world_size)) - set(mesh.alive())
        if lost or time.monotonic() - self._beaten > self._beat_seconds:
            self._idle = True
            try:
                self._beat()
            finally:
                self._idle = False

    def _tidy_up(self) -> None:
        """What answers have taken and freed goes back to the system: milliseconds."""
        self._tidy = True
        return_free_memory()

    def __enter__(self) -> Self:
        """Waits until all ranks are there. Raises NotReady where they are not within a minute."""
        if not self.wait_ready(START_SECONDS):
            self.close()
            raise NotReady(f"not all ranks were there within {START_SECONDS:g} s")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
