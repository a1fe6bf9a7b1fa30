"""`astra serve`: an OpenAI-compatible service on several processes or devices."""

from __future__ import annotations

import argparse
import contextlib
import threading
from pathlib import Path
from typing import Any

from ..console import say, show_json
from ..errors import AstraError
from .cluster import Cluster, cluster
from .common import load, quiet_transformers
from .fitting import codebook_at_hand, ensure_codebook
from .options import (
    DENSE,
    add_fit_options,
    add_mesh_options,
    add_missing,
    add_model,
    check_keys,
    connect_options,
    engine_options,
    not_negative,
    peers_of,
    positive,
    seconds,
)
from .waiting import Waiting

BEAT_SHARE = 0.2  # of --timeout: how often ranks without work are asked whether they are there
REJOIN_SECONDS = 30.0  # of one try to form the mesh again


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  astra serve --world-size 2 --port 8000\n"
        "  astra serve --rank 0 --peers 10.0.0.1:7000,10.0.0.2:7000 --keys rank-0/ --codebook DIR "
        "--host 0.0.0.0 --api-key-file KEY\n"
        "      (the other devices run `astra worker`; `astra keys init` makes the keys)"
    )
    add_model(parser)
    add_fit_options(parser)
    add_mesh_options(parser)
    add_missing(parser)
    parser.set_defaults(timeout=5.0)
    parser.add_argument("--world-size", type=positive, help="processes on this machine (1)")
    parser.add_argument("--rank", type=int, help="with --peers: 0, the leader")
    parser.add_argument("--peers", help="host:port of every rank, by rank")
    parser.add_argument("--mbit", type=float, default=0.0, help="emulate links of this rate")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="and of this one-way delay")
    _add_http(parser)
    _add_limits(parser)


def _add_http(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument(
        "--port", type=not_negative, default=8000, help="0: any free one (%(default)s)"
    )
    parser.add_argument(
        "--api-key", help="what clients have to send; beyond loopback there has to be one"
    )
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="a key a line (default: ASTRA_API_KEY, if set)"
    )
    parser.add_argument(
        "--served-name", metavar="NAME", help="the name clients ask for (default: the model's)"
    )
    parser.add_argument("--tls-cert", metavar="FILE", help="PEM: serve https")
    parser.add_argument("--tls-key", metavar="FILE", help="PEM: its key, if in another file")
    parser.add_argument(
        "--cors-origin", action="append", default=[], help="a web page's origin that may ask"
    )
    parser.add_argument(
        "--allowed-host", action="append", default=[], help="a further name of this server"
    )
    parser.add_argument("--trace", metavar="FOLDER", help="write a timeline of each request")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-queue", type=positive, default=64, help="requests that wait (64)")
    parser.add_argument(
        "--max-new-tokens", type=positive, help="the most a request may ask for (as it fits)"
    )
    parser.add_argument(
        "--memory",
        type=positive,
        metavar="MIB",
        help="for keys and values, on each device (half of what is free)",
    )
    parser.add_argument(
        "--request-timeout", type=seconds, help="seconds an answer may take (no limit)"
    )
    parser.add_argument(
        "--drain", type=seconds, default=10.0, help="seconds for answers to end at the end (10)"
    )


def run(options: argparse.Namespace) -> int:
    import logging

    from ..serve.http import HttpOptions, check_exposure, make_app, read_api_keys, run_server
    from ..serve.running import RunningService

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    keys = read_api_keys(options.api_key, options.api_key_file)
    check_exposure(options.host, keys, options.insecure)
    place = _Place.of(options)
    http = HttpOptions(
        host=options.host,
        api_keys=keys,
        insecure=options.insecure,
        allowed_hosts=tuple(options.allowed_host),
        cors_origins=tuple(options.cors_origin),
        max_new_tokens=options.max_new_tokens,
        request_timeout_s=options.request_timeout,
        trace_folder=None if options.trace is None else Path(options.trace),
        degrade=options.on_missing == "degrade",
    )
    kind, limit = about_model(options.model)
    name = options.served_name or Path(options.model).name
    service = RunningService(
        name, kind, limit, lambda service: _start(options, place, service), place.addresses
    )
    stopped = threading.Event()

    def listening(url: str) -> None:
        say(f"listening at {url}, loading {options.model}")
        threading.Thread(target=_tell, args=(service, url, stopped), daemon=True).start()

    try:
        run_server(
            make_app(service, http),
            options.host,
            options.port,
            certfile=options.tls_cert,
            keyfile=options.tls_key,
            drain_s=options.drain,
            on_listening=listening,
        )
    finally:
        stopped.set()
        service.close(options.drain)
    if options.json:
        show_json({"model": name, "world_size": len(place.addresses)})
    if service.failed is not None:
        raise AstraError(f"the service could not be started: {service.failed}")
    return 0


def _tell(service: Any, url: str, stopped: threading.Event) -> None:
    """Says when the service is ready, and why where it is not."""
    last = ""
    while not stopped.wait(0.1):
        status = service.status()
        line = f"ready at {url}" if status.ready else status.reason
        if line != last:
            say(line)
            last = line


def about_model(name: str) -> tuple[Any, int]:
    """What a model is for, and how many tokens it reads, from its configuration alone."""
    from ..store import ModelNotFound, model_folder, token_limit

    quiet_transformers()
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(model_folder(name), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"model {name!r} is not here: {str(error).splitlines()[0]}") from error
    made = (config.architectures or [""])[0]
    if made.endswith(("ForCausalLM", "LMHeadModel")):
        kind = "decoder"
    else:
        kind = "vision" if hasattr(config, "image_size") else "encoder"
    holder = argparse.Namespace(config=config)
    return kind, token_limit(holder) or 1 << 30


class _Place:
    """This process among the ranks.

    Attributes:
        addresses: of the ranks.
        peers: the same, where the others are workers of other devices; None: this process starts
            the others itself.
    """

    def __init__(self, options: argparse.Namespace, peers: list[str] | None) -> None:
        size = options.world_size or 1
        self.peers = peers
        self.addresses = peers or [f"rank {rank}, on this machine" for rank in range(size)]
        self.settings = engine_options(options, len(self.addresses))

    @classmethod
    def of(cls, options: argparse.Namespace) -> _Place:
        """Refuses contradictions, before a model is loaded."""
        if options.peers is None:
            if options.rank is not None:
                raise AstraError("--rank: expected together with --peers")
            return cls(options, None)
        peers = peers_of(options)
        if options.rank != 0:
            raise AstraError("--rank: expected 0 with --peers; the others run `astra worker`")
        if options.world_size not in (None, len(peers)):
            raise AstraError(f"--world-size: expected {len(peers)}, the addresses of --peers")
        check_keys(options, peers)
        return cls(options, peers)


def _start(options: argparse.Namespace, place: _Place, service: Any) -> Any:
    """Loads model and codebook, on all ranks at once, and joins the ranks."""
    from ..transport import Link

    with contextlib.ExitStack() as stack:
        link = Link(options.mbit or None, options.delay_ms)
        others = None
        if place.peers is None:
            others = stack.enter_context(
                cluster(options, len(place.addresses), place.settings, link, standing=True)
            )
            if codebook_at_hand(options):
                others.start(options.codebook)
        service.say(f"loading {options.model}")
        model, tokenizer = load(options.model, tokenizer=service.kind != "vision")
        if len(place.addresses) == 1 and options.codebook is None:
            options.codebook = DENSE  # there is nobody to send codes to
        if not codebook_at_hand(options):
            service.say("fitting a codebook, once")
        codebook, folder = ensure_codebook(options, model, tokenizer)
        started = _lead(
            options, place, service, stack, others, model, tokenizer, codebook, folder, link
        )
        stack.pop_all()
    return started


def _lead(
    options: argparse.Namespace,
    place: _Place,
    service: Any,
    stack: contextlib.ExitStack,
    others: Cluster | None,
    model: Any,
    tokenizer: Any,
    codebook: Any,
    folder: Path,
    link: Any,
) -> Any:
    """The leader of the ranks, which are joined first."""
    import torch

    from ..engine import Engine
    from ..serve.leader import Leader
    from ..serve.rank import JOB
    from ..serve.running import Started
    from ..transport import peers_of as peers_in
    from ..transport.messages import send_json

    torch.set_num_threads(options.threads)  # fitting used every core
    if others is not None:
        others.start(str(folder))
        service.say("waiting for the other processes to load the model")
        others.wait_ready()
    service.say("waiting for all devices")
    waiting = Waiting(0, place.addresses if others is None else others.peers)
    mesh = _join(options, place, service, others, link, waiting)
    stack.callback(mesh.close)

    def announce(mesh: Any) -> None:
        send_json(mesh, {"do": "follow"}, blocks=JOB, to=peers_in(mesh))

    def away(error: Exception) -> None:
        waiting.begin()
        _restart(others)

    announce(mesh)
    settings = dict(place.settings)
    engine = stack.enter_context(Engine(model, codebook, mesh, **settings))
    stack.callback(lambda: engine.mesh.close())  # the one that it has by then
    leader = stack.enter_context(
        Leader(
            engine,
            tokenizer,
            max_queue=options.max_queue,
            memory=None if options.memory is None else options.memory << 20,
            rejoin_seconds=REJOIN_SECONDS,
            beat_seconds=min(1.0, BEAT_SHARE * options.timeout),
            announce=announce,
            on_away=away,
        )
    )
    if not leader.wait_ready(options.connect_timeout):
        raise AstraError("the ranks did not begin to work in time")
    return Started(leader, tokenizer, stack.pop_all().close)


def _join(
    options: argparse.Namespace,
    place: _Place,
    service: Any,
    others: Cluster | None,
    link: Any,
    waiting: Waiting,
) -> Any:
    """The mesh; whoever has to be waited for is named, and a process that ended starts again."""
    from ..transport import open_mesh

    peers = waiting.peers
    begun = threading.Event()

    def on_wait(missing: tuple[int, ...]) -> None:
        if service.closing.is_set():
            raise AstraError("the service is shutting down")
        if others is not None and others.workers is not None:
            if begun.is_set():
                _restart(others)
            else:
                others.workers.check(missing)  # what fails at the start would fail again
        waiting(missing)

    changes: dict[str, Any] = {"backend": options.transport, "on_wait": on_wait}
    changes["timeout"] = (1 - BEAT_SHARE) * options.timeout
    changes["link"] = None if link.is_free else link
    if others is not None:
        changes |= {"keys": others.keys, "insecure": not others.keys}
    mesh = open_mesh(connect_options(options, 0, len(peers), list(peers), **changes))
    begun.set()
    return mesh


def _restart(others: Cluster | None) -> None:
    """Starts this machine's processes that have ended once more."""
    if others is not None and others.workers is not None:
        for report in others.workers.restart_ended():
            say(f"{report}; started again")
