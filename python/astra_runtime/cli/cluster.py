"""A leader and its workers on one machine, with keys of their own, and their timeline."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..console import say, working
from ..deploy.launch import WorkerFailed, Workers, free_ports
from ..errors import AstraError
from .options import connect_options
from .waiting import Waiting


def traced(options: argparse.Namespace, ranks: Any, work: Callable[[], Any]) -> Any:
    """What `work` returns; with --trace, all ranks record what they do in it."""
    ranks.tracing = bool(options.trace)
    try:
        return work()
    finally:
        ranks.tracing = False


def write_trace(options: argparse.Namespace, ranks: Any) -> None:
    """With --trace: collects what all ranks recorded, and writes it as one timeline."""
    from ..trace import write_timeline

    if options.trace:
        spans = ranks.submit(do="timeline")
        write_timeline(options.trace, spans, model=options.model, command=options.command)
        say(f"timeline of {len(spans)} ranks: {options.trace}")


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


def _worker_arguments(
    options: argparse.Namespace, peers: list[str], folder: Path, settings: dict[str, Any], link: Any
) -> list[str]:
    """Of `astra worker`, all but its rank and keys: whatever has to be alike on all ranks."""
    arguments = ["--peers", ",".join(peers), "--model", options.model, "--codebook", str(folder)]
    arguments += ["--threads", str(options.threads), "--timeout", str(options.timeout)]
    arguments += ["--connect-timeout", str(options.connect_timeout)]
    arguments += ["--on-missing", settings["on_missing"]]
    arguments += ["--transport", getattr(options, "transport", "tcp")]
    if options.weights:
        arguments += ["--weights", options.weights]
    for name in ("halo", "deadline_ms"):
        if settings[name] is not None:
            arguments += [f"--{name.replace('_', '-')}", str(settings[name])]
    if link is not None:
        arguments += ["--mbit", str(link.mbit_per_s or 0), "--delay-ms", str(link.delay_ms)]
    return arguments


def _join_workers(
    options: argparse.Namespace,
    peers: list[str],
    workers: Workers,
    keys: str | None,
    seconds: float,
) -> Any:
    """The mesh of this process and its workers, all of which are ready to connect.

    One that ends meanwhile is an error at once.
    """
    from ..transport import open_mesh

    waiting = Waiting(0, peers)

    def on_wait(missing: tuple[int, ...]) -> None:
        workers.check(missing)
        waiting(missing)

    changes = {"backend": getattr(options, "transport", "tcp"), "connect_timeout": seconds}
    changes |= {"on_wait": on_wait, "keys": keys, "insecure": not keys}
    return open_mesh(connect_options(options, 0, len(peers), peers, **changes))


@contextlib.contextmanager
def _naming_causes(workers: Workers) -> Iterator[None]:
    """An error that came of a worker's end says how that worker ended."""
    try:
        yield
    except WorkerFailed:
        raise
    except AstraError as error:
        cause = workers.first_failed(getattr(error, "rank", None))
        if cause is None:
            raise
        raise WorkerFailed(f"{error} ({cause})") from error


@contextlib.contextmanager
def cluster(
    options: argparse.Namespace,
    world_size: int,
    folder: Path,
    model: Any,
    codebook: Any,
    settings: dict[str, Any],
    link: Any = None,
) -> Iterator[Any]:
    """This process as rank 0 of `world_size` local ones: gives the `Ranks` that it leads.

    `settings`: keyword arguments of `Ranks`.
    """
    import torch

    from ..deploy.jobs import Ranks
    from ..transport.pacing import PacedMesh

    torch.set_num_threads(options.threads)
    peers = [f"127.0.0.1:{port}" for port in free_ports(world_size)]
    arguments = _worker_arguments(options, peers, folder, settings, link)
    lent = contextlib.ExitStack()
    keys = lent.enter_context(local_keys(options, world_size))
    arguments += ["--keys", keys] if keys else ["--insecure"]
    deadline = time.monotonic() + options.connect_timeout
    with lent, Workers(world_size, arguments, options.threads) as workers:
        with working(lambda: f"waiting for ranks {workers.loading} to load their models"):
            workers.wait_ready(options.connect_timeout)
        with _naming_causes(workers):
            seconds = max(1.0, deadline - time.monotonic())
            mesh = _join_workers(options, peers, workers, keys, seconds)
            lent.close()  # all have read their keys; whoever is killed now leaves none
            with mesh if link is None or link.is_free else PacedMesh(mesh, link) as timed:
                ranks = Ranks(model, codebook, mesh, timed, **settings)
                yield ranks
                ranks.submit(do="stop")
                ranks.close()
