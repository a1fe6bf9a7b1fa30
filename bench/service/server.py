"""A service in processes of its own, and clients that ask it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from astra_runtime.errors import AstraError
from bench.report import ROOT

START_SECONDS = 900.0  # a codebook may have to be fitted


@dataclass
class Answer:
    """What a client got.

    Attributes:
        text: of the answer. error: what came in its place, with a status.
        first, seconds: until its first piece, and its end.
        wait: the longest between two pieces.
        astra: what the service says of it beside the usage: who answered, from what.
    """

    text: str = ""
    status: int = 0
    error: str = ""
    first: float | None = None
    seconds: float = 0.0
    wait: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)
    astra: dict[str, Any] = field(default_factory=dict)


class Server:
    """A running `astra serve`.

    Attributes:
        url: where it listens.
        lines: the last ones that it wrote.
        start_seconds: from its start until it was ready.
    """

    start_seconds = 0.0

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url
        self.lines: deque[str] = deque(maxlen=1000)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        """So that it never waits for a reader."""
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self.lines.append(line.rstrip())

    def get(self, path: str) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")

    def is_ready(self) -> bool:
        return self.get("/ready")[0] == 200

    def wait_ready(self, seconds: float) -> float:
        """Seconds until it is ready."""
        start = time.monotonic()
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() - start > seconds:
                raise AstraError(f"the service was not ready within {seconds:g} s")
            time.sleep(0.02)
        return time.monotonic() - start

    def workers(self) -> list[int]:
        """The process ids of its workers."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        ids = [int(pid) for file in children for pid in contents(file).split()]
        return [pid for pid in ids if b"worker" in contents(Path(f"/proc/{pid}/cmdline"))]

    def ask(self, prompt: str, new_tokens: int, timeout: float = 600.0) -> Answer:
        """A streamed completion, always the likeliest token.

        With log-probabilities, so that a token that only begins a character is a piece, too.
        """
        body = {"model": "bench", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}, "logprobs": 0}
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        answer, start = Answer(), time.monotonic()
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                answer.status = reply.status
                _read(reply, answer, start)
        except urllib.error.HTTPError as error:
            answer.status, answer.error = error.code, error.read().decode()
        except OSError as error:
            answer.error = f"{type(error).__name__}: {error}"
        answer.seconds = time.monotonic() - start
        return answer


def contents(file: Path) -> bytes:
    """Of a file in /proc; nothing where its process has ended meanwhile."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _read(reply: Any, answer: Answer, start: float) -> None:
    last = start
    for line in reply:
        data = line.decode().removeprefix("data: ").strip()
        if not data or data == "[DONE]" or not data.startswith("{"):
            continue
        event = json.loads(data)
        if "error" in event:
            answer.error = json.dumps(event["error"])
            return
        now = time.monotonic()
        if answer.first is None:
            answer.first = now - start
        elif event["choices"]:
            answer.wait = max(answer.wait, now - last)
        last = now
        answer.text += "".join(choice["text"] for choice in event["choices"])
        answer.usage = event.get("usage") or answer.usage
        answer.astra = event.get("astra") or answer.astra


@contextlib.contextmanager
def serving(model: str, ranks: int, mbit: float, delay_ms: float, *more: str) -> Iterator[Server]:
    """A service of `ranks` processes, ready; ended at the end."""
    command = [sys.executable, "-m", "astra_runtime", "serve", "--model", model, "--port", "0"]
    command += ["--world-size", str(ranks), "--mbit", str(mbit), "--delay-ms", str(delay_ms)]
    # one thread a device, so that the single device and a rank are the same
    command += ["--threads", "1", "--served-name", "bench", "--max-queue", "256", *more]
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    start = time.monotonic()
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"listening at (\S+?),", line):
                break
        else:
            raise AstraError("the service ended before it listened")
        server = Server(process, found.group(1))
        server.wait_ready(START_SECONDS)
        server.start_seconds = time.monotonic() - start
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
