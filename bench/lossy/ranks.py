"""A frame a block between two processes behind a switch that loses packets.

Each rank is a process in a network namespace: `python -m bench.lossy.ranks SETTINGS`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from astra_runtime import connect
from astra_runtime.console import say
from astra_runtime.transport import Mesh
from astra_runtime.transport.certificates import ephemeral_keys
from astra_runtime.transport.datagram import connect_datagrams
from astra_runtime.transport.fragments import FEC_GROUP
from astra_runtime.transport.tcp import TcpMesh
from bench.link.model import Link
from bench.link.rank import popen_options
from bench.link.switch import Namespaces
from bench.report import Case, percentiles

METHODS: Final = ("tcp", "tcp_deadline", "datagram_plain", "datagram")
PATIENCE: Final = 600.0  # seconds: TCP's for one block (it backs off for up to 120), and to join

Call = Sequence[tuple[float, float]]  # of each block: seconds, share of the other's bytes received


@dataclass(frozen=True)
class Settings:
    """What a rank runs. `size`: bytes of a frame; `pause`, `deadline`: seconds."""

    rank: int
    hosts: list[str]
    keys: str
    size: int
    blocks: int
    pause: float
    deadline: float


def rank_main(setup: Settings) -> None:
    """Makes a mesh for each method, then takes orders from standard input, one call a line:
    a method and the moment to begin. Answers with a line of JSON: per block seconds and the share
    of the other's bytes received."""
    meshes: dict[str, Mesh] = {}
    for port, method in enumerate(METHODS, 5000):
        peers = [f"{host}:{port}" for host in setup.hosts]
        mesh = connect(
            setup.rank, 2, peers, keys=setup.keys, timeout=PATIENCE, connect_timeout=PATIENCE
        )
        if method.startswith("datagram"):
            assert isinstance(mesh, TcpMesh)
            parity = 0 if method == "datagram_plain" else FEC_GROUP
            mesh = connect_datagrams(mesh, fec_group=parity, connect_timeout=PATIENCE)
        meshes[method] = mesh
    print("ready", flush=True)
    for line in sys.stdin:
        method, moment = line.split()
        wait_until(float(moment))
        deadline = None if method == "tcp" else setup.deadline
        print(json.dumps(one_call(meshes[method], setup, deadline)), flush=True)
    for mesh in meshes.values():
        mesh.close()


def wait_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def one_call(mesh: Mesh, setup: Settings, deadline: float | None) -> Call:
    """All blocks: (seconds of the exchange, share of the bytes received)."""
    other, frame, taken = 1 - setup.rank, mesh.buffer(setup.size), []
    for block in range(setup.blocks):
        time.sleep(setup.pause)
        partial, start = deadline is not None, time.perf_counter()
        mesh.send(frame, block=block, plan=1, to=[other], partial=partial)
        sizes = {other: setup.size}
        views = mesh.receive(sizes, block=block, plan=1, timeout=deadline, partial=partial)
        seconds = time.perf_counter() - start
        missing = sum(stop - start for start, stop in mesh.missing_ranges.get(other, ()))
        taken.append((seconds, 1 - missing / setup.size if other in views else 0.0))
    return taken


def latency(options: argparse.Namespace) -> list[Case]:
    cases = []
    for rtt in options.rtt_ms:
        for loss in options.losses:
            link = Link(options.mbit, rtt_ms=rtt, loss=loss, seed=options.seed)
            cases.append(case_of(link, exchanged(link, options), options))
            say(f"rtt {rtt:g} ms, loss {loss:.0%}: {json.dumps(cases[-1].as_dict())}")
    return cases


def exchanged(link: Link, options: argparse.Namespace) -> dict[str, list[Call]]:
    """What each rank's calls took, by method; methods take turns."""
    with Namespaces(2, link) as net, ephemeral_keys(2) as keys:
        ranks = []
        for rank in range(2):
            setup = Settings(
                rank,
                net.addresses,
                str(keys),
                options.size,
                options.blocks,
                options.pause_ms * 1e-3,
                options.deadline_ms * 1e-3,
            )
            command = [sys.executable, "-m", "bench.lossy.ranks", json.dumps(asdict(setup))]
            pipes = {**popen_options(), "stdin": subprocess.PIPE, "text": True}
            ranks.append(net.launch(rank, command, **pipes))
        for process in ranks:
            answer(process)
        calls: dict[str, list[Call]] = {method: [] for method in METHODS}
        spent = dict.fromkeys(METHODS, 0.0)
        for _ in range(1 + options.calls):
            for method in METHODS:
                if spent[method] > options.seconds:
                    continue
                moment = time.monotonic() + 0.1  # what was late before has come by then
                for process in ranks:
                    assert process.stdin is not None
                    process.stdin.write(f"{method} {moment!r}\n")
                    process.stdin.flush()
                calls[method] += [json.loads(answer(process)) for process in ranks]
                spent[method] += time.monotonic() - moment
        for process in ranks:
            process.communicate(timeout=PATIENCE)  # the end of their orders
    return {method: of_method[2:] for method, of_method in calls.items()}  # the first call warms up


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a rank failed; what it said stands above")
    return line


def case_of(link: Link, calls: dict[str, list[Call]], options: argparse.Namespace) -> Case:
    """Milliseconds of a block's exchange, over blocks, calls and ranks."""
    figures = {method: summary(of_method) for method, of_method in calls.items()}
    ms = figures["datagram"]["ms"]
    baselines = [method for method in METHODS if method != "datagram"]
    return Case(
        f"lossy_exchange_rtt{link.rtt_ms:g}_loss{100 * link.loss:g}",
        {
            "world_size": 2,
            "mbit_per_s": link.mbit_per_s,
            "rtt_ms": link.rtt_ms,
            "loss": link.loss,
            "bytes": options.size,
            "blocks": options.blocks,
        },
        "uint8",
        "astra datagram",
        percentiles([1e3 * seconds for call in calls["datagram"] for seconds, _ in call]),
        floor_ms=1e3 * (link.seconds(options.size) + link.delay),
        peers={name: figures[name]["ms"]["p50"] for name in baselines},
        extra={
            "ms": ms,
            "peers_p99": {name: figures[name]["ms"]["p99"] for name in baselines},
            "call_ms": {name: figures[name]["call_ms"] for name in METHODS},
            "came": {name: figures[name]["came"] for name in METHODS},
            "calls": {name: len(calls[name]) for name in METHODS},
            "pause_ms": options.pause_ms,
            "deadline_ms": options.deadline_ms,
            "seed": link.seed,
        },
    )


def summary(calls: Sequence[Call]) -> dict[str, Any]:
    """Percentiles of a block's milliseconds, a call's p50 and p99 without its pauses, and the share
    of all bytes received."""
    blocks = sorted(1e3 * seconds for call in calls for seconds, _ in call)
    whole = sorted(1e3 * sum(seconds for seconds, _ in call) for call in calls)
    return {
        "ms": {f"p{p}": nearest(blocks, p) for p in (20, 50, 80, 99)},
        "call_ms": {f"p{p}": nearest(whole, p) for p in (50, 99)},
        "came": statistics.fmean(share for call in calls for _, share in call),
    }


def nearest(ordered: Sequence[float], percent: int) -> float:
    return ordered[math.ceil(percent / 100 * len(ordered)) - 1]


if __name__ == "__main__":
    rank_main(Settings(**json.loads(sys.argv[1])))
