"""A `Service` that loads in the background, and answers asyncio hosts from the leader's thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import AstraError, anew
from .service import (
    CLOSING,
    STARTING,
    Embedding,
    Event,
    GenerationRequest,
    Label,
    NotReady,
    Peer,
    RequestRefused,
    Status,
)

POLL_SECONDS = 0.05  # between looks at whether a service that is to be closed has started

log = logging.getLogger("astra_runtime.serve")

Kind = Literal["decoder", "encoder", "vision"]


@dataclass(frozen=True, eq=False)
class Started:
    """What a service has when it has loaded.

    Attributes:
        leader: its rounds.
        tokenizer: the model's.
        close: gives back what was opened for the leader, after it was closed; in the thread that
            has started the service.
    """

    leader: Any
    tokenizer: Any
    close: Callable[[], None]


class RunningService:
    """One model on one mesh, asked from an event loop; see `Service`.

    Args:
        model_id, kind, context_length: known before anything is loaded; the length that the model
            turns out to have takes the place of the one that was given.
        start: loads model and mesh, in a thread of its own; is given a function that takes what it
            does, in a few words, for those who ask meanwhile. It raises AstraError where `closing`
            is set.
        addresses: of the ranks, for `status` before there is a mesh.

    Attributes:
        closing: set when the service is being closed.
        failed: why it could not be started; None: it could, or is being started.
    """

    def __init__(
        self,
        model_id: str,
        kind: Kind,
        context_length: int,
        start: Callable[[RunningService], Started],
        addresses: Sequence[str] = (),
    ) -> None:
        self.model_id, self.kind, self._context_length = model_id, kind, context_length
        self.closing = threading.Event()
        self.failed: Exception | None = None
        self._addresses = addresses
        self._doing = STARTING
        self._started: Started | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._start, args=(start,), name="astra-start")
        self._thread.start()

    def say(self, doing: str) -> None:
        """What is being done until requests are answered."""
        self._doing = doing

    @property
    def tokenizer(self) -> Any:
        return None if self._started is None else self._started.tokenizer

    @property
    def context_length(self) -> int:
        if self._started is None:
            return self._context_length
        return int(self._started.leader.context_length)

    def _start(self, start: Callable[[RunningService], Started]) -> None:
        try:
            self._started = start(self)
            # Processes that this thread has started end with it: the kernel sees to that, for
            # whatever way the leader's process may end.
            self._over.wait()
            with contextlib.suppress(AstraError):
                self._started.close()
        except Exception as error:
            self.failed = error
            self._doing = f"the service could not be started: {error}"
            if not (self.closing.is_set() and _expected(error)):
                log.error("%s", self._doing, exc_info=None if _expected(error) else error)

    def _leader(self) -> Any:
        if self.closing.is_set():
            raise NotReady(CLOSING)
        if self._started is None:
            raise NotReady(self._doing)
        return self._started.leader

    def status(self) -> Status:
        """Who is here and what is going on; waits for nothing."""
        if self._started is None:
            peers = [Peer(n, address, "loading") for n, address in enumerate(self._addresses)]
            reason = CLOSING if self.closing.is_set() else self._doing
            return Status(False, reason, peers=peers)
        status: Status = self._started.leader.status()
        if self.closing.is_set():
            return replace(status, ready=False, reason=CLOSING)
        return status

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """The answer, token by token; see `Service.generate`."""
        if self.kind != "decoder":
            raise RequestRefused("model", f"{self.model_id} does not generate text")
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | AstraError | None] = asyncio.Queue()

        def deliver(event: Event | AstraError | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        leader = self._leader()
        ticket = leader.submit(request, deliver)
        try:
            while (event := await events.get()) is not None:
                if isinstance(event, AstraError):
                    raise anew(event)
                yield event
        finally:
            ticket.cancel()

    async def embed(self, texts: Sequence[Sequence[int]]) -> list[Embedding]:
        """The embeddings of token ids."""
        if self.kind != "encoder":
            raise RequestRefused("model", f"{self.model_id} does not embed text")
        return await self._answer(lambda leader: leader.embed(texts))

    async def classify(self, images: Sequence[bytes], top: int = 5) -> list[list[Label]]:
        """The likeliest classes of encoded images."""
        if self.kind != "vision":
            raise RequestRefused("model", f"{self.model_id} does not classify images")
        return await self._answer(lambda leader: leader.classify(images, top))

    async def _answer(self, submit: Callable[[Any], Any]) -> Any:
        """The result of a request that has one, a concurrent future; to cancel it cancels that."""
        # decoding images would hold up everybody else in the event loop
        return await asyncio.wrap_future(await asyncio.to_thread(submit, self._leader()))

    def loading_ends(self, seconds: float) -> bool:
        """Tells what loads the service to end; whether it has, or had before, by then.

        Nothing ends the loading of weights or a fit before its time. Who does not want to wait for
        it ends the process.
        """
        self.closing.set()
        deadline = time.monotonic() + seconds
        while self._started is None and self._thread.is_alive():
            if time.monotonic() >= deadline:
                return False
            self._thread.join(POLL_SECONDS)
        return True

    def close(self, drain_s: float = 0.0) -> None:
        """Takes no further request, lets those that run end for so long, and ends the rest."""
        self.loading_ends(math.inf)
        if self._started is not None:
            self._started.leader.close(drain_s)
        self._over.set()
        self._thread.join()


def _expected(error: Exception) -> bool:
    return isinstance(error, AstraError | ValueError | OSError)
