"""A leader and its workers on one machine, with keys of their own, and their timeline."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..console import say
from ..deploy.launch import WorkerFailed, Workers, free_ports
from ..errors import AstraError
from .options import connect_options, missing_of, weights_of

READY_SECONDS = 120.0


def traced(options: argparse.Namespace, ranks: Any, work: Callable[[], Any]) -> Any:
    """What `work` gives; with --trace, a timeline of what all ranks did in it is written."""
    from ..trace import write_timeline

    ranks.tracing = bool(options.trace)
    found = work()
    if options.trace:
        ranks.tracing = False
        spans = ranks.lead(do="timeline")
        write_timeline(options.trace, spans, model=options.model, command=options.command)
        say(f"timeline of {len(spans)} ranks: {options.trace}")
    return found


@contextlib.contextmanager
def local_keys(options: argparse.Namespace, world_size: int) -> Iterator[str | None]:
    """The folder of keys for processes that this one starts, ephemeral ones unless --keys names
    some; None: plaintext, on loopback, which only --insecure or a missing package leads to."""
    from ..transport.certificates import EXTRA, can_make_keys, ephemeral_keys

    if options.keys or options.insecure or world_size == 1:
        yield options.keys
    elif can_make_keys():
        with ephemeral_keys(world_size) as folder:
            yield str(folder)
    else:
        say(f'plaintext between these processes, on loopback: for TLS, pip install "{EXTRA}"')
        yield None


@contextlib.contextmanager
def cluster(
    options: argparse.Namespace,
    world_size: int,
    folder: Path,
    model: Any,
    codebook: Any,
    link: Any = None,
) -> Iterator[Any]:
    """This process as rank 0 of `world_size` local ones: gives the `Ranks` to lead."""
    import torch

    from ..deploy.jobs import Ranks
    from ..transport import open_mesh
    from ..transport.pacing import PacedMesh

    torch.set_num_threads(options.threads)
    peers = [f"127.0.0.1:{port}" for port in free_ports(world_size)]
    arguments = ["--peers", ",".join(peers), "--model", options.model, "--codebook", str(folder)]
    arguments += ["--threads", str(options.threads), "--timeout", str(options.timeout)]
    if options.weights:
        arguments += ["--weights", options.weights]
    if options.halo is not None:
        arguments += ["--halo", str(options.halo)]
    missing = missing_of(options)
    if missing["deadline_ms"] is not None:
        arguments += ["--deadline-ms", str(missing["deadline_ms"])]
    transport: Any = getattr(options, "transport", "tcp")
    arguments += ["--on-missing", missing["on_missing"], "--transport", transport]
    if link is not None:
        arguments += ["--mbit", str(link.mbit_per_s or 0), "--delay-ms", str(link.delay_ms)]
    lent = contextlib.ExitStack()
    keys = lent.enter_context(local_keys(options, world_size))
    arguments += ["--keys", keys] if keys else ["--insecure"]
    with lent, Workers(world_size, arguments, options.threads) as workers:
        workers.wait_ready(READY_SECONDS)
        try:
            # every process is there: one that does not come now has died
            changes = {"backend": transport, "keys": keys, "insecure": not keys}
            mesh = open_mesh(
                connect_options(options, 0, world_size, peers, connect_timeout=15.0, **changes)
            )
            lent.close()  # all have read their keys; whoever is killed now leaves none
            with mesh if link is None or link.is_free else PacedMesh(mesh, link) as timed:
                weights = weights_of(options, world_size)
                ranks = Ranks(model, codebook, mesh, timed, weights, options.halo, **missing)
                yield ranks
                ranks.lead(do="stop")
                ranks.close()
        except AstraError as error:
            cause = workers.first_failed(getattr(error, "rank", None))
            if cause is None:
                raise
            raise WorkerFailed(f"{error} ({cause})") from error
