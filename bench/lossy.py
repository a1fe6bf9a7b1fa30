"""Links that lose packets: codes as datagrams beside TCP, and what lost datagrams cost.

    python -m bench.lossy [latency] [perplexity]

latency: two processes exchange a frame a block over the user-space switch (`bench.link.switch`),
inside TLS, or as sealed datagrams. Between two blocks a rank sleeps as long as its computing would
take. TCP waits for everything; "tcp_deadline" and the datagrams go on after `--deadline-ms`, and
the report says how much they then lacked ("datagram_plain" sends no parity parts). Times are seen
by each rank, from handing over its frame to having what it will have of the other's.

perplexity: SmolLM2 on four ranks, simulated in one pass (`astra_runtime.train.simulate`), each
datagram lost with the given probability, independently; a token of which any bit is missing is left
out of that block's softmax, as the engine does.

Writes lossy.json and lossy_perplexity.json.
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
from itertools import product
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from astra_runtime import Codebook, connect
from astra_runtime.cli.common import quiet_transformers
from astra_runtime.codes.base import arrived
from astra_runtime.codes.spaces import make_space
from astra_runtime.console import say
from astra_runtime.missing import Missing
from astra_runtime.models import adapt
from astra_runtime.plan import Plan
from astra_runtime.store import load_model, load_tokenizer, token_windows
from astra_runtime.train.simulate import Simulation
from astra_runtime.transport import Mesh
from astra_runtime.transport.certificates import ephemeral_keys
from astra_runtime.transport.datagram import connect_datagrams
from astra_runtime.transport.fragments import PARITY, cut, parities
from astra_runtime.transport.tcp import TcpMesh
from bench import accuracy, calibrate
from bench._report import Case, percentiles, write
from bench.corpora import corpus
from bench.link.model import Link
from bench.link.rank import popen_options
from bench.link.switch import Namespaces

RESULT: Final = "lossy"
LOSSES: Final = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
METHODS: Final = ("tcp", "tcp_deadline", "datagram_plain", "datagram")
PATIENCE: Final = 600.0  # seconds: TCP's for one block (it backs off for up to 120), and to join


# --- latency: one rank

Call = Sequence[tuple[float, float]]  # of each block: seconds, share of the other's bytes that came


@dataclass(frozen=True)
class Settings:
    """What a rank is told. `size`: bytes of a frame; `pause`, `deadline`: seconds."""

    rank: int
    hosts: list[str]
    keys: str
    size: int
    blocks: int
    pause: float
    deadline: float


def rank_main(told: Settings) -> None:
    """Makes a mesh for each method, then takes orders from standard input, one call a line:
    a method and the moment to begin. Answers with a line of JSON: per block seconds and the share
    of the other's bytes that came."""
    meshes: dict[str, Mesh] = {}
    for port, method in enumerate(METHODS, 5000):
        peers = [f"{host}:{port}" for host in told.hosts]
        mesh = connect(
            told.rank, 2, peers, keys=told.keys, timeout=PATIENCE, connect_timeout=PATIENCE
        )
        if method.startswith("datagram"):
            assert isinstance(mesh, TcpMesh)
            parity = 0 if method == "datagram_plain" else PARITY
            mesh = connect_datagrams(mesh, parity=parity, connect_timeout=PATIENCE)
        meshes[method] = mesh
    print("ready", flush=True)
    for line in sys.stdin:
        method, moment = line.split()
        wait_until(float(moment))
        deadline = None if method == "tcp" else told.deadline
        print(json.dumps(one_call(meshes[method], told, deadline)), flush=True)
    for mesh in meshes.values():
        mesh.close()


def wait_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def one_call(mesh: Mesh, told: Settings, deadline: float | None) -> Call:
    """All blocks: (seconds of the exchange, share of the bytes that came)."""
    other, frame, found = 1 - told.rank, mesh.buffer(told.size), []
    for block in range(told.blocks):
        time.sleep(told.pause)
        partial, start = deadline is not None, time.perf_counter()
        mesh.send(frame, block=block, plan=1, to=[other], partial=partial)
        sizes = {other: told.size}
        views = mesh.receive(sizes, block=block, plan=1, timeout=deadline, partial=partial)
        seconds = time.perf_counter() - start
        missing = sum(stop - start for start, stop in mesh.gaps.get(other, ()))
        found.append((seconds, 1 - missing / told.size if other in views else 0.0))
    return found


# --- latency: the driver


def latency(options: argparse.Namespace) -> list[Case]:
    cases = []
    for rtt in options.rtt_ms:
        for loss in options.losses:
            link = Link(options.mbit, rtt_ms=rtt, loss=loss, seed=options.seed)
            found = exchanged(link, options)
            cases.append(case_of(link, found, options))
            say(f"rtt {rtt:g} ms, loss {loss:.0%}: {json.dumps(cases[-1].as_dict())}")
    return cases


def exchanged(link: Link, options: argparse.Namespace) -> dict[str, list[Call]]:
    """What each rank's calls took, by method; methods take turns."""
    with Namespaces(2, link) as net, ephemeral_keys(2) as keys:
        ranks = []
        for rank in range(2):
            told = Settings(
                rank,
                net.addresses,
                str(keys),
                options.size,
                options.blocks,
                options.pause_ms * 1e-3,
                options.deadline_ms * 1e-3,
            )
            command = [sys.executable, "-m", "bench.lossy", "--rank", json.dumps(asdict(told))]
            pipes = {**popen_options(), "stdin": subprocess.PIPE, "text": True}
            ranks.append(net.launch(rank, command, **pipes))
        for process in ranks:
            answer(process)
        found: dict[str, list[Call]] = {method: [] for method in METHODS}
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
                found[method] += [json.loads(answer(process)) for process in ranks]
                spent[method] += time.monotonic() - moment
        for process in ranks:
            process.communicate(timeout=PATIENCE)  # the end of their orders
    return {method: calls[2:] for method, calls in found.items()}  # the first call warms up


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a rank failed; what it said stands above")
    return line


def case_of(link: Link, found: dict[str, list[Call]], options: argparse.Namespace) -> Case:
    """Milliseconds of a block's exchange, over blocks, calls and ranks."""
    told = {method: summary(calls) for method, calls in found.items()}
    ms = told["datagram"]["ms"]
    rivals = [method for method in METHODS if method != "datagram"]
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
        percentiles([1e3 * seconds for call in found["datagram"] for seconds, _ in call]),
        floor_ms=1e3 * (link.seconds(options.size) + link.delay),
        peers={name: told[name]["ms"]["p50"] for name in rivals},
        extra={
            "ms": ms,
            "peers_p99": {name: told[name]["ms"]["p99"] for name in rivals},
            "call_ms": {name: told[name]["call_ms"] for name in METHODS},
            "came": {name: told[name]["came"] for name in METHODS},
            "calls": {name: len(found[name]) for name in METHODS},
            "pause_ms": options.pause_ms,
            "deadline_ms": options.deadline_ms,
            "seed": link.seed,
        },
    )


def summary(calls: Sequence[Call]) -> dict[str, Any]:
    """Percentiles of a block's milliseconds, a call's p50 and p99 without its pauses, and the share
    of all bytes that came."""
    blocks = sorted(1e3 * seconds for call in calls for seconds, _ in call)
    whole = sorted(1e3 * sum(seconds for seconds, _ in call) for call in calls)
    return {
        "ms": {f"p{p}": nearest(blocks, p) for p in (20, 50, 80, 99)},
        "call_ms": {f"p{p}": nearest(whole, p) for p in (50, 99)},
        "came": statistics.fmean(share for call in calls for _, share in call),
    }


def nearest(ordered: Sequence[float], percent: int) -> float:
    return ordered[math.ceil(percent / 100 * len(ordered)) - 1]


# --- perplexity


class LossyDatagrams(Simulation):
    """A simulation, of one sequence, in which datagrams are lost, not frames: so tokens are
    missing, not shards."""

    def __init__(
        self,
        model: Any,
        book: Codebook,
        plan: Plan,
        inputs: dict[str, Tensor],
        parity: int,
        **losses: Any,
    ) -> None:
        super().__init__(model, book, plan, inputs, **losses)
        self.parity = parity
        self.space = make_space(book, self.adapter)
        self.trailer = Missing(plan.world_size, 0).width

    def _came(self, block: int) -> Tensor | None:
        ranks = range(self.plan.world_size)
        if not self.losing or not self.space.payload_bytes(block, 1, 1):
            return None
        return torch.stack([torch.cat([self._whole(block, n, m) for m in ranks]) for n in ranks])

    def _whole(self, block: int, receiver: int, sender: int) -> Tensor:
        """Which of a rank's tokens another one hears of whole, bool [tokens]."""
        whole = torch.ones(self.plan.size(sender), dtype=torch.bool)
        told = self.plan.num_sent(sender)
        if told:
            size = self.space.payload_bytes(block, 1, told)
            count, step = cut(size + self.trailer)
            missing = self.missing(block, receiver, sender, count)
            gaps = [(n * step, (n + 1) * step) for n in missing]
            whole[:told] = arrived(self.space.strips(block, 1, told), 1, told, gaps)[0]
        return whole

    def missing(self, block: int, receiver: int, sender: int, count: int) -> list[int]:
        """Which of a frame's parts are lost, and not made good by parity."""
        groups = parities(count, self.parity)
        lost = (torch.rand(count + groups, generator=self.generator) < self.lost).tolist()
        of_group = [sum(lost[j:count:groups]) + lost[count + j] for j in range(groups)]
        return [n for n in range(count) if lost[n] and not (groups and of_group[n % groups] == 1)]


def perplexity(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows: codes, loss of datagrams, perplexity beside both controls."""
    quiet_transformers()
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    windows = token_windows(tokenizer, corpus(options.domain)[1], accuracy.TOKENS, options.windows)
    world, rows = 4, []
    with adapt(model).installed():
        place = {"world_size": world, "halo": 0, "lost": 0.0, "seed": 0}
        base = {
            name: accuracy.losses(model, book, windows, place)
            for name, book in accuracy.CONTROLS.items()
        }
        for name in options.codes:
            book = codebook_of(name, model, tokenizer)
            copies = {"copies": book.prefix, "halo": options.halo}
            plan = Plan.make(accuracy.TOKENS - book.prefix, world, causal=True, **copies)
            for loss, parity in product(options.losses, (0, PARITY)):
                if parity and not loss:
                    continue  # the same
                found = [
                    one_loss(model, book, plan, ids, loss, parity, n)
                    for n, ids in enumerate(windows)
                ]
                row = {"codes": name, "domain": options.domain, "datagrams_lost": loss}
                row |= {"parity": parity}
                row |= {"world_size": world, "halo": options.halo, "windows": len(windows)}
                rows.append(row | accuracy.row_of(model, book, found, base))
                say(json.dumps(rows[-1]))
    return rows


@torch.inference_mode()
def one_loss(
    model: Any, book: Codebook, plan: Plan, ids: Tensor, loss: float, parity: int, seed: int
) -> float:
    """Nats a token after the first shard."""
    generator, inputs = torch.Generator().manual_seed(seed), {"input_ids": ids[None]}
    run = LossyDatagrams(model, book, plan, inputs, parity, lost=loss, generator=generator).run()
    first = accuracy.TOKENS // plan.world_size
    return float(F.cross_entropy(run.logits[0, first:-1], ids[first + 1 :]))


def codebook_of(name: str, model: Any, tokenizer: Any) -> Codebook:
    """As `bench.accuracy` has it; what has to be fitted is kept."""
    kept = calibrate.FOLDER / f"{name.replace(':', '-')}-0"
    if name.startswith("transform") or not kept.is_dir():
        book = accuracy.codebook_of(name, 0, model, tokenizer)
        if name.startswith("transform"):
            return book
        book.save_pretrained(kept)
    return Codebook.from_pretrained(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="*", default=["latency", "perplexity"])
    parser.add_argument("--losses", nargs="+", type=float, default=list(LOSSES), help="shares")
    parser.add_argument("--seed", type=int, default=0, help="of the link's losses")
    parser.add_argument("--mbit", type=float, default=10.0)
    parser.add_argument("--rtt-ms", nargs="+", type=float, default=[2.0, 20.0])
    parser.add_argument("--size", type=int, default=5000, help="bytes of a frame")
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--calls", type=int, default=10, help="at most, of each method")
    parser.add_argument("--seconds", type=float, default=40.0, help="at most, of each method")
    parser.add_argument("--pause-ms", type=float, default=10.0, help="between two blocks")
    parser.add_argument("--deadline-ms", type=float, default=30.0)
    parser.add_argument("--codes", nargs="+", default=["kv:3", "transform:100"])
    parser.add_argument("--windows", type=int, default=2, help="of 1024 tokens")
    parser.add_argument("--halo", type=int, default=32)
    parser.add_argument("--domain", default="documentation")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank_main(Settings(**json.loads(options.rank)))
        return
    command = " ".join(["python -m bench.lossy", *sys.argv[1:]])
    if "latency" in options.what:
        link = {"mbit_per_s": options.mbit, "rtt_ms": options.rtt_ms, "loss": options.losses}
        write(RESULT, latency(options), command=command, packages=("cryptography",), link=link)
    if "perplexity" in options.what:
        packages = ("torch", "numpy", "transformers")
        rows = {"rows": perplexity(options)}
        write(f"{RESULT}_perplexity", [], command=command, packages=packages, extra=rows)


if __name__ == "__main__":
    main()
