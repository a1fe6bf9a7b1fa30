"""`/v1/chat/completions` and `/v1/completions`: a request's way through the service."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..service import Done, GenerationRequest, Sampling, Token
from .answers import ChatShape, Choice, Shape, TextShape
from .chat import TokenNames, check_ids, encode_chat, encode_text, read_messages
from .connection import EventStream, merged, while_connected
from .errors import expected, too_long
from .front import record_of
from .schemas import CHAT, COMPLETIONS, TextOptions, text_options
from .server_state import ServerState


async def chat(request: Request) -> Response | EventStream:
    """`/v1/chat/completions`."""
    state = ServerState.of(request)
    values = await state.read(request, CHAT, "decoder")
    options = text_options(values, state.options.max_choices)
    messages = read_messages(values["messages"])
    state.check_ready()
    ids = await state.in_thread(encode_chat, state.service.tokenizer, messages)
    return await _answer(request, state, values, options, [ids], "messages", ChatShape)


async def completions(request: Request) -> Response | EventStream:
    """`/v1/completions`; the prompts of a list are answered side by side."""
    state = ServerState.of(request)
    values = await state.read(request, COMPLETIONS, "decoder")
    options = text_options(values, state.options.max_choices)
    prompts = values["prompt"]
    if len(prompts) * options.n > state.options.max_choices:
        wanted = f"at most {state.options.max_choices} answers, prompts times n"
        raise expected("prompt", wanted, len(prompts) * options.n)
    state.check_ready()
    ids = [
        await state.in_thread(encode_text, state.service.tokenizer, prompt, "prompt")
        for prompt in prompts
    ]
    return await _answer(request, state, values, options, ids, "prompt", TextShape)


async def _answer(
    request: Request,
    state: ServerState,
    values: dict[str, Any],
    options: TextOptions,
    prompts: Sequence[list[int]],
    param: str,
    shape: type[Shape],
) -> Response | EventStream:
    record = record_of(request.scope)
    record.stream = options.stream
    asked = [
        _request(f"{record.request}-{number}", state, values, options, ids, param, shape)
        for number, ids in enumerate(prompts)
    ]
    names = None if options.logprobs is None else TokenNames(state.service.tokenizer)
    number = record.request.removeprefix("req-")
    form = shape(state.service.model_id, number, names, options.logprobs)
    answers = Answers(state, asked, form, record)
    if options.stream:
        chunks = answers.chunks(options.include_usage)
        return EventStream(chunks, request.receive, state.ending, record, state.options.heartbeat_s)
    whole = await while_connected(request.receive, state.ending, answers.whole())
    return JSONResponse(whole)


def _request(
    name: str,
    state: ServerState,
    values: dict[str, Any],
    options: TextOptions,
    ids: list[int],
    param: str,
    shape: type[Shape],
) -> GenerationRequest:
    """What the service is asked; refuses what does not fit into the model's context."""
    limit, most = state.service.context_length, state.options.max_new_tokens
    if len(ids) + (options.max_tokens or 1) > limit:
        raise too_long(param, len(ids), options.max_tokens or 0, limit)
    if most is not None and (options.max_tokens or 0) > most:
        name = next(k for k in ("max_completion_tokens", "max_tokens") if k in values)
        raise expected(name, f"at most {most}, this server's limit", options.max_tokens)
    tokens = options.max_tokens or _default_tokens(limit - len(ids), most, shape.default_tokens)
    bias = values.get("logit_bias", {})
    check_ids(state.service.tokenizer, list(bias), "logit_bias")
    top_k = values.get("top_k", 0)
    return GenerationRequest(
        id=name,
        prompt_ids=ids,
        max_new_tokens=tokens,
        sampling=Sampling(
            temperature=values.get("temperature", 1.0),
            top_p=values.get("top_p", 1.0),
            top_k=top_k if top_k > 0 else None,
            seed=values.get("seed"),
            presence_penalty=values.get("presence_penalty", 0.0),
            frequency_penalty=values.get("frequency_penalty", 0.0),
            logit_bias=bias,
        ),
        stop=options.stop,
        n=options.n,
        top_logprobs=options.logprobs,
        within_s=state.options.request_timeout_s,
        fresh=not options.cached,
        degrade=state.options.degrade,
        trace=state.options.trace_folder is not None,
    )


def _default_tokens(room: int, *bounds: int | None) -> int | None:
    """Of an answer whose request names no length; None: as many as fit."""
    given = [bound for bound in bounds if bound is not None]
    return min(room, *given) if given else None


class Answers:
    """The answers to one HTTP request, as they come from the service."""

    def __init__(
        self, state: ServerState, asked: Sequence[GenerationRequest], shape: Shape, record: Any
    ) -> None:
        self.state, self.asked, self.shape, self.record = state, asked, shape, record
        self.choices = [Choice(i) for i in range(sum(each.n for each in asked))]
        # the figures of each prompt's last answer
        self.prompts: dict[int, Done] = {}

    async def whole(self) -> dict[str, Any]:
        async with contextlib.aclosing(self._events()) as events:
            async for _ in events:
                pass
        return self.shape.answer(self.choices, [*self.prompts.values()])

    async def chunks(self, include_usage: bool) -> AsyncGenerator[dict[str, Any]]:
        """Chunks for a stream; with usage each has the key, null but in the last."""
        more = {"usage": None} if include_usage else {}
        opened: set[int] = set()
        async with contextlib.aclosing(self._events()) as events:
            async for choice, event in events:
                if choice.index not in opened:
                    opened.add(choice.index)
                    opening = self.shape.opening(choice.index)
                    if opening is not None:
                        yield opening | more
                tokens = [event] if isinstance(event, Token) else []
                if event.text or (tokens and self.shape.names is not None):
                    yield self.shape.piece(choice, event.text, tokens) | more
                if isinstance(event, Done):
                    yield self.shape.closing(choice) | more
        if include_usage:
            yield self.shape.last(self.choices, [*self.prompts.values()])

    async def _events(self) -> AsyncGenerator[tuple[Choice, Token | Done]]:
        """The events of all prompts, as they come; what they say is kept and counted."""
        # every prompt has as many answers
        each = self.asked[0].n
        streams = [self.state.generate(asked) for asked in self.asked]
        async with contextlib.aclosing(merged(streams)) as events:
            async for number, event in events:
                choice = self.choices[number * each + event.index]
                choice.add(event.text)
                if isinstance(event, Token):
                    self._count_token(choice, event)
                else:
                    self._count_done(choice, event, number)
                yield choice, event
        for number, done in self.prompts.items():
            name = self.record.request if len(self.asked) == 1 else self.asked[number].id
            await self.state.write_trace(name, done.timeline)

    def _count_token(self, choice: Choice, event: Token) -> None:
        now, metrics = time.monotonic(), self.state.metrics
        if self.record.seconds_to_first_token is None:
            first = now - self.record.begun
            metrics.first.observe(first)
            self.record.seconds_to_first_token = round(first, 4)
        if choice.last_token is not None:
            metrics.each.observe(now - choice.last_token)
        choice.last_token = now
        if self.shape.names is not None:
            choice.tokens.append(event)

    def _count_done(self, choice: Choice, event: Done, number: int) -> None:
        choice.done = event
        self.record.take(event)
        self.state.metrics.count_answer(event)
        if number not in self.prompts:
            self.state.metrics.count_prompt(event)
        self.prompts[number] = event
