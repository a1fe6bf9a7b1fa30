"""What becomes of requests when a worker is killed, stopped or started again, many times.

    python -m bench.service.faults [--ranks 2] [--tries 200] [--seed 0]

Clients ask all the time, questions that one rank reads and questions that all ranks read together;
every answer is compared with the first one to the same question, as with dense exchange all ranks
answer alike. At random moments a worker gets SIGSTOP, until that was noticed (`stop`), SIGKILL
(`kill`) or SIGTERM (`restart`), or its successor is killed as well while it starts (`again`).

A try has survived when every request got the right answer or an error of the reference's format,
and the service is ready again within 5 s of the worker's return: of SIGCONT, or of the moment at
which the process that took its place opens its first connection. Milliseconds are from the blow to
503 at /ready; those of `back_…` are from the return to 200. Writes service_faults.json, with
memory, threads and descriptors of the leader after every tenth try.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from astra_runtime.console import say
from bench.report import command_line, percentiles, quiet_transformers, write
from bench.service.server import Answer, Server, serving

TOGETHER = " ".join(f"On day {n} the river rose by {n} feet." for n in range(1, 13))
QUESTIONS = (
    "The capital of France is",
    "Two and two are",
    "The colour of the sky is",
    f"{TOGETHER} On day 13",
    f"{TOGETHER} The river",
)
KINDS = {"stop": 0.65, "kill": 0.2, "restart": 0.1, "again": 0.05}  # and how often
BACK_SECONDS = 5.0  # that the service may need once the worker is back
LOAD_SECONDS = 180.0  # that a killed worker may need to be back
NOTICE_SECONDS = 30.0
QUIET_SECONDS = 5.0  # between two blows at most, so that some answers come to their end
SAMPLE = 10  # tries


class Clients:
    """Threads that ask again and again; `wrong` has what no client should ever get."""

    def __init__(self, server: Server, count: int) -> None:
        self.server, self.expected = server, [server.ask(q, 12).text for q in QUESTIONS]
        self.over = threading.Event()
        self.wrong: list[str] = []
        self.answers = self.errors = 0
        self.threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(count)]
        for thread in self.threads:
            thread.start()

    def _ask(self, number: int) -> None:
        while not self.over.is_set():
            place = number % len(QUESTIONS)
            answer = self.server.ask(QUESTIONS[place], 12, timeout=60)
            self._judge(answer, self.expected[place])
            number += 1
            if answer.error:
                time.sleep(0.1)

    def _judge(self, answer: Answer, expected: str) -> None:
        if answer.error:
            self.errors += 1
            typed = '"type"' in answer.error
            if not typed:
                self.wrong.append(answer.error)
        elif answer.text != expected:
            self.wrong.append(f"{answer.text!r}, not {expected!r}")
        else:
            self.answers += 1

    def stop(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()


@dataclass
class Kind:
    """The tries of one kind: milliseconds to the notice, and from the return to being ready."""

    noticed: list[float] = field(default_factory=list)
    back: list[float] = field(default_factory=list)
    survived: int = 0

    def row(self, name: str) -> dict[str, Any]:
        row: dict[str, Any] = {"name": name, "tried": len(self.noticed), "survived": self.survived}
        for key, taken in (("", self.noticed), ("back_", self.back)):
            ordered = sorted(taken)
            if ordered:
                row[f"{key}p50_ms"] = percentiles(ordered).p50
                row[f"{key}p99_ms"] = ordered[int(0.99 * len(ordered))]
        return row


def strike(server: Server, kind: str, moment: random.Random) -> tuple[float, float]:
    """Milliseconds to the notice, and from the worker's return until the service is ready."""
    time.sleep(moment.uniform(0.0, QUIET_SECONDS))
    worker = moment.choice(server.workers())
    others = set(server.workers())
    numbers = {"stop": signal.SIGSTOP, "restart": signal.SIGTERM}
    start = time.monotonic()
    os.kill(worker, numbers.get(kind, signal.SIGKILL))
    wait_until(lambda: not server.is_ready(), NOTICE_SECONDS, "no notice")
    noticed = 1e3 * (time.monotonic() - start)
    if kind == "stop":
        os.kill(worker, signal.SIGCONT)
    if kind == "again":
        successor = started(server, others)
        time.sleep(moment.uniform(0.0, 5.0))
        os.kill(successor, signal.SIGKILL)
        others.add(successor)
    if kind != "stop":
        successor = started(server, others)
        wait_until(lambda: has_socket(successor), LOAD_SECONDS, "no connection")
    back = time.monotonic()
    wait_until(server.is_ready, LOAD_SECONDS, "not ready")
    return noticed, 1e3 * (time.monotonic() - back)


def wait_until(condition: Any, seconds: float, problem: str) -> None:
    """Raises TimeoutError where it does not become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{problem} within {seconds:g} s")
        time.sleep(0.01)


def started(server: Server, others: set[int]) -> int:
    """The process that was started in place of one of `others`."""
    found: list[int] = []

    def is_there() -> bool:
        found.extend(set(server.workers()) - others)
        return bool(found)

    wait_until(is_there, LOAD_SECONDS, "no new process")
    return found[0]


def has_socket(process: int) -> bool:
    """Whether it has opened a TCP socket: a worker does when it has loaded its model. Sockets of
    other kinds, as libraries open to ask the system something, are none."""
    try:
        opened = {os.readlink(fd) for fd in descriptors(process)}
        tables = (Path(f"/proc/{process}/net/{name}").read_text() for name in ("tcp", "tcp6"))
        lines = (line.split() for table in tables for line in table.splitlines()[1:])
        return any(f"socket:[{fields[9]}]" in opened for fields in lines)
    except OSError:  # closed meanwhile
        return False


def descriptors(process: int) -> list[str]:
    return [f"/proc/{process}/fd/{name}" for name in os.listdir(f"/proc/{process}/fd")]


def sample(process: int) -> dict[str, int]:
    """Bytes of memory, threads and descriptors of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return {
        "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "threads": len(os.listdir(f"/proc/{process}/task")),
        "descriptors": len(descriptors(process)),
    }


def tries(server: Server, clients: Clients, options: argparse.Namespace) -> dict[str, Any]:
    """All of them; the rows of the result, and the samples."""
    moment, samples = random.Random(options.seed), []
    kinds = {name: Kind() for name in KINDS}
    begun = time.monotonic()
    for number in range(options.tries):
        (name,) = moment.choices(list(KINDS), list(KINDS.values()))
        wrong = len(clients.wrong)
        noticed, back = strike(server, name, moment)
        kind = kinds[name]
        kind.noticed.append(noticed)
        kind.back.append(back)
        kind.survived += back <= 1e3 * BACK_SECONDS and len(clients.wrong) == wrong
        say(f"  {number}: {name}, noticed after {noticed:.0f} ms, ready {back:.0f} ms after return")
        for problem in clients.wrong[wrong:]:
            say(f"    wrong: {problem}")
        if number % SAMPLE == SAMPLE - 1 or number == options.tries - 1:
            samples.append({"tries": number + 1, **sample(server.process.pid)})
    seconds = time.monotonic() - begun
    rows = [kind.row(name) for name, kind in kinds.items() if kind.noticed]
    return {"faults": rows, "samples": samples, "seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="bench.service.faults", description=about)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--tries", type=int, default=200)
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds, of `astra serve`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="service_faults", help="of the result")
    options = parser.parse_args(arguments)
    quiet_transformers()
    more = ["--codebook", "none", "--timeout", str(options.timeout)]
    with serving(options.model, options.ranks, 0, 0, *more) as server:
        clients = Clients(server, options.clients)
        try:
            found = tries(server, clients, options)
        finally:
            clients.stop()
    figures = {"answers": clients.answers, "errors": clients.errors, "wrong": len(clients.wrong)}
    path = write(
        options.name,
        [],
        command=command_line("bench.service.faults", arguments),
        packages=("torch", "transformers"),
        extra={**found, **figures, "timeout_s": options.timeout},
    )
    say(f"wrote {path}: {found['faults']}, {figures}")


if __name__ == "__main__":
    main()
