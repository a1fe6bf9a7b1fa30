"""Do the links agree? One exchange of two ranks on all three, side by side.

    python -m bench.link           # writes bench/results/<device>/link.json; about a minute
    python -m bench.link --no-write --repeats 5

A tiny llama on two ranks, dense keys and values and then codes: on the virtual link, in two
processes behind the switch, and in two processes whose senders pace themselves (`astra_runtime`'s
`Link`). Time runs from the input on both ranks until both have the last token's logits. All three
charge TCP and IP headers and no Ethernet framing here, which pacing does not know.

How exact the switch is comes first: one-way times of single packets, and a bulk transfer, with the
share of a core that the switch took for it.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from astra_runtime import Engine
from astra_runtime.codes.registry import codec_named
from bench.exchange import free_ports
from bench.link.model import Link
from bench.link.rank import WARM_UP, Settings, command, outputs_of, popen_options, task
from bench.link.switch import Namespaces, Report, unavailable
from bench.link.virtual import SocketCosts, VirtualMesh, World
from bench.report import Case, Times, command_line, percentiles, write

UDP_IP = 28  # header bytes of a datagram
PATIENCE = 180.0  # seconds for the processes of one case


def single_packets(net: Namespaces, size: int, count: int) -> list[float]:
    """One-way seconds of datagrams of `size` bytes from rank 0 to rank 1, each on an idle link."""

    def bound(rank: int) -> socket.socket:
        end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        end.bind((net.addresses[rank], 0))
        end.settimeout(60)
        return end

    out, into = (net.inside(rank, partial(bound, rank)) for rank in (0, 1))
    taken = []
    with out, into:
        for _ in range(count):
            start = time.perf_counter()
            out.sendto(bytes(size), into.getsockname())
            into.recv(size)
            taken.append(time.perf_counter() - start)
            time.sleep(2e-3)
    return taken


def expected_packet(link: Link, size: int) -> float:
    return (size + UDP_IP + link.ethernet) * 8e-6 / link.mbit_per_s + link.delay


def bulk(net: Namespaces, size: int) -> tuple[float, Report]:
    """Seconds that `size` bytes take over TCP, without connecting, and what the switch did."""
    address = (net.addresses[1], 5001)
    with net.inside(1, lambda: socket.create_server(address)) as server:
        out = net.inside(0, lambda: socket.create_connection(address))
        into, _ = server.accept()
    with out, into:
        before, got = net.report(), 0
        sender = threading.Thread(target=out.sendall, args=(bytes(size),))
        start = time.perf_counter()
        sender.start()
        while got < size:
            got += len(into.recv(1 << 20))
        seconds = time.perf_counter() - start
        sender.join()
    return seconds, net.report() - before


def switch_case(mbit: float, rtt_ms: float, count: int) -> Case:
    """How late single packets are, and what bulk takes of the rate."""
    link = Link(mbit, rtt_ms=rtt_ms)
    with Namespaces(2, link) as net:
        packets = {size: single_packets(net, size, count) for size in (320, 1472)}
        size = round(mbit * 62_500)  # half a second
        seconds, report = bulk(net, size)
    late = {
        f"{size}B": 1e3 * (statistics.median(taken) - expected_packet(link, size))
        for size, taken in packets.items()
    }
    return Case(
        name=f"switch_{mbit:g}mbit",
        shape={"world_size": 2, "mbit_per_s": mbit, "rtt_ms": rtt_ms, "N": 320},
        dtype="uint8",
        impl="switch",
        ms=percentiles([1e3 * t for t in packets[320]]),
        floor_ms=1e3 * expected_packet(link, 320),
        extra={
            "late_ms": late,
            "bulk": {
                "bytes": size,
                "ms": 1e3 * seconds,
                "floor_ms": 1e3 * (link.seconds(size) + link.delay),
                "cpu_share_of_switch": report.cpu_share,
            },
        },
    )


@dataclass(frozen=True)
class Taken:
    """By repeat: seconds until the last rank had finished, and computing of all ranks together."""

    seconds: list[float]
    computing: list[float]

    @classmethod
    def of(cls, ranks: Sequence[Sequence[tuple[float, float]]]) -> Taken:
        """From each rank's pairs of finish and computing."""
        repeats = list(zip(*ranks, strict=True))
        return cls(
            [max(seconds for seconds, _ in repeat) for repeat in repeats],
            [sum(computing for _, computing in repeat) for repeat in repeats],
        )


def on_virtual(link: Link, space: str, tokens: int, repeats: int) -> Taken:
    todo = task(space, tokens)

    def work(mesh: VirtualMesh) -> list[tuple[float, float]]:
        taken = []
        with Engine(todo.model, todo.codebook, mesh) as engine:
            for _ in range(WARM_UP + repeats):
                mesh.start()
                engine(input_ids=todo.input_ids)
                taken.append(mesh.lap()[:2])
        return taken[WARM_UP:]

    run = World(2, link, costs=SocketCosts.measured()).run(work)
    return Taken.of(run.results)


def on_switch(link: Link, space: str, tokens: int, repeats: int) -> tuple[Taken, Report]:
    with Namespaces(2, link) as net:
        addresses = [f"{address}:5000" for address in net.addresses]
        settings = [Settings(rank, addresses, space, tokens, repeats) for rank in range(2)]
        processes = [net.launch(own.rank, command(own), **popen_options()) for own in settings]
        return _finish(processes), net.report()


def on_paced(link: Link, space: str, tokens: int, repeats: int) -> Taken:
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    paced = (link.mbit_per_s, link.rtt_ms / 2)
    settings = [Settings(rank, addresses, space, tokens, repeats, paced) for rank in range(2)]
    return _finish([subprocess.Popen(command(own), **popen_options()) for own in settings])


def _finish(processes: Sequence[subprocess.Popen[bytes]]) -> Taken:
    return Taken.of([json.loads(own) for own in outputs_of(processes, PATIENCE)])


def comparison(link: Link, space: str, tokens: int, repeats: int) -> Case:
    """The same exchange on each link; `agreement` is the others' median over the virtual one's.

    That of the fastest repeats tells the links apart from other work on the machine, which makes
    processes late but no virtual clock. `computing_ms` is CPU time, all ranks together.
    """
    ms: dict[str, Times] = {}
    fastest: dict[str, float] = {}
    computing: dict[str, float] = {}

    def keep(name: str, taken: Taken) -> None:
        ms[name] = percentiles([1e3 * t for t in taken.seconds])
        fastest[name] = 1e3 * min(taken.seconds)
        computing[name] = 1e3 * statistics.median(taken.computing)

    keep("virtual", on_virtual(link, space, tokens, repeats))
    keep("paced", on_paced(link, space, tokens, repeats))
    extra: dict[str, Any] = {}
    missing = unavailable()
    if missing:
        extra["switch"] = {"unavailable": missing}
    else:
        taken, report = on_switch(link, space, tokens, repeats)
        keep("switch", taken)
        extra["switch"] = {"cpu_share": report.cpu_share, "late_mean_ms": 1e3 * report.late_mean}
    own = ms.pop("virtual")
    return Case(
        name=f"link_{space if codec_named(space).coded else 'dense'}_{link.mbit_per_s:g}mbit",
        shape={
            "model": "tiny llama",
            "tokens": tokens,
            "world_size": 2,
            "mbit_per_s": link.mbit_per_s,
            "rtt_ms": link.rtt_ms,
            "space": space,
        },
        dtype="float32",
        impl="virtual",
        ms=own,
        peers={name: times.p50 for name, times in ms.items()},
        extra={
            "agreement": {name: times.p50 / own.p50 for name, times in ms.items()},
            "agreement_of_fastest": {name: fastest[name] / fastest["virtual"] for name in ms},
            "computing_ms": computing,
            "peers_ms": {name: asdict(times) for name, times in ms.items()},
            **extra,
        },
    )


def summary(case: Case) -> str:
    parts = [f"{case.name:22} {case.impl} {case.ms.p50:.3f} ms"]
    if case.floor_ms is not None:
        parts.append(f"roofline {case.floor_ms:.3f}")
    for name, ms in case.peers.items():
        median, least = case.extra["agreement"][name], case.extra["agreement_of_fastest"][name]
        parts.append(f"{name} {ms:.3f} ({median:.3f}x, fastest {least:.3f}x)")
    parts += [f"{key} {case.extra[key]}" for key in ("bulk", "computing_ms") if key in case.extra]
    return " | ".join(parts)


def main(arguments: Sequence[str] | None = None) -> list[Case]:
    parser = argparse.ArgumentParser(prog="bench.link", description=__doc__.splitlines()[0])
    parser.add_argument("--mbit", type=float, default=10.0, help="of the comparison")
    parser.add_argument("--rtt-ms", type=float, default=2.0)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument(
        "--rates", type=float, nargs="*", default=[10, 100, 500], help="of the switch"
    )
    parser.add_argument("--packets", type=int, default=200, help="single ones, of each size")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    cases: list[Case] = []

    def add(case: Case) -> None:
        cases.append(case)
        print(summary(case), file=sys.stderr, flush=True)

    if not unavailable():
        for rate in options.rates:
            add(switch_case(rate, 0.2, options.packets))
    link = Link(options.mbit, rtt_ms=options.rtt_ms, ethernet=0)
    for space in ("none", "kv"):
        add(comparison(link, space, options.tokens, options.repeats))
    if not options.no_write:
        packages = ("torch", "numpy", "transformers")
        line = command_line("bench.link", arguments)
        write("link", cases, command=line, packages=packages, link=asdict(link))
    return cases


if __name__ == "__main__":
    main()
