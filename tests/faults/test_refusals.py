"""Who does not belong is refused, and both sides can read why."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from astra_runtime.transport import Mesh, connect
from tests.runtime.ranks import (
    all_to_all,
    as_ranks,
    environment,
    free_ports,
    key_folder,
    together,
)

from .forks import Forks
from .report import Row

COMMAND = "python -m pytest -m faults tests/faults/test_refusals.py"
PATIENCE = 2.0  # seconds an acceptor waits on for the right peer, since a stranger ends nothing
JOINED_MS = 1000.0
SILENT, GARBAGE = 1000, 1000

pytest.importorskip("cryptography")
pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


@dataclass
class Refusal:
    """Two processes that do not belong together, and what each has to say.

    ranks: options of `refusals.join`, whose `peers` are made of `places`: a rank's number, or None
    for an address where nobody is. words: what the first and the last process must tell of why.
    """

    name: str
    ranks: list[dict[str, Any]]
    words: tuple[str, str]
    places: list[list[int]] = field(default_factory=lambda: [[0, 1], [0, 1]])


def forged(folder: Path) -> str:
    """Rank 1's keys of another authority, that trusts ours."""
    shutil.copytree(key_folder("theirs") / "rank-1", folder)
    shutil.copy(key_folder() / "authority.pem", folder / "authority.pem")
    return str(folder)


def refusals(folder: Path) -> list[Refusal]:
    ours, theirs = str(key_folder()), str(key_folder("theirs"))
    waits, first = {"wait": PATIENCE}, {"number": 0, "keys": ours}
    second = {"number": 1, "keys": ours}
    same = lambda words: (words, words)  # noqa: E731
    found = [
        Refusal(
            "certificate of another rank",
            [first | waits, second | {"keys": f"{ours}/rank-2"}],
            same("the certificate of rank 2 was shown for rank 1"),
        ),
        Refusal(
            "acceptor with the certificate of another rank",
            [first | waits | {"keys": f"{ours}/rank-3"}, second],
            same("the certificate of rank 3 was shown for rank 0"),
        ),
        Refusal(
            "another authority",
            [first | waits, second | {"keys": theirs}],
            ("refused this rank's certificate: unknown authority", "of another authority"),
        ),
        Refusal(
            "a certificate of another authority",
            [first | waits, second | {"keys": forged(folder / "forged")}],
            ("of another authority", "refused this rank's certificate: unknown authority"),
        ),
        Refusal(
            "plaintext to a port with keys",
            [first | waits, second | {"keys": None}],
            same("plaintext came, and rank 0 accepts TLS only"),
        ),
        Refusal(
            "TLS to a port without keys",
            [first | waits | {"keys": None}, second],
            same("TLS came, and rank 0 has no keys"),
        ),
        Refusal(
            "another version",
            [first, second | {"version": 7}],
            same("protocol version 7 came, this rank speaks 2"),
        ),
        Refusal(
            "another world",
            [first, second],
            same("rank 1 has world size 3, rank 0 has 2"),
            [[0, 1], [0, 1, 2]],
        ),
        Refusal(
            "another rank's address",
            [second | waits, {"number": 2, "keys": None, "wait": 10.0}],
            same("rank 2 looks for rank 0 where rank 1 is"),
            [[2, 0, 1], [0, 3, 1]],
        ),
        Refusal(
            "a rank twice",
            [first | {"wait": 2 * PATIENCE}, second, second | {"after": 1.0}],
            same("rank 1 has joined already: two processes claim it"),
            [[0, 1, 2], [0, 1, 2], [0, 3, 2]],
        ),
    ]
    found[-2].ranks[0]["keys"] = None  # inside TLS the certificate is what is wrong
    for fact in ("model", "codebook", "plan"):
        alike = first | {"other": "dense"} if fact == "model" else first
        ranks = [alike, second | {"other": fact}]
        found.append(Refusal(f"another {fact}", ranks, same(f" {fact} ")))
    return found


def try_refusal(forks: Forks, case: Refusal, row: Row) -> None:
    ports = free_ports(4)
    tasks = [
        ("tests.faults.refusals:join", options | {"peers": [ports[n] for n in places]})
        for options, places in zip(case.ranks, case.places, strict=True)
    ]
    outcomes = forks.run(tasks, seconds=30.0)
    sides = (outcomes[0].told, outcomes[-1].told)
    for told, words in zip(sides, case.words, strict=True):
        if not told.get("refused") or words not in told["words"]:
            row.count(f"{case.name}: expected {words!r} on both sides, got {outcomes}")
            return
    row.count(None, sides[1]["ms"] - 1e3 * case.ranks[-1].get("after", 0.0))


def test_refusals(forks: Forks, record: Callable[[Row], None], tmp_path: Path) -> None:
    row = Row("refusals", COMMAND)
    cases = refusals(tmp_path)
    for case in cases:
        try_refusal(forks, case, row)
    row.extra["cases"] = [case.name for case in cases]
    record(row)
    row.check()


def seconds_to_join(when: str) -> float:
    """Beside 2,000 strangers, some like TLS: while they come ("go"), or when all are there."""
    from tests.runtime.transport.test_tls_refusals import STRANGERS

    ours, peers = key_folder(), free_ports(2)
    took: list[float] = []

    def good_peer() -> Mesh:
        host, port = peers[0].split(":")
        command = [sys.executable, "-c", STRANGERS, host, port, str(SILENT), str(GARBAGE)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        ) as strangers:
            assert strangers.stdout is not None
            try:
                while strangers.stdout.readline().strip() != when:
                    pass
                start = time.monotonic()
                mesh = connect(1, 2, peers, keys=ours)
                took.append(time.monotonic() - start)
            finally:
                strangers.kill()
        return mesh

    meshes = together([lambda: connect(0, 2, peers, keys=ours), good_peer])
    as_ranks(meshes, lambda mesh: all_to_all(mesh, 2, 50))
    return took[0]


def test_connections(record: Callable[[Row], None]) -> None:
    row = Row("connections", COMMAND)
    for when in ("go", "open") * 3:
        ms = 1e3 * seconds_to_join(when)
        for _ in range(SILENT + GARBAGE):
            row.count(None if ms <= JOINED_MS else f"{when}: joined after {ms:.0f} ms")
        row.ms.append(ms)
    record(row)
    row.check()
