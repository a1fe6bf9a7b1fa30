"""Rank 0 of a service that embeds texts or classifies images: one forward pass a request.

A short input is read by one rank, several at once by several; a long one by all ranks together,
where that was found to be faster. Inputs cross to the ranks that read them, and of the answers the
vectors alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..costs import EXACT_TOKENS
from ..engine import Engine
from ..errors import AstraError
from ..inputs import check_integer
from ..models import vocabulary_of
from ..models.families import ViT
from ..store import token_limit
from .checks import token_ids
from .costs import PromptCosts
from .images import Preparation
from .passes import Input, Passes, packed, unpacked
from .rank import reporting
from .rounds import IDLE_SECONDS, Rounds
from .service import (
    Embedding,
    Label,
    QueueFull,
    RequestRefused,
    ServiceFailed,
    Status,
)


@dataclass(eq=False)
class _Work:
    """One request: its inputs, the tokens of each, and where the answers go."""

    inputs: list[Input]
    tokens: list[int]
    future: Future[list[Tensor]] = field(default_factory=Future)


class Encoding(Rounds):
    """Answers requests for embeddings or classes; the other ranks run `follow`.

    Args:
        engine: rank 0's, of an encoder without a head or an image classifier.
        max_queue: requests that may wait.
        pooling: of a text's token states: "mean", or "cls", the first token's.
        prepare: makes an image ready for the model; None: by the model's own folder.
        options: those of `Rounds`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_queue: int = 64,
        pooling: str = "mean",
        prepare: Preparation | None = None,
        **options: Any,
    ) -> None:
        _check_head(engine)
        super().__init__(engine, **options)
        self.max_queue, self.pooling = max_queue, pooling
        if prepare is None and not engine.adapter.token_ids:
            prepare = Preparation.of(engine.model.config)
        self._prepare = prepare
        self.costs = PromptCosts(engine)
        self.context_length = token_limit(engine.model) or 1 << 30
        self._queue: deque[_Work] = deque()
        self._running: _Work | None = None
        self._turn = 0  # the rank that reads the next short text
        self._thread.start()

    # From any thread.

    def embed(self, texts: Sequence[Sequence[int]]) -> Future[list[Embedding]]:
        """Vectors of length 1 of token ids, class token and separator among them."""
        vocabulary = vocabulary_of(self.engine.model)
        texts = [token_ids("input", ids) for ids in texts]
        for ids in texts:
            if not 1 <= len(ids) <= self.context_length:
                code = "context_length_exceeded" if len(ids) else None
                raise RequestRefused(
                    "input",
                    f"expected 1 to {self.context_length} tokens a text, got {len(ids)}",
                    code,
                )
            if not all(0 <= id < vocabulary for id in ids):
                raise RequestRefused("input", f"expected token ids from 0 to {vocabulary - 1}")
        inputs = [{"input_ids": ids} for ids in texts]
        counts = [len(ids) for ids in texts]

        def embeddings(vectors: list[Tensor]) -> list[Embedding]:
            unit = [F.normalize(vector, dim=0).tolist() for vector in vectors]
            pairs = zip(unit, counts, strict=True)
            return [Embedding(vector, count) for vector, count in pairs]

        return _then(self._submit(inputs, counts), embeddings)

    def classify(self, images: Sequence[bytes], top: int = 5) -> Future[list[list[Label]]]:
        """The likeliest classes of encoded images, each most likely first."""
        assert self._prepare is not None, "a vision model"
        top = check_integer("top", top, 0)
        pixels = [self._prepare(image) for image in images]
        inputs = [{"pixel_values": packed(p), "shape": list(p.shape)} for p in pixels]
        config: Any = self.engine.model.config
        names: dict[int, str] = config.id2label

        def labels(vectors: list[Tensor]) -> list[list[Label]]:
            return [_top(vector, top, names) for vector in vectors]

        return _then(self._submit(inputs, [self._patches()] * len(inputs)), labels)

    def _patches(self) -> int:
        return cast(ViT, self.engine.adapter).num_patches

    def _submit(self, inputs: list[Input], tokens: list[int]) -> Future[list[Tensor]]:
        work = _Work(inputs, tokens)
        with self._changed:
            self.check_open()
            if len(self._queue) >= self.max_queue:
                raise QueueFull(len(self._queue), 1.0)
            self._queue.append(work)
            self._changed.notify_all()
        return work.future

    def status(self) -> Status:
        """Who is here and what is going on; waits for nothing."""
        with self._changed:
            running, reason = int(self._running is not None), self.reason
            return Status(
                not reason,
                reason,
                len(self._queue),
                running,
                self.max_queue,
                [
                    self.peer(rank, running, self.costs.tokens_per_s)
                    for rank in range(self.engine.mesh.world_size)
                ],
                self._counts["lost"],
                self._counts["rejoined"],
                self._counts["degraded"],
            )

    # The leader's thread.

    def _is_busy(self) -> bool:
        return bool(self._queue or self._running)

    def _begin_mesh(self) -> None:
        """Nothing is kept of earlier rounds."""

    def _end_running(self, error: AstraError) -> None:
        with self._changed:
            work, self._running = self._running, None
        if work is not None:
            _fail(work, error)

    def _end_all(self, error: AstraError) -> None:
        self._end_running(error)
        with self._changed:
            waiting, self._queue = self._queue, deque()
        for work in waiting:
            _fail(work, error)

    def _beat(self) -> None:
        self._round([])

    def _next_round(self) -> None:
        with self._changed:
            if not self._queue and not self._ended:
                self._changed.wait(IDLE_SECONDS)
            work = self._queue.popleft() if self._queue else None
            if work is not None and not work.future.set_running_or_notify_cancel():
                work = None
            self._running = work
        if work is None:
            self._watch()
            return
        vectors: list[Tensor] = []
        problem: ServiceFailed | None = None
        while len(vectors) < len(work.inputs) and problem is None:
            batch = self._batch(work, len(vectors))
            try:
                vectors += self._round(batch)
            except ServiceFailed as error:  # of this request alone
                problem = error
        with self._changed:
            self._running = None
            self._changed.notify_all()
        if problem is None:
            work.future.set_result(vectors)
        else:
            _fail(work, problem)

    def _batch(self, work: _Work, place: int) -> list[Input]:
        """The inputs of the next round, from `place` on: one for all ranks, or one a rank."""
        batch: list[Input] = []
        size = self.engine.mesh.world_size
        for index in range(place, min(place + size, len(work.inputs))):
            known = self.costs.token is not None
            together = work.tokens[index] > EXACT_TOKENS and known
            if together and self.costs.together_is_faster(work.tokens[index]):
                return batch or [work.inputs[index] | {"owner": None}]
            owner = 0 if "pixel_values" in work.inputs[index] else (self._turn + len(batch)) % size
            batch.append(work.inputs[index] | {"owner": owner})
            if "pixel_values" in work.inputs[index]:
                break  # images cross to nobody for a pass of one rank
        self._turn = (self._turn + len(batch)) % size
        return batch

    def _round(self, batch: list[Input]) -> list[Tensor]:
        """One round; the pooled vector, or the logits, of each input."""
        far = [one if one["owner"] != 0 else {"owner": 0} for one in batch]
        self._send_job(
            do="round", drop=[], keep=[], grow=[], forget=[], prompt=None, pauses=[], alone=[],
            encode=far, pooling=self.pooling,
        )  # fmt: skip
        start = time.perf_counter()
        own = Passes(self.engine, self.pooling).run(batch)
        with reporting(self.engine):
            reports = [own, *self._reports()]
        self._beaten = time.monotonic()
        for rank, report in enumerate(reports):
            self._note(rank, report)
        if batch and batch[0]["owner"] is None:
            self.costs.record_together(self._count(batch[0]), time.perf_counter() - start)
        for report in reports:
            if report["problem"]:
                raise ServiceFailed(report["problem"])
            for index, seconds in report["seconds"]:
                self.costs.record_alone(self._count(batch[index]), seconds)
        return [_joined(reports, index) for index in range(len(batch))]

    def _count(self, one: Input) -> int:
        return len(one["input_ids"]) if "input_ids" in one else self._patches()


def _check_head(engine: Engine) -> None:
    """Refuses models whose answers are neither vectors of tokens nor classes of an image."""
    model: Any = engine.model
    if engine.adapter.token_ids:
        fits = engine.adapter.base is model and not engine.adapter.causal
    else:
        fits = hasattr(model, "classifier")
    if not fits:
        raise ValueError(
            "engine: expected an encoder without a head, or an image classifier, got "
            f"{type(model).__name__}"
        )


def _joined(reports: Sequence[dict[str, Any]], index: int) -> Tensor:
    """The mean of an input's token states, from the parts of all ranks."""
    parts = [part for report in reports for part in report["parts"] if part[0] == index]
    if not parts:
        raise ServiceFailed("no rank has read the input")
    total = torch.stack([unpacked(part[1]) for part in parts]).sum(0)
    weight = sum(part[2] for part in parts)
    firsts = [unpacked(part[3]) for part in parts if part[3] is not None]
    if firsts:  # copies of one token: their mean counts once
        total, weight = total + torch.stack(firsts).mean(0), weight + 1
    return total / weight


def _top(logits: Tensor, count: int, names: dict[int, str]) -> list[Label]:
    scores, ids = logits.softmax(-1).topk(min(count, len(logits)))
    pairs = zip(ids.tolist(), scores.tolist(), strict=True)
    return [Label(id, str(names.get(id, id)), score) for id, score in pairs]


def _then(future: Future[Any], change: Callable[[Any], Any]) -> Future[Any]:
    """A future of what `change` makes of another's result; to cancel it cancels the other."""
    changed: Future[Any] = Future()

    def pass_on(done: Future[Any]) -> None:
        if done.cancelled() or not changed.set_running_or_notify_cancel():
            return
        try:
            changed.set_result(change(done.result()))
        except Exception as error:
            changed.set_exception(error)

    changed.add_done_callback(lambda own: future.cancel() if own.cancelled() else None)
    future.add_done_callback(pass_on)
    return changed


def _fail(work: _Work, error: AstraError) -> None:
    if work.future.running() or work.future.set_running_or_notify_cancel():
        work.future.set_exception(error)
