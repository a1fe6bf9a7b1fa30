"""What becomes of requests when a worker is killed, stopped or started again, many times.

    python -m bench.service.faults [--ranks 2] [--tries 200] [--seed 0]

Clients ask short questions all the time, and every answer is compared with the first one to the
same question. At random moments a worker is killed (`kill`) or stopped and continued (`stop`). A
try has survived when every request got the right answer or an error of the reference's format, and
the service is ready again within 5 s of the worker's return; a killed one is back when its process
has loaded, which counts as its start. Milliseconds are from the blow to 503 at /ready. Writes
service_faults.json.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from astra_runtime.console import say
from bench.report import command_line, percentiles, quiet_transformers, write
from bench.service.server import Answer, Server, serving

QUESTIONS = ("The capital of France is", "Two and two are", "The colour of the sky is")
BACK_SECONDS = 5.0  # that the service may need once the worker is back
LOAD_SECONDS = 120.0  # that a killed worker may need to be back
NOTICE_SECONDS = 20.0


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
            self.wrong.append(answer.text)
        else:
            self.answers += 1

    def stop(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()


def strike(server: Server, kind: str, moment: random.Random) -> tuple[float, bool]:
    """Milliseconds to the notice, and whether the service was ready in time again."""
    time.sleep(moment.uniform(0.0, 2.0))
    worker = moment.choice(server.workers())
    start = time.monotonic()
    os.kill(worker, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    while server.is_ready():
        if time.monotonic() - start > NOTICE_SECONDS:
            return 1e3 * NOTICE_SECONDS, False
        time.sleep(0.01)
    noticed = 1e3 * (time.monotonic() - start)
    patience = LOAD_SECONDS
    if kind == "stop":
        os.kill(worker, signal.SIGCONT)
        patience = BACK_SECONDS
    back = time.monotonic()
    while not server.is_ready():
        if time.monotonic() - back > patience:
            return noticed, False
        time.sleep(0.02)
    return noticed, True


def resident(process: int) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(arguments: Sequence[str] | None = None) -> None:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="bench.service.faults", description=about)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--tries", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="service_faults", help="of the result")
    options = parser.parse_args(arguments)
    quiet_transformers()
    moment = random.Random(options.seed)
    milliseconds: dict[str, list[float]] = {"kill": [], "stop": []}
    survived = dict.fromkeys(milliseconds, 0)
    with serving(options.model, options.ranks, 0, 0) as server:
        clients = Clients(server, options.clients)
        before = resident(server.process.pid)
        try:
            for number in range(options.tries):
                kind = moment.choice(("kill", "stop"))
                noticed, ready = strike(server, kind, moment)
                milliseconds[kind].append(noticed)
                survived[kind] += ready and not clients.wrong
                say(f"  {number}: {kind}, noticed after {noticed:.0f} ms, {clients.wrong[:1]}")
                if not ready:
                    server.wait_ready(LOAD_SECONDS)
        finally:
            clients.stop()
        grown = resident(server.process.pid) - before
    rows = []
    for kind, taken in milliseconds.items():
        ordered = sorted(taken)
        row = {"name": kind, "tried": len(taken), "survived": survived[kind]}
        if taken:
            row |= {"p50_ms": percentiles(taken).p50, "p99_ms": ordered[int(0.99 * len(taken))]}
        rows.append(row)
    figures = {"answers": clients.answers, "errors": clients.errors, "grown_bytes": grown}
    path = write(
        options.name,
        [],
        command=command_line("bench.service.faults", arguments),
        packages=("torch", "transformers"),
        extra={"faults": rows, **figures},
    )
    say(f"wrote {path}: {rows}, {figures}")


if __name__ == "__main__":
    main()
