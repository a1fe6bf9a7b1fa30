"""`astra worker`: one rank, which runs the jobs of rank 0, the leader."""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

from ..console import SILENCE, say, show_json
from ..cores import return_free_memory
from ..deploy.launch import READY, die_with
from ..errors import AstraError
from .common import load, uncollected
from .fitting import ensure_codebook
from .options import (
    DEVICES,
    add_fit_options,
    add_mesh_options,
    add_missing,
    add_model,
    check_keys,
    connect_options,
    engine_options,
    group,
    peers_of,
    settle_threads,
    sharing,
)
from .waiting import Waiting

DAY = 86_400.0
PAUSE = 0.2  # seconds before a rank that lost the others listens again
RETRY_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # after a failure to join; each is twice the one before
UNASKED = 600.0  # seconds, the default of --connect-timeout: a worker goes on waiting behind it


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "example, with the keys of `astra keys init --ranks 2`, on the second of two devices:\n"
        "  astra worker --rank 1 --peers 10.0.0.1:7000,10.0.0.2:7000 --keys rank-1/ "
        "--codebook DIR\n"
        "and on the first, the leader:\n"
        "  astra run --rank 0 --peers 10.0.0.1:7000,10.0.0.2:7000 --keys rank-0/ --codebook DIR "
        "--prompt TEXT"
    )
    add_model(parser)
    add_fit_options(parser)
    devices = group(parser, DEVICES)
    devices.add_argument(
        "--rank", type=int, required=True, metavar="R", help="this process's place, from 0"
    )
    devices.add_argument(
        "--peers", required=True, metavar="HOST:PORT,…", help="of every rank, by rank"
    )
    add_mesh_options(parser)
    add_missing(parser)
    parser.add_argument(
        "--once",
        action="store_true",
        help="end after one run; by default a worker waits for the next one, whatever ended the "
        "last",
    )
    parser.add_argument(
        "--rejoin",
        action="store_true",
        help="wait for the first run, too, longer than a --connect-timeout that is given",
    )
    parser.add_argument("--mbit", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--delay-ms", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    if options.parent:
        die_with(options.parent)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the leader says why, not this process
    peers = peers_of(options)
    settings = engine_options(options, len(peers))
    if options.rank == 0:
        raise AstraError("--rank: expected 1 or more; rank 0 leads, with `astra run --rank 0`")
    check_keys(options, peers)
    with uncollected():
        import torch

        settle_threads(options, sharing(peers, options.rank))
        torch.set_num_threads(options.threads)
        # a codebook is fitted on text, which takes a tokenizer
        model, tokenizer = load(options, tokenizer=options.codebook is None)
    codebook, _ = ensure_codebook(options, model, tokenizer)
    torch.set_num_threads(options.threads)  # fitting used every core
    if options.parent and not options.once:
        gc.freeze()  # what is loaded stays: no collection has to look through it again
    if options.parent:
        print(READY, flush=True)
    else:
        say(
            f"rank {options.rank} of {len(peers)} waits for the others at {peers[options.rank]}, "
            f"{options.threads} thread(s)"
        )
    worker = _Worker(options, peers, model, codebook, settings)
    jobs = worker.join_once() if options.once else worker.serve()
    if options.json:
        show_json({"rank": options.rank, "world_size": len(peers), "jobs": jobs})
    return 0


class _Worker:
    """A rank that joins the leader's mesh, and then the next one, whatever ended the last.

    Args:
        settings: keyword arguments of `Ranks`.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        peers: list[str],
        model: Any,
        codebook: Any,
        settings: dict[str, Any],
    ) -> None:
        self.options, self.peers, self.settings = options, peers, settings
        self.model, self.codebook = model, codebook
        self.meshes = 0  # joined so far

    @contextlib.contextmanager
    def _mesh(self) -> Iterator[tuple[Any, Any]]:
        """The mesh of all ranks, and the same one behind the emulated link, if there is one."""
        from ..transport import Link, open_mesh
        from ..transport.pacing import PacedMesh

        options = self.options
        link = Link(options.mbit or None, options.delay_ms)
        # the leader of local workers says for whom it waits; a standing worker may wait for days
        silence = SILENCE if options.once else math.inf
        mesh = open_mesh(
            connect_options(
                options,
                options.rank,
                len(self.peers),
                self.peers,
                backend=options.transport,
                on_wait=None if options.parent else Waiting(options.rank, self.peers, silence),
            )
        )
        with mesh if link.is_free else PacedMesh(mesh, link) as timed:
            yield mesh, timed

    def join_once(self) -> int:
        """Runs the leader's jobs until it says stop: how many there were."""
        from ..deploy.jobs import Ranks

        with self._mesh() as (mesh, timed):
            self.meshes += 1
            ranks = Ranks(self.model, self.codebook, mesh, timed, **self.settings)
            say(f"rank {mesh.rank} of {mesh.world_size} has joined; rank 0 leads")
            try:
                return ranks.worker_loop(idle=DAY)
            finally:
                ranks.close()

    def serve(self) -> int:
        """Joins mesh after mesh; ends only by an error that no waiting cures."""
        place, pause, jobs = f"rank {self.options.rank}", PAUSE, 0
        while True:
            joined = self.meshes
            try:
                jobs += self.join_once()
                trouble = f"{place} is done"
            except Exception as error:  # a leader's request, however absurd, ends no worker
                if self.meshes == joined and self._is_permanent(error):
                    raise
                known = isinstance(error, AstraError | ValueError | OSError)
                trouble = f"{place}: {error if known else f'{type(error).__name__}: {error}'}"
            return_free_memory()  # of what was kept for this mesh
            again = min(max(2 * pause, RETRY_PAUSE), LONGEST_PAUSE)
            pause = PAUSE if self.meshes > joined else again
            say(f"{trouble}; waits for the others again in {pause:g} s")
            time.sleep(pause)

    def _is_permanent(self, error: Exception) -> bool:
        """Whether joining can never succeed: this rank's own keys, address or arguments are bad.
        So it is where the first run did not come within a --connect-timeout that was given.

        A port that was free for an earlier mesh may become free again.
        """
        from ..errors import ConnectFailed
        from ..transport.credentials import KeysError

        if isinstance(error, KeysError) or not isinstance(error, AstraError):
            return True
        if not isinstance(error, ConnectFailed) or self.meshes:
            return False
        options = self.options  # who says how long to wait, and sees nobody by then, is told so
        return not error.missing or (options.connect_timeout < UNASKED and not options.rejoin)
