"""Malformed requests and slow clients at a real service, beside clients that ask in earnest.

    python -m bench.service.malformed [--requests 1000] [--slow 8] [--ranks 2] [--seed 0]

Values out of place, bodies that are no JSON, paths, methods and types that there are not, and bytes
that are no HTTP. Every one has to be answered, with 200 where what is wrong does not matter, else
with an error in the reference's format and no status of 500 or more. Meanwhile `--slow` clients of
each kind in `SLOW` hold connections, and others ask questions, whose answers have to be the same
each time. Writes service_malformed.json, with memory, threads and descriptors of the leader before
and after, and ends with status 1 where anything was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import socket
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from astra_runtime.console import say
from bench.report import command_line, quiet_transformers, write
from bench.service.faults import sample
from bench.service.server import Server, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "bench", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
    TEXT: {"model": "bench", "prompt": "Hello", "max_tokens": 2},
    "/v1/embeddings": {"model": "bench", "input": "Hello"},
    "/v1/images/classify": {"model": "bench", "image": "aGVsbG8="},
    "/v1/nothing": {"model": "bench"},
}
JUNK: list[Any] = [
    None, True, -1, 0, 10**30, 1.5, "", "x", "\ud800", [], {}, [None], [[]], {"a": []}, "\u0000",
    [{"role": "user"}], {"role": []}, 1e300,
]  # fmt: skip
NAMES = (
    "model", "messages", "prompt", "input", "image", "temperature", "top_p", "top_k", "seed", "n",
    "presence_penalty", "frequency_penalty", "logit_bias", "stop", "max_tokens", "stream_options",
    "max_completion_tokens", "logprobs", "top_logprobs", "tools", "response_format", "stream",
    "encoding_format", "cache_prompt", "metadata", "what",
)  # fmt: skip
LENGTHS = ("max_tokens", "max_completion_tokens")
TYPES = ("text/plain", "multipart/form-data", "", "application/jsonx")
# What is no request by HTTP/1.1.
NO_HTTP = (
    b"GARBAGE\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /health\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: \x01\x02\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + b"x" * 100_000 + b"\r\n\r\n",
    b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n"
    b"Content-Length: 2\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nnope\r\n{}\r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 99999999999\r\n\r\n{}",
)
QUESTIONS = ("The capital of France is", "Two and two are")
ANSWER_TOKENS = 4
CLIENTS = 4  # that send malformed requests
PATIENCE = 60.0  # seconds for any answer
HELD_SECONDS = 50.0  # that a slow client may hold a connection
PAUSE = 0.5  # seconds between two bytes of a slow client
BACK_SECONDS = 60.0  # until the descriptors are those of before
FIELDS = {"message", "type", "param", "code"}


@dataclass
class Found:
    """What came of all requests; `wrong`: what should not have been."""

    statuses: Counter[str] = field(default_factory=Counter)
    slow: Counter[str] = field(default_factory=Counter)
    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.Lock)

    def count(self, counter: Counter[str], name: str) -> None:
        """One more, in whatever thread."""
        with self._lock:
            counter[name] += 1


def request_of(random_: random.Random) -> bytes:
    """A malformed request, all of its bytes."""
    if random_.random() < 0.25:
        return random_.choice(NO_HTTP)
    path = random_.choice(list(BODIES))
    body = dict(BODIES[path])
    for name in random_.choices(NAMES, k=random_.randint(1, 3)):
        # an answer without a limit would be as long as the model's context
        body[name] = random_.choice(JUNK[1:] if name in LENGTHS else JUNK)
    content, kind, method = json.dumps(body).encode(), "application/json", "POST"
    if random_.random() < 0.3:
        cut = random_.randrange(len(content))
        content = content[:cut] + random_.randbytes(random_.randint(0, 8)) + content[cut + 1 :]
    if random_.random() < 0.1:
        kind = random_.choice(TYPES)
    if random_.random() < 0.1:
        method = random_.choice(("GET", "PUT", "DELETE", "BREW"))
    return http_request(method, path, content, kind)


def http_request(method: str, path: str, content: bytes, kind: str = "application/json") -> bytes:
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


def answer_to(server: Server, request: bytes) -> tuple[int, bytes]:
    """Status and body of the answer. Raises OSError and HTTPException where there is none."""
    with connection(server) as sock:
        with contextlib.suppress(OSError):  # it may answer, and close, before it has read all
            sock.sendall(request)
        return read_answer(sock)


def connection(server: Server) -> socket.socket:
    place = urllib.parse.urlsplit(server.url)
    return socket.create_connection((place.hostname, place.port or 80), timeout=PATIENCE)


def read_answer(sock: socket.socket) -> tuple[int, bytes]:
    reply = http.client.HTTPResponse(sock)
    reply.begin()
    return reply.status, reply.read()


def problem_of(status: int, body: bytes) -> str:
    """What is wrong with an answer; "": nothing."""
    if status == 200:
        return ""
    try:
        error = json.loads(body)["error"]
        typed = set(error) == FIELDS and isinstance(error["message"], str)
    except (ValueError, KeyError, TypeError):
        typed = False
    return "" if typed and status < 500 else f"{status}: {body[:200]!r}"


def send_malformed(server: Server, count: int, seed: int, found: Found) -> None:
    random_ = random.Random(seed)
    for _ in range(count):
        request = request_of(random_)
        try:
            status, body = answer_to(server, request)
        except (OSError, http.client.HTTPException) as error:
            found.wrong.append(f"{type(error).__name__}: {error} to {request[:300]!r}")
            continue
        found.count(found.statuses, str(status))
        if problem := problem_of(status, body):
            found.wrong.append(f"{problem} to {request[:300]!r}")


# Slow clients: each returns what was wrong, or "".


def silent(server: Server) -> str:
    """Connects, and says nothing."""
    with connection(server) as sock:
        return closed(sock)


def slow_head(server: Server) -> str:
    """Sends a request's headers, a byte at a time."""
    return trickle(server, http_request("POST", TEXT, b"{}"), until_closed=True)


def slow_body(server: Server) -> str:
    """Sends a request's body, a byte at a time."""
    content = json.dumps(BODIES[TEXT] | {"user": "x" * 1000}).encode()
    request = http_request("POST", TEXT, content)
    return trickle(server, content, request[: -len(content)], until_closed=False)


def late_reader(server: Server) -> str:
    """Reads its answer long after it has come."""
    with stream(server) as sock:
        time.sleep(6 * PAUSE)
        status, body = read_answer(sock)
    whole = status == 200 and body.rstrip().endswith(b"[DONE]")
    return "" if whole else f"{status}: {body[-200:]!r}"


def leaver(server: Server) -> str:
    """Leaves in the middle of its answer."""
    with stream(server) as sock:
        sock.recv(1)
    return ""


SLOW: tuple[Callable[[Server], str], ...] = (silent, slow_head, slow_body, late_reader, leaver)


def stream(server: Server) -> socket.socket:
    """A connection on which an answer was asked for, in a stream."""
    sock = connection(server)
    content = json.dumps(BODIES[TEXT] | {"stream": True, "max_tokens": ANSWER_TOKENS}).encode()
    sock.sendall(http_request("POST", TEXT, content))
    return sock


def trickle(server: Server, content: bytes, head: bytes = b"", *, until_closed: bool) -> str:
    """Sends `content` a byte at a time, until the server has had enough of it."""
    with connection(server) as sock:
        sock.sendall(head)
        start = time.monotonic()
        sock.settimeout(PAUSE)
        for byte in content:
            try:
                sock.sendall(bytes([byte]))
                if sock.recv(1, socket.MSG_PEEK):
                    break
                raise ConnectionResetError  # closed in order
            except TimeoutError:
                pass
            except OSError:
                return "" if until_closed else "closed without an answer"
            if time.monotonic() - start > HELD_SECONDS:
                return f"held for {HELD_SECONDS:g} s"
        sock.settimeout(PATIENCE)
        status, body = read_answer(sock)
        return problem_of(status, body) or ("" if status == 408 else f"{status}, not 408")


def closed(sock: socket.socket) -> str:
    sock.settimeout(HELD_SECONDS)
    try:
        data = sock.recv(1)
    except TimeoutError:
        return f"held for {HELD_SECONDS:g} s"
    except OSError:
        return ""
    return f"an answer to nothing: {data!r}" if data else ""


def hold(server: Server, client: Callable[[Server], str], found: Found) -> None:
    try:
        problem = client(server)
    except (OSError, http.client.HTTPException) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        found.wrong.append(f"{client.__name__}: {problem}")
    else:
        found.count(found.slow, client.__name__)


def ask(server: Server, over: threading.Event, found: Found) -> None:
    """Asks the same questions again and again."""
    expected = [server.ask(question, ANSWER_TOKENS).text for question in QUESTIONS]
    while not over.is_set():
        for question, text in zip(QUESTIONS, expected, strict=True):
            answer = server.ask(question, ANSWER_TOKENS, timeout=PATIENCE)
            if answer.error or answer.text != text:
                found.wrong.append(f"{answer.error or answer.text!r}, not {text!r}")
            else:
                found.answers += 1


def attack(server: Server, requests: int, slow: int, seed: int) -> Found:
    """All malformed requests, and `slow` slow clients of each kind, while others ask."""
    found, over = Found(), threading.Event()
    asking = threading.Thread(target=ask, args=(server, over, found))
    asking.start()
    shares = [requests // CLIENTS + (n < requests % CLIENTS) for n in range(CLIENTS)]
    try:
        with ThreadPoolExecutor(CLIENTS + slow * len(SLOW)) as pool:
            jobs = [pool.submit(hold, server, one, found) for one in SLOW for _ in range(slow)]
            for n, share in enumerate(shares):
                jobs.append(pool.submit(send_malformed, server, share, seed + n, found))
            for job in jobs:
                job.result()
    finally:
        over.set()
        asking.join()
    return found


def settled(process: int, before: dict[str, int], seconds: float) -> dict[str, int]:
    """What a process has when it has no more descriptors than before, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while (now := sample(process))["descriptors"] > before["descriptors"]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return now


def main(arguments: Sequence[str] | None = None) -> None:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="bench.service.malformed", description=about)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--slow", type=int, default=8, help="slow clients of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="service_malformed", help="of the result")
    options = parser.parse_args(arguments)
    quiet_transformers()
    with serving(options.model, options.ranks, 0, 0, "--codebook", "none") as server:
        leader = server.process.pid
        tenth = max(1, options.requests // 10)
        attack(server, tenth, options.slow, options.seed + CLIENTS)  # warms up
        before = sample(leader)
        found = attack(server, options.requests, options.slow, options.seed)
        after = settled(leader, before, BACK_SECONDS)
        restarts = server.get("/v1/astra/status")[1]["lost"]
    if after["descriptors"] > before["descriptors"]:
        found.wrong.append(f"descriptors: {after['descriptors']}, {before['descriptors']} before")
    if restarts:
        found.wrong.append(f"the mesh has ended {restarts} times")
    for problem in found.wrong:
        say(f"  wrong: {problem}")
    path = write(
        options.name,
        [],
        command=command_line("bench.service.malformed", arguments),
        packages=("torch", "transformers", "starlette", "uvicorn"),
        extra={
            "requests": options.requests,
            "statuses": dict(sorted(found.statuses.items())),
            "slow": {one.__name__: [found.slow[one.__name__], options.slow] for one in SLOW},
            "answers": found.answers,
            "wrong": len(found.wrong),
            "samples": [before, after],
        },
    )
    say(f"wrote {path}: {dict(found.statuses)}, {dict(found.slow)}, {before}, {after}")
    if found.wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
