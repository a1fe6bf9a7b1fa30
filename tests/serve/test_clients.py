"""Clients that are slow, silent, too many, or speak no HTTP; and the end of a server."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from astra_runtime.errors import AstraError
from astra_runtime.serve.http import HttpOptions, connection, make_app, run_server
from astra_runtime.serve.http.server_state import ServerState
from tests.serve.fakes import FakeService, serving
from tests.serve.test_malformed import CHAT

# A bound that tests wait for; each test waits for one of them.
SHORT = 0.3
LONG = 60.0


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[FakeService, str]]:
    service, options = FakeService(), HttpOptions(body_timeout_s=LONG, max_body=1 << 16)
    bounds = {"headers_timeout_s": LONG, "write_timeout_s": SHORT, "max_connections": 8}
    with serving(service, options, **bounds) as url:
        yield service, url


@pytest.fixture(scope="module")
def impatient() -> Iterator[str]:
    """A server that does not wait for headers."""
    with serving(FakeService(), headers_timeout_s=SHORT) as url:
        yield url


@pytest.fixture
def line(shared: tuple[FakeService, str], service: FakeService) -> Iterator[socket.socket]:
    with connect(shared[1]) as line:
        yield line


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=LONG)


def request(body: bytes, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    )
    return head.encode() + body


def read_all(line: socket.socket) -> bytes:
    """Everything until the server closes; a reset is an end, too."""
    data = b""
    try:
        while chunk := line.recv(1 << 16):
            data += chunk
    except ConnectionResetError:
        pass
    return data


def error_of(data: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def test_a_client_that_says_nothing_is_closed(impatient: str) -> None:
    with connect(impatient) as line:
        assert read_all(line) == b""


def test_headers_that_never_end(impatient: str) -> None:
    with connect(impatient) as line:
        with contextlib.suppress(ConnectionError):  # it was quicker to lose its patience
            line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        assert read_all(line) == b""


def test_a_second_request_whose_headers_never_end(impatient: str) -> None:
    answer = b""
    while not answer.endswith(b'{"status":"ok"}'):  # a busy machine may be too slow for the first
        with connect(impatient) as line, contextlib.suppress(ConnectionError):
            answer = b""
            line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while not answer.endswith(b'{"status":"ok"}') and (part := line.recv(1 << 16)):
                answer += part
            line.sendall(b"GET /hea")
            assert read_all(line) == b""


def test_a_body_that_does_not_come() -> None:
    with (
        serving(FakeService(), HttpOptions(body_timeout_s=SHORT)) as url,
        connect(url) as line,
    ):
        line.sendall(request(b'{"model":', length=100))
        status, error = error_of(read_all(line))
    assert (status, error["code"]) == (408, "timeout")


def test_a_body_that_is_too_large_is_told_so(
    line: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "DISCARD_S", LONG)
    line.sendall(request(b"x" * 100_000))
    status, error = error_of(read_all(line))
    assert (status, error["code"]) == (413, "request_too_large")


def test_a_body_without_a_length_that_grows(
    line: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "DISCARD_S", LONG)
    head = request(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    line.sendall(head + (b"2000\r\n" + b"x" * 0x2000 + b"\r\n") * 10 + b"0\r\n\r\n")
    assert error_of(read_all(line))[0] == 413


def test_a_client_that_reads_nothing_is_cut_off(line: socket.socket, service: FakeService) -> None:
    """An answer that fills every buffer on its way stops; the service hears of it."""
    service.text, service.endless, service.context_length = "x" * 200_000, True, 10**9
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    original = FakeService._answer

    async def in_large_pieces(self: FakeService, index: int, asked: Any) -> Any:
        async for event in original(self, index, asked):
            vars(event)["text"] = "x" * 100_000
            yield event

    service._answer = in_large_pieces.__get__(service)  # type: ignore[method-assign]
    line.sendall(request(json.dumps(CHAT | {"stream": True, "max_tokens": 10**6}).encode()))
    assert service.cancelled.wait(LONG)


def test_what_is_no_http_is_answered_in_the_references_format(line: socket.socket) -> None:
    line.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n")
    status, error = error_of(read_all(line))
    assert (status, error["type"]) == (400, "invalid_request_error")


def test_headers_that_are_too_large(line: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):  # it has read enough before all was sent
        line.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Large: " + b"x" * 100_000)
    data = read_all(line)
    assert not data or error_of(data)[0] == 400


def test_too_many_connections(shared: tuple[FakeService, str], service: FakeService) -> None:
    lines = [connect(shared[1]) for _ in range(9)]
    status, error = error_of(read_all(lines[-1]))
    assert (status, error["code"]) == (503, "overloaded")
    for line in lines:
        line.close()
    # it takes in others once it has closed these, and the next test finds it so
    deadline = time.monotonic() + LONG
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(urllib.error.HTTPError),
            urllib.request.urlopen(f"{shared[1]}/health", timeout=LONG) as answer,
        ):
            assert json.load(answer) == {"status": "ok"}
            return
    pytest.fail("the server refuses connections after all others were closed")


def test_a_port_in_use_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(AstraError, match="cannot listen at 127.0.0.1"):
            run_server(make_app(FakeService()), port=taken.getsockname()[1])


def test_at_the_end_streams_are_told_and_new_requests_refused() -> None:
    service = FakeService()
    service.endless = True
    app = make_app(service)
    state: ServerState = app.state.server
    urls: list[str] = []
    listening = threading.Event()

    def told(url: str) -> None:
        urls.append(url)
        listening.set()

    settings: dict[str, Any] = {"port": 0, "drain_s": 0.2, "on_listening": told}
    server = threading.Thread(target=run_server, args=(app,), kwargs=settings, daemon=True)
    server.start()
    assert listening.wait(LONG)
    with connect(urls[0]) as line:
        line.sendall(request(json.dumps(CHAT | {"stream": True, "max_tokens": 400}).encode()))
        data = line.recv(1 << 16)
        app.state.stop()
        data += read_all(line)
    server.join(LONG)
    assert not server.is_alive()
    assert state.ending.draining
    assert service.cancelled.is_set()
    assert b"it is being shut down" in data
    assert b"[DONE]" not in data
    with pytest.raises(Exception, match="shut down"):
        state.check_ready()


def test_a_signal_ends_a_server_of_the_main_thread() -> None:
    """As `astra serve` is ended; the signal's own handler of before is not called."""
    called: list[int] = []
    threads: list[threading.Thread] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: called.append(number))

    def end(url: str) -> None:
        with urllib.request.urlopen(f"{url}/health", timeout=LONG):
            signal.raise_signal(signal.SIGTERM)

    def told(url: str) -> None:
        threads.append(threading.Thread(target=end, args=(url,)))
        threads[0].start()

    try:
        run_server(make_app(FakeService()), port=0, drain_s=0.2, on_listening=told)
        threads[0].join(LONG)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert called == []
