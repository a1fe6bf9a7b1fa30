"""A service whose answers a test writes, a tokenizer of bytes, and a server in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from astra_runtime.serve.http import HttpOptions, make_app, run_server
from astra_runtime.serve.service import (
    Done,
    Embedding,
    Event,
    GenerationRequest,
    Label,
    Peer,
    Span,
    Status,
    Token,
)

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@functools.cache
def byte_tokenizer(template: str | None = TEMPLATE) -> Any:
    """A token for each byte, <|start|> and <|end|>, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.chat_template = template
    return tokenizer


class FakeService:
    """Answers with `text`, a token a byte; tests change the attributes.

    Attributes:
        text: the answer; `endless`: again and again, until it is cancelled.
        error: raised in place of token number `error_at`.
        asked: the requests so far.
        cancelled: set when an answer was closed before its end.
        gate: where it is set, each answer waits for it before its first token.
    """

    def __init__(self, kind: str = "decoder") -> None:
        self.kind, self.model_id, self.context_length = kind, "tiny", 512
        self.tokenizer: Any = byte_tokenizer()
        self.text, self.endless = "Grüße, 世界!", False
        self.error: Exception | None = None
        self.error_at = 0
        self.asked: list[GenerationRequest] = []
        self.cancelled = threading.Event()
        self.gate: threading.Event | None = None
        self.state = Status(
            True,
            "",
            queued=1,
            running=2,
            max_queue=8,
            peers=(
                Peer(
                    0,
                    "127.0.0.1:7000",
                    "here",
                    1,
                    5_000,
                    7_000,
                    400.0,
                    12.5,
                    busy=0.43,
                    bytes_sent_per_s=125_000.0,
                    bytes_received_per_s=0.0,
                    rtt_ms=2.5,
                ),
                Peer(1, "127.0.0.1:7001", "away", 0, 5_000, 7_000),
            ),
            timeline=(Span(0, "compute", 0.0, 0.5), Span(1, "wait", 0.25, 0.75)),
        )

    def status(self) -> Status:
        return self.state

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        self.asked.append(request)
        whole = False
        try:
            while self.gate is not None and not self.gate.is_set():
                await asyncio.sleep(0.005)
            for index in range(request.n):
                async for event in self._answer(index, request):
                    yield event
            whole = True
        finally:
            if not whole:
                self.cancelled.set()

    async def _answer(self, index: int, request: GenerationRequest) -> AsyncIterator[Event]:
        ids = self.tokenizer(self.text)["input_ids"]
        most = request.max_new_tokens or self.context_length
        count, held = 0, b""
        while count < most and (self.endless or count < len(ids)):
            if self.error is not None and count == self.error_at:
                raise self.error
            token = ids[count % len(ids)]
            held += self.text.encode()[count % len(ids) :][:1]
            piece, held = _whole_characters(held)
            count += 1
            top = () if request.top_logprobs is None else ((token, -0.5), (token - 1, -1.5))
            logprob = None if request.top_logprobs is None else -0.5
            yield Token(index, token, piece, logprob, top)
            await asyncio.sleep(0.002 if self.endless else 0)
        reason = "length" if count == most else "stop"
        prompt = len(request.prompt_ids)
        timeline = self.state.timeline if request.trace else ()
        yield Done(
            index, reason, held.decode(errors="replace"), prompt, count, cached_tokens=prompt // 2,
            coded_tokens=prompt // 4, rank=index, timeline=timeline,
        )  # fmt: skip

    async def embed(self, texts: Sequence[Sequence[int]]) -> list[Embedding]:
        return [Embedding([0.6, -0.8, float(len(ids))], len(ids)) for ids in texts]

    async def classify(self, images: Sequence[bytes], top: int = 5) -> list[list[Label]]:
        return [[Label(i, f"class {i}", 1 / (i + 1)) for i in range(top)] for _ in images]

    def close(self, drain_s: float = 0.0) -> None:
        pass


def _whole_characters(data: bytes) -> tuple[str, bytes]:
    try:
        return data.decode(), b""
    except UnicodeDecodeError:
        return "", data


@contextlib.contextmanager
def serving(service: Any, options: HttpOptions | None = None, **settings: Any) -> Iterator[str]:
    """The URL of a server that runs in a thread meanwhile."""
    app = make_app(service, options)
    listening, urls = threading.Event(), []

    def told(url: str) -> None:
        urls.append(url)
        listening.set()

    settings = {"drain_s": 0.2, "port": 0, "on_listening": told} | settings
    thread = threading.Thread(target=run_server, args=(app,), kwargs=settings, daemon=True)
    thread.start()
    try:
        assert listening.wait(60)
        yield urls[0]
    finally:
        app.state.stop()
        thread.join(60)
        assert not thread.is_alive()
