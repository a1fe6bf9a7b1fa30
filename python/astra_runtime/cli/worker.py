"""`astra worker`: one rank that follows rank 0."""

from __future__ import annotations

import argparse
import signal
import time
from typing import Any

from ..console import say, show_json
from ..deploy.launch import READY, die_with
from ..errors import AstraError
from .common import load
from .fitting import ensure_codebook
from .options import (
    add_fit_options,
    add_mesh_options,
    add_missing,
    add_model,
    check_keys,
    connect_options,
    missing_of,
    peers_of,
    weights_of,
)

DAY = 86_400.0
PAUSE = 0.2  # seconds before a rank that lost the others listens again


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "example, with the keys of `astra keys init --ranks 2`, on the second of two devices:\n"
        "  astra worker --rank 1 --peers 10.0.0.1:7000,10.0.0.2:7000 --keys rank-1/ "
        "--codebook DIR\n"
        "and on the first, which leads:\n"
        "  astra run --rank 0 --peers 10.0.0.1:7000,10.0.0.2:7000 --keys rank-0/ --codebook DIR "
        "--prompt TEXT"
    )
    add_model(parser)
    add_fit_options(parser)
    add_mesh_options(parser)
    add_missing(parser)
    parser.add_argument(
        "--rejoin",
        action="store_true",
        help="after a run, and after the loss of another device, wait for the next run",
    )
    parser.add_argument("--rank", type=int, required=True, help="this process's place, from 0")
    parser.add_argument("--peers", required=True, help="host:port of every rank, by rank")
    parser.add_argument("--mbit", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--delay-ms", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    if options.parent:
        die_with(options.parent)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the leader says why, not this process
    peers = peers_of(options)
    weights = weights_of(options, len(peers))
    missing_of(options)
    if options.rank == 0:
        raise AstraError("--rank: expected 1 or more; rank 0 leads, with `astra run --rank 0`")
    check_keys(options, peers)
    import torch

    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.model, decoder=True)
    codebook, _ = ensure_codebook(options, model, tokenizer)
    torch.set_num_threads(options.threads)  # fitting used every core
    if options.parent:
        print(READY, flush=True)
    else:
        say(f"rank {options.rank} of {len(peers)} waits for the others at {peers[options.rank]}")
    arguments: dict[str, Any] = missing_of(options) | {"weights": weights, "halo": options.halo}
    jobs = 0
    while True:
        try:
            jobs += _follow(options, peers, model, codebook, arguments)
        except AstraError as error:
            if not options.rejoin:
                raise
            say(f"rank {options.rank}: {error}")
        if not options.rejoin:
            break
        time.sleep(PAUSE)
        say(f"rank {options.rank} of {len(peers)} waits for the others again")
    if options.json:
        show_json({"rank": options.rank, "world_size": len(peers), "jobs": jobs})
    return 0


def _follow(
    options: argparse.Namespace,
    peers: list[str],
    model: Any,
    codebook: Any,
    arguments: dict[str, Any],
) -> int:
    """Joins the others and does what rank 0 says until it says stop: how many jobs that were."""
    from ..deploy.jobs import Ranks
    from ..transport import Link, open_mesh
    from ..transport.pacing import PacedMesh

    link = Link(options.mbit or None, options.delay_ms)
    rank, backend = options.rank, options.transport
    mesh = open_mesh(connect_options(options, rank, len(peers), peers, backend=backend))
    with mesh if link.is_free else PacedMesh(mesh, link) as timed:
        ranks = Ranks(model, codebook, mesh, timed, **arguments)
        say(f"rank {mesh.rank} of {mesh.world_size} follows rank 0")
        try:
            return ranks.follow(idle=DAY)
        finally:
            ranks.close()
