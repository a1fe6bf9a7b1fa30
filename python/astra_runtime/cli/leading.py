"""Leading local processes or other devices, for commands that answer many requests."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..console import say
from ..errors import AstraError
from .cluster import Cluster, cluster
from .common import load
from .fitting import codebook_at_hand, ensure_codebook
from .options import (
    DENSE,
    check_own_keys,
    connect_options,
    engine_options,
    led_peers,
    settle_threads,
    sharing,
)
from .waiting import Waiting

BEAT_SHARE = 0.2  # of --timeout, in which ranks without work are asked twice whether they are there
REJOIN_SECONDS = 30.0  # of one try to form the mesh again
LONGEST_SILENCE = 600.0  # of a service that waits for a device, which may be away for days


class LedRanks:
    """The ranks that this process leads, on this machine or on other devices.

    Attributes:
        addresses: of the ranks.
        peers: the same, where the others are workers of other devices; None: this process starts
            the others itself.
        settings: keyword arguments of an `Engine`.
    """

    def __init__(self, options: argparse.Namespace, peers: list[str] | None) -> None:
        size = options.world_size or 1
        self.peers = peers
        self.addresses = peers or [f"rank {rank}, on this machine" for rank in range(size)]
        self.settings = engine_options(options, len(self.addresses))
        settle_threads(options, sharing(peers, options.rank) if peers else size)

    @classmethod
    def of(cls, options: argparse.Namespace) -> LedRanks:
        """Refuses contradictions, before a model is loaded."""
        peers, size = led_peers(options), options.world_size or 1
        if peers is None and options.keys and size > 1:
            check_own_keys(options, range(size), size)
        return cls(options, peers)


@contextlib.contextmanager
def started_early(options: argparse.Namespace, led: LedRanks) -> Iterator[Cluster | None]:
    """This machine's other ranks, if this process starts them: they load while it imports torch.

    None: they are other devices. Leaving the block ends the processes.
    """
    from ..transport import Link

    if led.peers is not None:
        yield None
        return
    link = Link(options.mbit or None, options.delay_ms)
    size = len(led.addresses)
    with cluster(options, size, led.settings, link, standing=True) as others:
        if codebook_at_hand(options):
            others.start(options.codebook)
        yield others


def start(options: argparse.Namespace, led: LedRanks, service: Any, others: Cluster | None) -> Any:
    """Loads model and codebook, on all ranks at once, and joins the ranks."""
    with contextlib.ExitStack() as stack:
        service.say(f"loading {options.model}")
        model, tokenizer = load(
            options, decoder=service.kind == "decoder", tokenizer=service.kind != "vision"
        )
        if options.codebook is None and (len(led.addresses) == 1 or service.kind == "vision"):
            options.codebook = DENSE  # there is nobody to send codes to, or no text to fit them on
        if not codebook_at_hand(options):
            service.say("fitting a codebook, once")
        codebook, folder = ensure_codebook(options, model, tokenizer)
        started = _lead(options, led, service, stack, others, model, tokenizer, codebook, folder)
        stack.pop_all()
    return started


def _lead(
    options: argparse.Namespace,
    led: LedRanks,
    service: Any,
    stack: contextlib.ExitStack,
    others: Cluster | None,
    model: Any,
    tokenizer: Any,
    codebook: Any,
    folder: Path,
) -> Any:
    """The leader of the ranks, which are joined first."""
    import torch

    from ..engine import Engine
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
    addresses = led.addresses if others is None else others.peers
    waiting, gone = Waiting(0, addresses, longest=LONGEST_SILENCE), threading.Event()
    mesh = _join(options, service, others, waiting)
    stack.callback(mesh.close)

    def announce(mesh: Any) -> None:
        gone.clear()
        send_json(mesh, {"do": "follow"}, blocks=JOB, to=peers_in(mesh))

    def away(error: Exception) -> None:
        if not gone.is_set():  # and not one more try
            gone.set()
            waiting.begin()
        if others is not None:
            others.renew_keys()
        _restart(others)

    announce(mesh)
    settings = dict(led.settings)
    engine = stack.enter_context(Engine(model, codebook, mesh, **settings))
    stack.callback(lambda: engine.mesh.close())  # the one that it has by then
    rounds: dict[str, Any] = {
        "max_queue": options.max_queue,
        "rejoin_seconds": REJOIN_SECONDS,
        "beat_seconds": min(0.5, BEAT_SHARE / 2 * options.timeout),
        "announce": announce,
        "on_away": away,
    }
    leader = stack.enter_context(_leader(options, service.kind, engine, tokenizer, rounds))
    return Started(leader, tokenizer, stack.pop_all().close)


def _leader(
    options: argparse.Namespace, kind: str, engine: Any, tokenizer: Any, rounds: dict[str, Any]
) -> Any:
    """Of a model that generates, or of an encoder; it answers once it is entered."""
    from ..serve.encoding import Encoding
    from ..serve.images import Preparation
    from ..serve.leader import Leader
    from ..store import model_folder

    if kind == "decoder":
        memory = None if options.memory is None else options.memory << 20
        return Leader(engine, tokenizer, memory=memory, **rounds)
    folder = model_folder(options.model)
    prepare = None
    if kind == "vision":
        importlib.import_module("PIL")  # else the first request would miss it
        prepare = Preparation.of(engine.model.config, folder)
    return Encoding(engine, pooling=pooling_of(folder), prepare=prepare, **rounds)


# the square root of the length changes no direction
_MODES = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean"}
_MODES |= {"mean_sqrt_len_tokens": "mean"}
_MODULES = ("Transformer", "Pooling", "Normalize")


def pooling_of(folder: str) -> str:
    """How a text's vector is made of its tokens', as sentence-transformers keeps it.

    Raises:
        AstraError: in another way than by the mean or the first token, or by a layer of its own.
    """
    file, modules = Path(folder) / "1_Pooling" / "config.json", Path(folder) / "modules.json"
    parts = json.loads(modules.read_text("utf-8")) if modules.is_file() else []
    kinds = [str(part.get("type")).rpartition(".")[2] for part in parts]
    strange = [kind for kind in kinds if kind not in _MODULES]
    found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    modes = [
        name.removeprefix("pooling_mode_")
        for name, on in found.items()
        if on and name.startswith("pooling_mode_")
    ]
    modes += [found["pooling_mode"]] if "pooling_mode" in found else []
    if strange or any(mode not in _MODES for mode in modes) or len({*modes}) > 1:
        raise AstraError(
            "model: expected text vectors that are the mean of the tokens', or the first token's, "
            f"got {', '.join([*strange, *map(str, modes)])} (modules.json, 1_Pooling)"
        )
    return _MODES[modes[0]] if modes else "mean"


def _join(
    options: argparse.Namespace, service: Any, others: Cluster | None, waiting: Waiting
) -> Any:
    """The mesh; whoever has to be waited for is named, and a process that ended starts again."""
    from ..transport import Link, open_mesh

    link = Link(options.mbit or None, options.delay_ms)
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
