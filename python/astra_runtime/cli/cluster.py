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


class Cluster:
    """This process as rank 0 of local ones: starts the others, and joins them.

    Attributes:
        peers: "host:port" of every rank.
        keys: the folder of all ranks' keys; None: plaintext.
        workers: the other processes; None: they were not started yet.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        world_size: int,
        settings: dict[str, Any],
        link: Any,
        keys: str | None,
        *,
        standing: bool,
    ) -> None:
        self.options, self.world_size, self.settings = options, world_size, settings
        self.link, self.keys, self._standing = link, keys, standing
        self.peers = [f"127.0.0.1:{port}" for port in free_ports(world_size)]
        self.workers: Workers | None = None

    def start(self, codebook: str | None) -> None:
        """Starts the other ranks, which load the model at once; no effect where they were started.

        codebook: its folder, or "none"; None: the cached one.
        """
        if self.workers is None:
            if self.world_size > 1:
                count = self.world_size - 1
                say(f"starting {count} worker process{'es' if count > 1 else ''}")
            arguments = self._worker_arguments(codebook)
            self.workers = Workers(self.world_size, arguments, self.options.threads)

    def _worker_arguments(self, codebook: str | None) -> list[str]:
        """Of `astra worker`, all but its rank: whatever has to be alike on all ranks."""
        options, settings = self.options, self.settings
        arguments = ["--peers", ",".join(self.peers), "--model", options.model]
        arguments += [] if codebook is None else ["--codebook", codebook]
        arguments += ["--dtype", options.dtype]
        if options.checkpoint is not None:
            arguments += ["--checkpoint", options.checkpoint]
        arguments += ["--mixed-dtypes"] if settings["mixed_forms"] else []
        arguments += ["--pack-weights"] if settings["pack_weights"] else []
        arguments += ["--threads", str(options.threads), "--timeout", str(options.timeout)]
        arguments += ["--connect-timeout", str(options.connect_timeout)]
        arguments += ["--on-missing", settings["on_missing"]]
        arguments += ["--transport", getattr(options, "transport", "tcp")]
        arguments += [] if self._standing else ["--once"]
        if options.weights:
            arguments += ["--weights", options.weights]
        for name in ("halo", "deadline_ms"):
            if settings[name] is not None:
                arguments += [f"--{name.replace('_', '-')}", str(settings[name])]
        if self.link is not None:
            rate = self.link.mbit_per_s or 0
            arguments += ["--mbit", str(rate), "--delay-ms", str(self.link.delay_ms)]
        return arguments + (["--keys", self.keys] if self.keys else ["--insecure"])

    def wait_ready(self) -> None:
        """Returns when every worker has its model. One that ends meanwhile is an error."""
        assert self.workers is not None, "they were started"
        workers = self.workers
        with working(lambda: f"waiting for ranks {workers.loading} to load their models"):
            workers.wait_ready(self.options.connect_timeout)

    def join(self, seconds: float, **changes: Any) -> Any:
        """The mesh of all ranks, which are ready to connect; one that ends is an error at once."""
        from ..transport import open_mesh

        assert self.workers is not None, "they were started"
        workers, waiting = self.workers, Waiting(0, self.peers)

        def on_wait(missing: tuple[int, ...]) -> None:
            workers.check(missing)
            waiting(missing)

        options = self.options
        settings = {"backend": getattr(options, "transport", "tcp"), "connect_timeout": seconds}
        settings |= {"on_wait": on_wait, "keys": self.keys, "insecure": not self.keys} | changes
        return open_mesh(connect_options(options, 0, self.world_size, self.peers, **settings))

    def renew_keys(self) -> None:
        """Makes keys of this command's own anew where they can be used no more.

        They are valid for a day, and a cleaner of temporary files may have taken them.
        """
        from ..transport.certificates import renew_ephemeral_keys

        if self.keys is not None and not self.options.keys:
            renew_ephemeral_keys(Path(self.keys), self.world_size)

    def stop(self, *, at_once: bool) -> None:
        """Ends the other ranks; `at_once`: nobody has told them to stop."""
        if self.workers is not None:
            self.workers.end(at_once=at_once)

    @contextlib.contextmanager
    def ranks(self, model: Any, codebook: Any, folder: Path) -> Iterator[Any]:
        """The `Ranks` that this process leads; `folder` has the codebook."""
        import torch

        from ..deploy.jobs import Ranks
        from ..transport.pacing import PacedMesh

        torch.set_num_threads(self.options.threads)
        deadline = time.monotonic() + self.options.connect_timeout
        self.start(str(folder))
        self.wait_ready()
        assert self.workers is not None, "they were started"
        with _naming_causes(self.workers):
            mesh = self.join(max(1.0, deadline - time.monotonic()))
            link = self.link
            with mesh if link is None or link.is_free else PacedMesh(mesh, link) as timed:
                ranks = Ranks(model, codebook, mesh, timed, **self.settings)
                yield ranks
                ranks.submit(do="stop")
                ranks.close()


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
    settings: dict[str, Any],
    link: Any = None,
    *,
    standing: bool = False,
) -> Iterator[Cluster]:
    """This process as rank 0 of `world_size` local ones; leaving the block ends the others.

    settings: keyword arguments of `Ranks`.
    standing: they wait for this process again when it has left them.
    """
    with local_keys(options, world_size) as keys:
        ranks = Cluster(options, world_size, settings, link, keys, standing=standing)
        try:
            yield ranks
        except BaseException:  # an error or Ctrl-C: nobody will tell them to stop
            ranks.stop(at_once=True)
            raise
        ranks.stop(at_once=standing)
