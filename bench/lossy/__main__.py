"""Links that lose packets: codes as datagrams beside TCP, and what lost datagrams cost.

    python -m bench.lossy [latency] [perplexity]
    python -m bench.lossy degraded …

latency: two processes exchange a frame a block over the user-space switch (`bench.link.switch`),
inside TLS, or as sealed datagrams. Between two blocks a rank sleeps as long as its computing would
take. TCP waits for everything; "tcp_deadline" and the datagrams go on after `--deadline-ms`, and
the report says how much they then lacked ("datagram_plain" sends no FEC fragments). Times are seen
by each rank, from handing over its frame to having what it will have of the other's.

perplexity: SmolLM2 on four ranks, simulated in one pass (`astra_runtime.train.simulate`), each
datagram lost with the given probability, independently; a token of which any bit is missing is
attended to as predicted, with codes that predict, or else left out of that block's softmax, as the
engine does. `--after-loss stale` leaves it out with all codes.

degraded: frames, not datagrams, miss their deadline (`degraded.py`, with options of its own).

Writes lossy.json and degraded.json, and adds to lossy_perplexity.json: rows that are there stay.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Final, get_args

from astra_runtime.train.simulate import AfterLoss
from bench.lossy import degraded
from bench.lossy.perplexity import perplexity
from bench.lossy.ranks import latency
from bench.report import command_line, write

RESULT: Final = "lossy"
LOSSES: Final = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["degraded"]:
        degraded.main(given[1:])
        return
    parser = argparse.ArgumentParser(
        prog="bench.lossy", description=(__doc__ or "").splitlines()[0]
    )
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
    parser.add_argument("--halo", type=int, nargs="+", default=[32], help="tokens")
    parser.add_argument("--domain", default="documentation")
    parser.add_argument("--after-loss", choices=get_args(AfterLoss), help="(as the engine does)")
    options = parser.parse_args(given)
    command = command_line("bench.lossy", given)
    if "latency" in options.what:
        link = {"mbit_per_s": options.mbit, "rtt_ms": options.rtt_ms, "loss": options.losses}
        write(RESULT, latency(options), command=command, packages=("cryptography",), link=link)
    if "perplexity" in options.what:
        perplexity(options, command)


if __name__ == "__main__":
    main()
