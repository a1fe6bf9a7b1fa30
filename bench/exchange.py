"""One block's all-to-all exchange on loopback: ours over TCP, gloo's all_gather, ZeroMQ.

    python -m bench.exchange     # writes bench/results/<device>/exchange.json; about two minutes
    python -m bench.exchange --exchanges 500 --worlds 2 --sizes 320 --no-write
    python -m bench.exchange --tls --worlds 2 --sizes 320 131072    # writes exchange_tls.json

With --tls ours is mutual TLS 1.3, and stands beside itself in plaintext (`astra tcp`) as well as
the others; `connect_ms` is what joining costs the rank that dials all others, either way.

Every rank is a process. All three run in the same processes, in rounds that take turns, so that
whatever else the machine does meets them alike. An exchange is timed on every rank from the first
send to the last received byte, and all ranks' samples are pooled. Correctness is checked first.
The roofline is half a round trip of the payload between two processes over plain blocking sockets.
`costs` are of one exchange on one rank, of each system: its mean, and the processor time and the
context switches that the kernel counts for the process, with all of its threads.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import random
import resource
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.queues import Queue
from typing import Any

import numpy as np

from bench.report import Case, Times, command_line, write

ROUNDS = 20
BASELINES = ("gloo", "zeromq")
CONNECTS = 21  # times that a mesh is made to be timed; the first, which loads modules, not counted
WARM_UP = 10  # exchanges at the start of a round that are not counted


@dataclass(frozen=True)
class Tailed(Times):
    """An exchange waits for the slowest rank, so the tail is what a long prompt feels."""

    p99: float


@dataclass(frozen=True)
class Exchange(Case):
    """A case with the baselines' tails."""

    peers_p99: Mapping[str, float] = field(default_factory=dict)


def pattern(rank: int, block: int, size: int) -> bytes:
    """What `rank` sends at `block`: no two of them alike."""
    return bytes((rank * 31 + block * 7 + position) % 251 for position in range(size))


class Astra:
    """Ours: frames over the TCP mesh."""

    name = "astra tcp"
    ports = "astra"
    keys: str | None = None

    def __init__(self, rank: int, ports: dict[str, list[int]], size: int) -> None:
        from astra_runtime.transport import peers_of

        self.mesh = self.join(rank, ports)
        self.others = peers_of(self.mesh)
        self.frame = self.mesh.buffer(size)
        self.payload = np.frombuffer(self.frame.payload, np.uint8)
        self.sizes = dict.fromkeys(self.others, size)

    @classmethod
    def join(cls, rank: int, ports: dict[str, list[int]]) -> Any:
        from astra_runtime.transport import connect

        addresses = [f"127.0.0.1:{port}" for port in ports[cls.ports]]
        keys = cls.keys
        return connect(rank, len(addresses), addresses, keys=keys, insecure=keys is None)

    def exchange(self, block: int) -> Any:
        self.mesh.send(self.frame, block=block, plan=1, to=self.others)
        return self.mesh.receive(self.sizes, block=block, plan=1)

    def close(self) -> None:
        self.mesh.close()


class AstraTls(Astra):
    """The same frames inside mutual TLS 1.3."""

    name = "astra_tls"
    ports = "astra_tls"


class Gloo:
    """torch.distributed's all_gather into preallocated tensors."""

    name = "gloo"

    def __init__(self, rank: int, ports: dict[str, list[int]], size: int) -> None:
        import torch
        import torch.distributed as dist

        self.dist = dist
        world_size = len(ports["astra"])
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{ports['gloo'][0]}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        self.tensor = torch.zeros(size, dtype=torch.uint8)
        self.payload = self.tensor.numpy()
        self.gathered = [torch.zeros(size, dtype=torch.uint8) for _ in range(world_size)]
        self.others = [other for other in range(world_size) if other != rank]

    def exchange(self, block: int) -> Any:
        self.dist.all_gather(self.gathered, self.tensor)
        return {other: self.gathered[other].numpy() for other in self.others}

    def close(self) -> None:
        self.dist.destroy_process_group()


class ZeroMQ:
    """A full mesh of PAIR sockets; messages of 64 KiB and more without copies, as pyzmq advises."""

    name = "zeromq"

    def __init__(self, rank: int, ports: dict[str, list[int]], size: int) -> None:
        import zmq

        self.context = zmq.Context()  # type: ignore[attr-defined]
        self.copy = size < zmq.COPY_THRESHOLD
        self.data = bytearray(size)
        self.payload = np.frombuffer(self.data, np.uint8)
        self.sockets = {}
        world_size = len(ports["astra"])
        for other in range(world_size):
            if other == rank:
                continue
            self.sockets[other] = link = self.context.socket(zmq.PAIR)  # type: ignore[attr-defined]
            low, high = sorted((rank, other))
            address = f"tcp://127.0.0.1:{ports['zeromq'][low * world_size + high]}"
            if rank == low:
                link.bind(address)
            else:
                link.connect(address)

    def exchange(self, block: int) -> Any:
        for link in self.sockets.values():
            link.send(self.data, copy=self.copy)
        if self.copy:
            return {other: link.recv() for other, link in self.sockets.items()}
        return {other: link.recv(copy=False).buffer for other, link in self.sockets.items()}

    def close(self) -> None:
        self.context.destroy(linger=1000)


def check(system: Any, rank: int, world_size: int, size: int) -> None:
    """Every payload arrives whole, block by block; raises where it does not."""
    for block in range(3):
        system.payload[:] = np.frombuffer(pattern(rank, block, size), np.uint8)
        received = system.exchange(block)
        for other in set(range(world_size)) - {rank}:
            if bytes(received[other]) != pattern(other, block, size):
                raise AssertionError(f"{system.name}: wrong payload of rank {other}")


def measure(system: Any, exchanges: int) -> list[int]:
    """Nanoseconds of each exchange of one round."""
    samples = []
    for block in range(WARM_UP + exchanges):
        start = time.perf_counter_ns()
        system.exchange(block)
        samples.append(time.perf_counter_ns() - start)
    return samples[WARM_UP:]


def usage() -> np.ndarray[Any, np.dtype[np.float64]]:
    """Seconds of the processor and context switches of this process, as the kernel counts them."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return np.array([used.ru_utime + used.ru_stime, used.ru_nvcsw + used.ru_nivcsw])


def round_trips(rank: int, port: int, size: int, exchanges: int) -> list[int]:
    """Nanoseconds of round trips between ranks 0 and 1 over plain blocking sockets."""
    if rank > 1:
        return []
    if rank == 0:
        with socket.create_server(("127.0.0.1", port)) as server:
            link, _ = server.accept()
    else:
        link = dial(port)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data, samples = bytearray(size), []
    with link:
        for _ in range(WARM_UP + exchanges):
            start = time.perf_counter_ns()
            if rank == 0:
                link.sendall(data)
                receive_exactly(link, data)
            else:
                receive_exactly(link, data)
                link.sendall(data)
            samples.append(time.perf_counter_ns() - start)
    return samples[WARM_UP:] if rank == 0 else []


def dial(port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.01)


def receive_exactly(link: socket.socket, data: bytearray) -> None:
    view, filled = memoryview(data), 0
    while filled < len(data):
        filled += link.recv_into(view[filled:])


def connecting(kind: type[Astra], rank: int, ports: dict[str, list[int]]) -> list[int]:
    """Nanoseconds in which the last rank joins, which dials all others while they listen."""
    samples = []
    for _ in range(CONNECTS):
        time.sleep(0.02 * rank)
        start = time.perf_counter_ns()
        mesh = kind.join(rank, ports)
        samples.append(time.perf_counter_ns() - start)
        others = [other for other in range(mesh.world_size) if other != rank]
        mesh.send(b"", block=0, plan=1, to=others)
        mesh.receive(dict.fromkeys(others, 0), block=0, plan=1)
        mesh.close()
    return samples[1:] if rank == mesh.world_size - 1 else []


def run_rank(
    rank: int,
    ports: dict[str, list[int]],
    size: int,
    exchanges: int,
    keys: str | None,
    results: Queue[Any],
) -> None:
    import torch

    torch.set_num_threads(1)
    world_size = len(ports["astra"])
    trips = round_trips(rank, ports["roofline"][0], size, 1000)
    samples: dict[str, list[int]] = {"roofline": trips}
    kinds: list[Any] = [Astra, Gloo, ZeroMQ]
    if keys is not None:
        AstraTls.keys = keys
        kinds.insert(1, AstraTls)
        for kind in (Astra, AstraTls):
            samples[f"connect {kind.name}"] = connecting(kind, rank, ports)
    systems = [kind(rank, ports, size) for kind in kinds]
    for system in systems:
        check(system, rank, world_size, size)
        samples[system.name] = []
    per_round = -(-exchanges // ROUNDS)
    used = {system.name: np.zeros(2) for system in systems}
    for _ in range(ROUNDS):
        for system in systems:
            before = usage()
            samples[system.name] += measure(system, per_round)
            used[system.name] += (usage() - before) / (ROUNDS * (WARM_UP + per_round))
    for system in systems:
        system.close()
    results.put((samples, used))


def free_ports(count: int) -> list[int]:
    """Ports nobody listens at, below the range that the kernel hands to outgoing dials."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
    return ports


def run_case(world_size: int, size: int, exchanges: int, keys: str | None) -> Exchange:
    """One case; `keys`: a folder of keys, for the case with TLS."""
    numbers = free_ports(2 * world_size + 2 + world_size * world_size)
    ports = {
        "astra_tls": [numbers.pop() for _ in range(world_size)],
        "astra": numbers[:world_size],
        "gloo": numbers[world_size : world_size + 1],
        "roofline": numbers[world_size + 1 : world_size + 2],
        "zeromq": numbers[world_size + 2 :],
    }
    context = multiprocessing.get_context("spawn")
    results: Queue[Any] = context.Queue()
    processes = [
        context.Process(
            target=run_rank, args=(rank, ports, size, exchanges, keys, results), daemon=True
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    parts, used = zip(*(results.get(timeout=600) for _ in processes), strict=True)
    for process in processes:
        process.join()
    pooled = {name: np.concatenate([part[name] for part in parts]) / 1e6 for name in parts[0]}

    def ms(name: str) -> Tailed:
        return Tailed(*(float(np.percentile(pooled[name], p)) for p in (20, 50, 80, 99)))

    connect_ms = {
        name.removeprefix("connect "): ms(name).p50
        for name in pooled
        if name.startswith("connect ")
    }
    costs = {}
    for name in used[0]:
        seconds, switches = np.mean([part[name] for part in used], axis=0)
        costs[name] = {
            "mean_ms": float(pooled[name].mean()),
            "processor_ms": float(seconds) * 1e3,
            "switches": float(switches),
        }
    ours = Astra.name if keys is None else AstraTls.name
    baselines = BASELINES if keys is None else (Astra.name, *BASELINES)
    return Exchange(
        name=f"exchange_{size}B_{world_size}ranks" + ("" if keys is None else "_tls"),
        shape={"world_size": world_size, "N": size},
        dtype="uint8",
        impl=ours,
        ms=ms(ours),
        floor_ms=ms("roofline").p50 / 2,
        peers={name: ms(name).p50 for name in baselines},
        peers_p99={name: ms(name).p99 for name in baselines},
        extra={"costs": costs} | ({} if keys is None else {"connect_ms": connect_ms}),
    )


def summary(case: Exchange) -> str:
    """One line: our median and tail, and how many times longer each baseline takes."""
    ours = case.ms
    assert isinstance(ours, Tailed)
    parts = [f"{case.name:24} p50 {ours.p50:.3f} p99 {ours.p99:.3f} ms"]
    for name, p50 in case.peers.items():
        p99 = case.peers_p99[name]
        times = f"{p50 / ours.p50:.1f}x {p99 / ours.p99:.1f}x"
        parts.append(f"{name} {p50:.3f} {p99:.3f} ({times})")
    for name, cost in case.extra["costs"].items():
        mean, processor, switches = cost.values()
        parts.append(f"{name} mean {mean:.3f} processor {processor:.3f} switches {switches:.2f}")
    parts += [f"connect {name} {p50:.1f}" for name, p50 in case.extra.get("connect_ms", {}).items()]
    return " | ".join([*parts, f"roofline {case.floor_ms:.3f}"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.exchange", description=__doc__.splitlines()[0])
    parser.add_argument("--exchanges", type=int, default=2000, help="of each system and case")
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[320, 4096, 32768, 131072])
    parser.add_argument("--tls", action="store_true", help="ours with mutual TLS 1.3")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    cases = []
    with contextlib.ExitStack() as stack:
        keys = None
        if arguments.tls:
            from astra_runtime.transport.certificates import ephemeral_keys

            keys = str(stack.enter_context(ephemeral_keys(max(arguments.worlds))))
        for world_size in arguments.worlds:
            for size in arguments.sizes:
                cases.append(run_case(world_size, size, arguments.exchanges, keys))
                print(summary(cases[-1]), file=sys.stderr, flush=True)
    if not arguments.no_write:
        command = command_line("bench.exchange")
        packages = ("torch", "pyzmq", "numpy")
        name = "exchange_tls" if arguments.tls else "exchange"
        write(name, cases, command=command, packages=packages, link={"kind": "loopback"})


if __name__ == "__main__":
    main()
