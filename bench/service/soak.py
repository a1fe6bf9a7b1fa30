"""An hour of a service's ordinary life: does what its processes hold stay the same?

    python -m bench.service.soak [--minutes 60] [--ranks 2] [--pause 6] [--memory 256] [--seed 0]

Clients talk to `astra serve` and pause between their requests: conversations that grow and are
begun anew, documents with two questions each, several answers to one prompt, streams that are left
in the middle, malformed requests. What is kept of conversations is bounded by `--memory`, which is
full after some minutes. Memory, threads and descriptors of the leader and of every worker are read
every half a minute. Writes service_soak.json, and ends with status 1 where an answer failed, or
where a process held more threads or descriptors in the second half than in the first, beyond one a
client, or `GROWTH` of its memory more at the end than at the half.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from astra_runtime.console import say
from bench.report import command_line, quiet_transformers, write
from bench.service.faults import sample
from bench.service.malformed import answer_to as malformed_answer
from bench.service.malformed import leaver, problem_of, request_of
from bench.service.server import Server, serving

TOPICS = ("a river", "an old bridge", "the winter", "a small boat", "bread", "the night sky")
TURNS = 6  # of a conversation, before the next one
ANSWER_TOKENS = 16
READING_SECONDS = 30.0
GROWTH = 0.02
SETTLED = 0.5  # of the time; what comes before is not judged


class Client:
    """One of those who ask. `wrong` and `done` are shared by all of them."""

    def __init__(self, server: Server, seed: int, done: Counter[str], wrong: list[str]) -> None:
        self.server, self.random = server, random.Random(seed)
        self.done, self.wrong = done, wrong
        self.messages: list[dict[str, str]] = []
        self.kinds: dict[str, Callable[[], str]] = {
            "turn": self._turn,
            "document": self._document,
            "several": self._several,
            "left": lambda: leaver(self.server),
            "malformed": self._malformed,
        }

    def run(self, over: threading.Event, pause: float) -> None:
        while not over.is_set():
            (kind,) = self.random.choices(list(self.kinds), (10, 3, 1, 2, 4))
            try:
                problem = self.kinds[kind]()
            except (OSError, ValueError, LookupError) as error:
                problem = f"{type(error).__name__}: {error}"
            if problem:
                self.wrong.append(f"{kind}: {problem}")
            self.done[kind] += 1
            over.wait(self.random.uniform(0, 2 * pause))

    def _turn(self) -> str:
        if len(self.messages) >= 2 * TURNS:
            self.messages = []
        topic = self.random.choice(TOPICS)
        self.messages.append({"role": "user", "content": f"Say something about {topic}."})
        answer = self._post("/v1/chat/completions", messages=self.messages)
        self.messages.append(answer["choices"][0]["message"])
        return ""

    def _document(self) -> str:
        days = self.random.sample(range(1000), 40)
        text = " ".join(f"On day {day} {self.random.choice(TOPICS)} was seen." for day in days)
        for question in ("What was seen first?", "What was seen last?"):
            answer = self._post("/v1/completions", prompt=f"{text}\n{question}")
            if answer["usage"]["completion_tokens"] > ANSWER_TOKENS:
                return f"too long: {answer['usage']}"
        return ""

    def _several(self) -> str:
        prompt = f"Once upon a time {self.random.choice(TOPICS)}"
        answer = self._post("/v1/completions", prompt=prompt, n=3, temperature=1.0)
        return "" if len(answer["choices"]) == 3 else f"{len(answer['choices'])} answers, not 3"

    def _malformed(self) -> str:
        return problem_of(*malformed_answer(self.server, request_of(self.random)))

    def _post(self, path: str, **body: Any) -> Any:
        """The answer. Raises ValueError for one with another status than 200."""
        content = {"model": "bench", "max_tokens": ANSWER_TOKENS, "temperature": 0} | body
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.url + path, json.dumps(content).encode(), head)
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise ValueError(f"{error.code}: {error.read()!r}") from error


def read(server: Server) -> list[dict[str, int]]:
    """What every process holds, the leader first."""
    return [sample(process) for process in (server.process.pid, *sorted(server.workers()))]


def live(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """The hour: what was asked, what was wrong, and the readings."""
    done: Counter[str] = Counter()
    wrong: list[str] = []
    over = threading.Event()
    clients = [Client(server, options.seed + n, done, wrong) for n in range(options.clients)]
    threads = [threading.Thread(target=one.run, args=(over, options.pause)) for one in clients]
    for thread in threads:
        thread.start()
    start = time.monotonic()
    readings, told = [], 0
    while (passed := time.monotonic() - start) < 60 * options.minutes:
        processes = read(server)
        readings.append({"seconds": round(passed, 1), "processes": processes})
        for problem in wrong[told:]:
            say(f"  wrong: {problem}")
        told = len(wrong)
        held = ", ".join(f"{p['bytes'] / 2**20:.0f} MiB" for p in processes)
        say(f"  {passed / 60:.1f} min: {sum(done.values())} requests, {held}")
        over.wait(min(READING_SECONDS, 6 * options.minutes))
    over.set()
    for thread in threads:
        thread.join()
    restarts = server.get("/v1/astra/status")[1]["lost"]
    if restarts:
        wrong.append(f"the mesh has ended {restarts} times")
    return {"requests": dict(done), "wrong": wrong, "readings": readings}


def growth(readings: list[dict[str, Any]]) -> list[dict[str, float]]:
    """By process: most threads and descriptors of each half, a line through the second's memory.

    readings: of the same processes; `live` says so where a worker was started again.
    """
    half = int(SETTLED * len(readings))
    rows = []
    for number in range(len(readings[0]["processes"])):
        held = [reading["processes"][number] for reading in readings]
        seconds = np.array([reading["seconds"] for reading in readings[half:]])
        memory = np.array([one["bytes"] for one in held[half:]], dtype=float)
        slope = float(np.polyfit(seconds, memory, 1)[0]) if len(seconds) > 1 else 0.0
        row = {"bytes": float(memory[0]), "bytes_an_hour": 3600 * slope}
        row["grown"] = slope * float(seconds[-1] - seconds[0]) / float(memory[0])
        for name in ("threads", "descriptors"):
            row[f"{name}_before"] = max(one[name] for one in held[:half] or held)
            row[f"{name}_after"] = max(one[name] for one in held[half:])
        rows.append(row)
    return rows


def grown(rows: list[dict[str, float]], clients: int) -> list[str]:
    """What the processes hold more of than they should; a client may be at work when it is read."""
    problems = []
    for number, row in enumerate(rows):
        if row["grown"] > GROWTH:
            problems.append(f"rank {number}: {row['grown']:.1%} more memory")
        for name in ("threads", "descriptors"):
            if row[f"{name}_after"] > row[f"{name}_before"] + clients:
                before, after = row[f"{name}_before"], row[f"{name}_after"]
                problems.append(f"rank {number}: {after:g} {name}, {before:g} before")
    return problems


def main(arguments: Sequence[str] | None = None) -> None:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="bench.service.soak", description=about)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--pause", type=float, default=6.0, help="seconds, the mean of a client's")
    parser.add_argument("--memory", type=int, default=256, help="MiB, of `astra serve`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="service_soak", help="of the result")
    options = parser.parse_args(arguments)
    quiet_transformers()
    with serving(options.model, options.ranks, 0, 0, "--memory", str(options.memory)) as server:
        found = live(server, options)
    rows = growth(found["readings"])
    found["wrong"] += grown(rows, options.clients)
    path = write(
        options.name,
        rows,
        command=command_line("bench.service.soak", arguments),
        packages=("torch", "transformers", "starlette", "uvicorn"),
        extra={"minutes": options.minutes, **found},
    )
    say(f"wrote {path}: {found['requests']}, {rows}")
    for problem in found["wrong"]:
        say(f"  wrong: {problem}")
    if found["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
