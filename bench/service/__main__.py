"""Concurrent chats on several ranks, beside one device that serves them with the same software.

    python -m bench.service [--ranks 2] [--mbit 10] [--clients 8] [--tokens 1024] [--answer 16]

Real processes, HTTP and an emulated link. `chats`: `--clients` clients ask at once, each with a
prompt of its own; milliseconds are of one request, all of them over their number; `read_alone`
is the share of the prompts that one rank has read by itself. `decode_batch`: one step of one rank
for several sequences together, which reads the weights once. Writes service.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from astra_runtime import Engine
from astra_runtime.console import say
from astra_runtime.serve.batch import Cache, read
from astra_runtime.sessions.cache import KeyValues
from astra_runtime.store import load_model, load_tokenizer
from astra_runtime.texts import builtin_text, token_windows
from bench.report import Case, command_line, percentiles, quiet_transformers, write
from bench.service.server import Answer, serving


def prompts_of(model: str, tokens: int, count: int) -> list[str]:
    """Texts of about so many tokens each, none like another."""
    tokenizer = load_tokenizer(model)
    windows = [
        window
        for text in reversed(builtin_text())
        for window in token_windows(tokenizer, text, tokens - 8, count)
    ][:count]
    if len(windows) < count:
        raise SystemExit(f"{count} prompts of {tokens} tokens: the texts give {len(windows)}")
    return [f"{n}. {tokenizer.decode(window)}" for n, window in enumerate(windows)]


def chats(
    options: argparse.Namespace, ranks: int
) -> tuple[list[tuple[float, list[Answer]]], float]:
    """Seconds and answers of each repeat of all clients asking at once, and seconds of the start,
    from the command until it is ready."""
    prompts = prompts_of(options.model, options.tokens, options.clients * (1 + options.repeats))
    more = ["--pack-weights"] if options.pack_weights else []
    found = []
    with (
        serving(options.model, ranks, options.mbit, options.rtt_ms / 2, *more) as server,
        ThreadPoolExecutor(options.clients) as pool,
    ):
        for repeat in range(1 + options.repeats):
            some = prompts[repeat * options.clients :][: options.clients]
            start = time.monotonic()
            answers = list(pool.map(lambda text: server.ask(text, options.answer), some))
            if broken := [answer.error for answer in answers if answer.error]:
                raise SystemExit(f"a request failed: {broken[0]}")
            if repeat:  # the first one warms up
                found.append((time.monotonic() - start, answers))
    return found, server.start_seconds


def chat_case(options: argparse.Namespace) -> Case:
    runs, starts = {}, {}
    for ranks in (1, options.ranks):
        runs[ranks], starts[ranks] = chats(options, ranks)
    each = {
        ranks: [1e3 * seconds / options.clients for seconds, _ in found]
        for ranks, found in runs.items()
    }
    shape = {
        "model": options.model,
        "tokens": options.tokens,
        "world_size": options.ranks,
        "mbit_per_s": options.mbit,
        "rtt_ms": options.rtt_ms,
    }
    added = {
        **waits_of(runs[1], "_single"),
        **waits_of(runs[options.ranks], ""),
        "read_alone": read_alone(runs[options.ranks]),
        "clients": options.clients,
        "answer_tokens": options.answer,
        "start_seconds": starts[options.ranks],
        "start_seconds_single": starts[1],
    }
    return Case(
        "chats",
        shape,
        "float32",
        "astra serve --pack-weights" if options.pack_weights else "astra serve",
        percentiles(each[options.ranks]),
        peers={"single": statistics.median(each[1])},
        extra=added,
    )


def waits_of(runs: Sequence[tuple[float, list[Answer]]], suffix: str) -> dict[str, float]:
    """Of all requests: until the first token, and the longest until a further one."""
    answers = [answer for _, some in runs for answer in some]
    first = sorted(answer.first or 0.0 for answer in answers)
    return {
        f"first_token_p50_ms{suffix}": 1e3 * quantile(first, 0.5),
        f"first_token_p95_ms{suffix}": 1e3 * quantile(first, 0.95),
        f"longest_wait_ms{suffix}": 1e3 * max(answer.wait for answer in answers),
    }


def read_alone(runs: Sequence[tuple[float, list[Answer]]]) -> float:
    """Which share of the prompts one rank has read by itself: none of it stands for codes."""
    answers = [answer for _, some in runs for answer in some]
    return sum(not answer.astra["coded_tokens"] for answer in answers) / len(answers)


def quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def decode_cases(options: argparse.Namespace) -> list[Case]:
    """A step for 1, 4 and 8 sequences behind prompts, in one batch; per sequence beside it."""
    engine = Engine(load_model(options.model), pack_weights=options.pack_weights)
    ids = torch.arange(options.tokens)[None] % 1000
    first = Cache(KeyValues(len(engine.adapter.blocks)))
    with torch.no_grad():
        read(engine, [first], [ids])
    alone, cases = 0.0, []
    for count in (1, 4, 8):
        caches = [first.fork() for _ in range(count)]
        times = []
        with torch.no_grad():
            for _ in range(1 + options.repeats * 4):
                start = time.perf_counter()
                read(engine, caches, [torch.tensor([[7]])] * count)
                times.append(1e3 * (time.perf_counter() - start))
        ms = percentiles(times[1:])
        alone = alone or ms.p50
        shape = {"model": options.model, "tokens": options.tokens, "B": count}
        added = {"ms_per_sequence": ms.p50 / count}
        one = {"single": count * alone}
        cases.append(Case("decode_batch", shape, "float32", "batch", ms, peers=one, extra=added))
    return cases


def main(arguments: Sequence[str] | None = None) -> None:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="bench.service", description=about)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024, help="of a prompt")
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--mbit", type=float, default=10.0)
    parser.add_argument("--rtt-ms", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pack-weights", action="store_true", help="on one device and on all")
    parser.add_argument("--name", default="service", help="of the result")
    options = parser.parse_args(arguments)
    quiet_transformers()
    torch.set_num_threads(1)
    cases = [*decode_cases(options), chat_case(options)]
    for case in cases:
        say(f"  {case.name} {dict(case.shape)}: {case.ms.p50:.1f} ms, {dict(case.extra)}")
    path = write(
        options.name,
        cases,
        command=command_line("bench.service", arguments),
        packages=("torch", "transformers", "starlette", "uvicorn"),
        link={"emulator": "paced by the sender", "mbit_per_s": options.mbit},
    )
    say(f"wrote {path}")


if __name__ == "__main__":
    main()
