"""`astra chat`: a conversation, each turn of which costs its own tokens alone."""

from __future__ import annotations

import argparse
import io
import sys
import threading
from collections.abc import Iterator
from typing import Any

from ..console import say, show_json, working
from ..errors import AstraError
from .leading import LedRanks, start, started_early
from .options import (
    add_fit_options,
    add_leader,
    add_mesh_options,
    add_missing,
    add_model,
    add_ranks,
    check_text,
    positive,
)
from .streaming import Streaming, add_sampling, sampling_of


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  astra chat --world-size 2\n"
        '  echo "What is the capital of France?" | astra chat --world-size 2 --json\n'
        "A line is a question; /clear begins anew, and an empty line or Ctrl-D ends."
    )
    add_model(parser)
    add_fit_options(parser)
    add_ranks(parser, "processes on this machine (default: 1)")
    add_mesh_options(parser)
    add_missing(parser)
    add_leader(parser)
    parser.add_argument("--system", help="what the model is told before the first question")
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=512,
        metavar="N",
        help="of an answer (default: 512)",
    )
    add_sampling(parser)


class _Chat:
    """What `start` knows of the service that is being started: it says what it does."""

    def __init__(self) -> None:
        self.kind = "decoder"
        self.closing = threading.Event()

    def say(self, doing: str) -> None:
        say(doing)


def run(options: argparse.Namespace) -> int:
    if sys.stdin is None:
        raise AstraError("chat: expected questions from standard input, which is closed")
    sampling = sampling_of(options)
    check_text("--system", options.system or "")
    led = LedRanks.of(options)
    turns: list[dict[str, Any]] = []
    with started_early(options, led) as others:
        started = start(options, led, _Chat(), others)
        try:
            if not getattr(started.tokenizer, "chat_template", None):
                raise AstraError(f"model {options.model!r}: expected a chat template, it has none")
            try:
                refused = _talk(options, started, sampling, turns)
            finally:  # what was answered is shown, whatever ends the conversation
                if options.json:
                    show_json({"world_size": len(led.addresses), "turns": turns})
        finally:
            started.leader.close()
            started.close()
    return 1 if refused else 0


def _talk(
    options: argparse.Namespace, started: Any, sampling: Any, turns: list[dict[str, Any]]
) -> int:
    """Answers line after line; adds to `turns` what was said, and at what cost.

    A question that cannot be answered, too long for example, is told of and forgotten; how many
    there were.
    """
    opening = [{"role": "system", "content": options.system}] if options.system else []
    messages, refused = list(opening), 0
    for question in _questions():
        if question == "/clear":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": question})
        try:
            check_text("question", question)
            text, done = _answer(options, started, messages, sampling, len(turns))
        except AstraError as error:
            messages.pop()
            refused += 1
            say(f"astra: error: {error}")
            continue
        messages.append({"role": "assistant", "content": text})
        turns.append({"question": question, "text": text} | done)
    return refused


def _questions() -> Iterator[str]:
    """Lines of standard input in UTF-8, with a prompt on a terminal."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _answer(
    options: argparse.Namespace, started: Any, messages: list[Any], sampling: Any, turn: int
) -> tuple[str, dict[str, Any]]:
    """The answer, shown as it comes, and its figures."""
    from ..serve.service import Done, GenerationRequest
    from ..store import encode_messages

    leader, pieces = started.leader, []
    figures: dict[str, Any] = {}
    encoded = encode_messages(started.tokenizer, messages)
    room = leader.context_length - len(encoded) + 1
    if room < 1:
        raise AstraError(
            f"the conversation has {len(encoded)} tokens, and the model's limit is "
            f"{leader.context_length}: /clear begins anew"
        )
    request = GenerationRequest(
        f"turn-{turn}", encoded, min(options.max_new_tokens, room), sampling
    )
    streaming = None if options.json else Streaming(started.tokenizer, 1)
    try:
        with working("computing the answer"):
            for event in leader.stream(request):
                pieces.append(event.text)
                if streaming is not None:
                    streaming.write(event.text)
                if isinstance(event, Done):
                    figures = {
                        "prompt_tokens": event.prompt_tokens,
                        "cached_tokens": event.cached_tokens,
                        "completion_tokens": event.completion_tokens,
                        "seconds_to_first_token": event.seconds_to_first_token,
                        "coded_tokens": event.coded_tokens,
                        "degraded": event.degraded,
                    }
    finally:
        if streaming is not None and pieces:
            streaming.write("\n")
    if streaming is not None:
        _say_what_it_rests_on(figures)
    return "".join(pieces), figures


def _say_what_it_rests_on(figures: dict[str, Any]) -> None:
    """Says where an answer may differ from one device's."""
    if figures.get("degraded"):
        say("WARNING: a degraded answer, without a device that was late or lost")
    if figures.get("coded_tokens"):
        say(
            f"the answer rests on codes: of {figures['prompt_tokens']} tokens its rank read "
            f"{figures['coded_tokens']} as codewords (--codebook none: exact)"
        )
