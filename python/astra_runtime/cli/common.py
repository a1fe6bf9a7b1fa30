"""What several commands share: options, models with their codebooks, the cluster of workers."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import AstraError
from ..launch import WorkerFailed, Workers, free_ports

DEFAULT_MODEL = "smollm2"
DENSE = "none"  # instead of a codebook's folder
READY_SECONDS = 120.0
SAMPLED, SAMPLED_TOKENS = 24, 512  # windows that a model writes, and the length of each
WINDOWS, OTHERS = 26, 10  # of the text given; of the built-in text's second domain


def say(text: str) -> None:
    """A line for people: on stderr, so that stdout holds results only."""
    print(text, file=sys.stderr, flush=True)


def show_json(value: Any) -> None:
    def finite(item: Any) -> Any:
        """JSON has no word for nan and infinity."""
        if isinstance(item, dict):
            return {name: finite(inner) for name, inner in item.items()}
        if isinstance(item, list | tuple):
            return [finite(inner) for inner in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    print(json.dumps(finite(value), ensure_ascii=False, allow_nan=False), flush=True)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected at least 0, got {text}")
    return value


def two_or_more(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2, got {value}")
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, at most 1e6, got {text}")
    return value


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="smollm2, minilm, a folder, or a Hugging Face model in the local cache "
        "(default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_fit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--codebook",
        metavar="DIR",
        help="a folder written by `astra fit` (default: the cached one for this model, which is "
        "fitted first if there is none; none: dense tensors)",
    )


def add_mesh_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads a rank (1)")
    parser.add_argument(
        "--weights", metavar="W,W,…", help="shares of the tokens, one a rank (default: balanced)"
    )
    add_halo(parser)
    add_connection(parser)


def add_connection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--connect-timeout",
        type=seconds,
        default=600.0,
        help="seconds to wait for the other devices to start (default: %(default)g)",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=60.0,
        help="seconds any wait for a peer may take (default: %(default)g)",
    )
    security = parser.add_mutually_exclusive_group()
    security.add_argument(
        "--keys",
        metavar="DIR",
        help="a folder of `astra keys init`, all ranks' or this rank's part (default: the one that "
        "ASTRA_KEYS names; the processes of one command get keys of their own)",
    )
    security.add_argument("--insecure", action="store_true", help="plaintext; refused off loopback")


def add_halo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--halo",
        type=not_negative,
        metavar="H",
        help="tokens before its shard that a rank computes, too: better answers for more work "
        "(default: 32 with codes, at most an eighth of a shard)",
    )


def add_missing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-missing",
        choices=("raise", "degrade"),
        default="raise",
        help="what to do about a device that is late or lost: end with an error, or answer without "
        "it and say so; the same on all devices (default: raise)",
    )
    parser.add_argument(
        "--deadline-ms",
        type=float,
        metavar="X",
        help="how long a block may wait for the codes of the others; the same on all devices",
    )
    parser.add_argument(
        "--transport",
        choices=("tcp", "datagram"),
        default="tcp",
        help="how codes cross: datagram, for links that lose packets, goes on without what is lost "
        "(with --on-missing degrade); the same on all devices (default: tcp)",
    )


def missing_of(options: argparse.Namespace) -> dict[str, Any]:
    """What --on-missing and --deadline-ms say, for `Ranks`; a command may have neither."""
    found: dict[str, Any] = {"on_missing": "raise", "deadline_ms": None}
    found |= {name: getattr(options, name, value) for name, value in found.items()}
    deadline = found["deadline_ms"]
    if found["on_missing"] == "degrade" and deadline is None:
        raise AstraError("--on-missing degrade: expected --deadline-ms beside it")
    if deadline is not None and not 0 < deadline <= 1e9:
        raise AstraError(f"--deadline-ms: expected above 0, at most 1e9, got {deadline:g}")
    if getattr(options, "transport", "tcp") == "datagram" and found["on_missing"] == "raise":
        raise AstraError("--transport datagram: expected --on-missing degrade beside it")
    return found


def add_trace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write a timeline of every rank's stages, for chrome://tracing or ui.perfetto.dev",
    )


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


def weights_of(options: argparse.Namespace, world_size: int) -> list[float] | None:
    """The shares that --weights names, one a rank."""
    if options.weights is None:
        return None
    wanted = f"expected {world_size} positive numbers, one for each rank, got {options.weights}"
    try:
        weights = [float(w) for w in options.weights.split(",")]
    except ValueError as error:
        raise AstraError(f"--weights: {wanted}") from error
    if len(weights) != world_size or not all(0 < w < math.inf for w in weights):
        raise AstraError(f"--weights: {wanted}")
    return weights


def peers_of(options: argparse.Namespace) -> list[str]:
    """The addresses that --peers names, by rank, this rank among them."""
    from ..transport.handshake import parse_address

    peers: list[str] = options.peers.split(",")
    for peer in peers:
        parse_address(peer)
    if options.rank is None or not 0 <= options.rank < len(peers):
        raise AstraError(f"--rank: expected 0 to {len(peers) - 1} with --peers, got {options.rank}")
    return peers


def check_keys(options: argparse.Namespace, peers: list[str]) -> None:
    """Refuses plaintext between devices, and keys that cannot be used, before a model is loaded."""
    from ..transport import check_keys

    check_keys(options.rank, peers, options.keys, options.insecure)


def quiet_transformers() -> None:
    """No bars and advice from libraries between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load(name: str, *, decoder: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer by name; `decoder`: only a model that can continue a text will do."""
    from ..models import adapt
    from ..store import load_model, load_tokenizer

    quiet_transformers()
    model = load_model(name)
    if not (adapt(model).causal and hasattr(model, "lm_head")) and decoder:
        raise AstraError(f"model {name!r}: expected a language model that continues texts")
    return model, load_tokenizer(name)


def ensure_codebook(options: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[Any, Path]:
    """The codebook asked for, or the cached default, fitted now if there is none."""
    from astra_kernels._cache import cache_folder

    from ..codebook import Codebook
    from ..models import adapt

    if options.codebook == DENSE:
        return Codebook.none(), Path(DENSE)
    if options.codebook:
        folder = Path(options.codebook)
        return Codebook.from_pretrained(folder), folder
    name = f"{Path(options.model).name}-{adapt(model).digest()}-transform"
    folder = cache_folder() / "codebooks" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several ranks on one machine, one fits
        if not (folder / "astra_config.json").is_file():
            say(f"no codebook for {options.model} yet: fitting one, once, into {folder}")
            # quick: a text of two kinds, and nothing that the model writes; `astra fit` does more
            made = fit_builtin(model, tokenizer, space="transform", windows=14, sampled=0)
            made.save_pretrained(folder)
    return Codebook.from_pretrained(folder), folder


def fit_builtin(model: Any, tokenizer: Any, **options: Any) -> Any:
    """A codebook fitted on the calibration part of the built-in text.

    That is documentation; in space "transform", which gains by it, also source code.
    """
    from ..store import builtin_text

    others = builtin_text("source")[0] if options.get("space") == "transform" else None
    return fit_text(model, tokenizer, builtin_text()[0], others=others, **options)


def fit_text(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    tokens: int = 1024,
    windows: int = WINDOWS,
    sampled: int | None = None,
    others: str | None = None,
    **options: Any,
) -> Any:
    """A codebook fitted on windows of a text, with progress and a plain word on its worth.

    A few windows more are of the text `others`. `sampled` ones are written by the model itself;
    None: as many as serve its space well.
    """
    from ..evaluate import is_language_model
    from ..fit import fit
    from ..sample import BATCH, document_token, sampled_windows
    from ..store import token_windows

    length = min(tokens, getattr(model.config, "max_position_embeddings", tokens))
    calibration = token_windows(tokenizer, text, length, windows)
    writes = is_language_model(model)
    if sampled is None:
        sampled = SAMPLED if writes and options.get("space") == "transform" else 0
    if sampled and not writes:
        raise AstraError("--sampled: expected a language model, which writes text, or 0 windows")
    with progress_bar() as progress:
        size = min(length, SAMPLED_TOKENS)
        more = token_windows(tokenizer, others, length, OTHERS) if others else []
        options["extra"] = more + sampled_windows(
            model,
            sampled,
            size,
            start=document_token(tokenizer),
            seed=options.get("seed", 0),
            progress=lambda done: progress("sampling", done, -(-sampled // BATCH) * size),
        )
        codebook = fit(model, calibration, progress=progress, **options)
    say(verdict(codebook.notes.get("held_back")))
    return codebook


@contextlib.contextmanager
def progress_bar() -> Iterator[Any]:
    """A `fit.Progress` for people: a bar on stderr if it is a terminal, else a line a stage."""
    from tqdm import tqdm

    bar: Any = None
    stage = ""

    def show(what: str, done: int, steps: int) -> None:
        nonlocal bar, stage
        if what != stage:
            if bar is not None:
                bar.close()
            stage = what
            bar = tqdm(total=steps, desc=what, file=sys.stderr, disable=not sys.stderr.isatty())
            if not sys.stderr.isatty():
                print(f"{what} ({steps} steps)", file=sys.stderr, flush=True)
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def verdict(held_back: dict[str, Any] | None) -> str:
    """What a codebook is worth on the windows held back from its fit, in a sentence."""
    if held_back is None:
        return "not evaluated: too few windows to hold one back"
    exact, astra, dropped = (held_back[key] for key in ("exact", "astra", "local_only"))
    figures = (
        f"{held_back['metric']} on {held_back['windows']} windows held back, "
        f"{held_back['world_size']} ranks: exact {exact:.4g}, "
        f"ASTRA {astra:.4g}, remote tokens dropped {dropped:.4g}"
    )
    if astra >= dropped:
        return (
            f"WARNING: these codes are worse than dropping the remote tokens ({figures}). "
            "Calibrate on more text, or use more groups."
        )
    if dropped <= exact:
        return f"{figures}: remote tokens are worth nothing on these windows, so neither are codes"
    kept = held_back["gap_recovered"]
    return f"{figures}; {100 * kept:.0f} % of what remote tokens are worth is kept"


@contextlib.contextmanager
def local_keys(options: argparse.Namespace, world_size: int) -> Iterator[str | None]:
    """The folder of keys for processes that this one starts, ephemeral ones unless --keys names
    some; None: plaintext, on loopback, which only --insecure or a missing package leads to."""
    from ..keys import EXTRA, can_make_keys, ephemeral_keys

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

    from ..jobs import Ranks
    from ..transport import connect
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
            mesh = connect(
                0,
                world_size,
                peers,
                backend=transport,
                timeout=options.timeout,
                connect_timeout=15.0,
                keys=keys,
                insecure=not keys,
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
