"""`astra serve` as real processes: a worker that is killed or stopped in a stream, and the end."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from astra_runtime import Codebook
from bench.service.malformed import SLOW, attack
from bench.service.server import Server, serving
from tests.runtime.models import tiny, windows_for
from tests.runtime.serve.service import alone
from tests.serve.fakes import byte_tokenizer

pytestmark = pytest.mark.slow

TIMEOUT = 3.0
QUESTION, NEW_TOKENS = "Once upon a time", 12
TICK = 1 / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", vocab_size=len(byte_tokenizer()), max_position_embeddings=8192)


@pytest.fixture(scope="module")
def expected(model: Any) -> str:
    """What one device answers."""
    ids = alone(model, byte_tokenizer()(QUESTION)["input_ids"], NEW_TOKENS)
    return str(byte_tokenizer().decode(ids, skip_special_tokens=True))


@pytest.fixture(scope="module")
def server(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    book = Codebook.fit(model, windows_for("llama"), groups=3, codewords=16, held_back=0)
    book.save_pretrained(folder / "codes")
    options = ["--codebook", str(folder / "codes"), "--timeout", str(TIMEOUT)]
    with serving(str(folder / "model"), 2, 0, 0, *options) as server:
        while not any(line.startswith("ready at") for line in server.lines):
            time.sleep(0.01)
        server.lines.clear()  # of its start
        yield server


class Stream:
    """An answer of many tokens, which has begun."""

    def __init__(self, server: Server, new_tokens: int) -> None:
        body = {"model": "bench", "prompt": QUESTION, "max_tokens": new_tokens, "temperature": 0}
        request = urllib.request.Request(
            f"{server.url}/v1/completions",
            json.dumps(body | {"stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        self.reply = urllib.request.urlopen(request, timeout=60)
        assert self.reply.readline().startswith(b"data: ")

    def rest(self) -> list[str]:
        """The data of its further events."""
        lines = [line.decode().removeprefix("data: ").strip() for line in self.reply]
        return [line for line in lines if line and not line.startswith(":")]


def two_streams(server: Server) -> list[Stream]:
    """One on each rank, as owners rotate."""
    return [Stream(server, 8000), Stream(server, 8000)]


def check_ended_by_rank_1(stream: Stream) -> None:
    last = json.loads(stream.rest()[-1])
    assert last["error"]["type"] == "server_error"
    assert "rank 1" in last["error"]["message"]


def check_ready_again(server: Server, expected: str, times: int) -> None:
    """It answers rightly, and the leader has loaded nothing anew."""
    server.wait_ready(100)
    assert server.ask(QUESTION, NEW_TOKENS).text == expected
    status = server.get("/v1/astra/status")[1]
    assert (status["lost"], status["rejoined"]) == (times, times)
    assert not [line for line in server.lines if line.startswith("loading")]


def wait_not_ready(server: Server) -> str:
    """Why it is not ready."""
    deadline = time.monotonic() + 60
    while True:
        code, body = server.get("/ready")
        if code == 503:
            return str(body["reason"])
        assert time.monotonic() < deadline


def test_a_killed_worker_is_started_again(server: Server, expected: str) -> None:
    assert server.ask(QUESTION, NEW_TOKENS).text == expected
    (worker,) = server.workers()
    streams = two_streams(server)
    os.kill(worker, signal.SIGKILL)
    for stream in streams:
        check_ended_by_rank_1(stream)
    assert "waiting for all devices" in wait_not_ready(server)
    check_ready_again(server, expected, times=1)
    assert server.workers() != [worker]


def test_a_stopped_worker_is_noticed_and_comes_back(server: Server, expected: str) -> None:
    (worker,) = server.workers()
    streams = two_streams(server)
    start = time.monotonic()
    os.kill(worker, signal.SIGSTOP)
    try:
        for stream in streams:
            check_ended_by_rank_1(stream)
        # an allowance for other work on this machine
        assert time.monotonic() - start < TIMEOUT + 5
        assert "rank 1" in wait_not_ready(server)
    finally:
        os.kill(worker, signal.SIGCONT)
    check_ready_again(server, expected, times=2)
    assert server.workers() == [worker]


def test_malformed_requests_and_slow_clients_harm_nobody(server: Server) -> None:
    found = attack(server, 100, 1, seed=0)
    assert found.wrong == []
    assert sum(found.statuses.values()) == 100
    assert set(found.slow) == {client.__name__ for client in SLOW}
    assert found.answers > 0


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return TICK * (int(fields[11]) + int(fields[12]))


def test_it_drains_and_ends_at_once(server: Server) -> None:
    """Answers that run are finished. Then nothing is left to do, whatever the clients keep open."""
    process = server.process
    place = urllib.parse.urlsplit(server.url)
    with socket.create_connection((place.hostname, place.port)) as idle:
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle.recv(12) == b"HTTP/1.1 200"
        stream = Stream(server, 200)
        process.send_signal(signal.SIGTERM)
        assert stream.rest()[-1] == "[DONE]"
        before = cpu_seconds(process.pid)
        # a process that has ended is still counted until it is waited for
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        taken = cpu_seconds(process.pid) - before
    assert process.wait() == 0
    assert not [line for line in server.lines if "leak" in line]
    # more than that would be seconds on a busy machine
    assert taken < 1.0
