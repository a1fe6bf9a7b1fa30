"""Options that several commands share: adding, reading and judging them."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import AstraError

DEFAULT_MODEL = "smollm2"
DENSE = "none"  # instead of a codebook's folder
# Parts of a command's help.
MODEL = "model and weights"
CODES = "codes and shares of the tokens"
DEVICES = "devices and their connections"


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    """The `type` of an option that takes a whole number from `least` on, up to `most`."""

    def whole(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"expected at most {most}, got {value}")
        return value

    whole.__name__ = "whole number"  # argparse says it of what is none
    return whole


not_negative, positive, two_or_more = at_least(0), at_least(1), at_least(2)
thread_count = at_least(1, 1024)  # more than any machine has cores; many more cannot be started


def seed(text: str) -> int:
    """The `type` of --seed where it is multiplied and added to, within the range of generators."""
    value = int(text)
    if not -(2**31) <= value < 2**31:
        raise argparse.ArgumentTypeError(f"expected -2^31 to 2^31 - 1, got {text}")
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, at most 1e6, got {text}")
    return value


def host(text: str) -> str:
    """The `type` of an option that takes a name or an address without a port."""
    from ..transport.addresses import parse_host

    try:
        return parse_host(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """The part of the command's help under `title`, where others may have put options before."""
    for known in parser._action_groups:
        if known.title == title:
            return known
    return parser.add_argument_group(title)


def add_model(parser: argparse.ArgumentParser) -> None:
    group(parser, MODEL).add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="smollm2, minilm, a folder, a GGUF file, or a Hugging Face model in the local cache "
        "(default: %(default)s)",
    )
    add_form(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_form(parser: argparse.ArgumentParser) -> None:
    """--dtype and --checkpoint; `common.load` reads them."""
    model = group(parser, MODEL)
    model.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "int8", "int4"),
        default="float32",
        help="what the weights are kept in (default: %(default)s); int8 takes about a quarter of "
        "the memory, int4 less; a codebook serves all of them",
    )
    model.add_argument(
        "--checkpoint",
        metavar="DIGEST",
        help="of a model that somebody else quantized: the checkpoint that it was made from, as "
        "astra_config.json of a codebook names it",
    )


def add_tokens(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    what: str,
    count: Callable[[str], int] = positive,
) -> None:
    """--tokens; `window_tokens` reads it."""
    parser.add_argument(
        "--tokens",
        type=count,
        metavar="N",
        help=f"{what} (default: 1024, or the model's limit)",
    )


def add_fit_options(parser: argparse.ArgumentParser) -> None:
    group(parser, CODES).add_argument(
        "--codebook",
        metavar="DIR",
        help="a folder written by `astra fit` (default: the cached one for this model, which is "
        "fitted first if there is none; none: dense tensors)",
    )


def add_mesh_options(parser: argparse.ArgumentParser) -> None:
    add_halo(parser)
    group(parser, CODES).add_argument(
        "--weights", metavar="W,W,…", help="shares of the tokens, one a rank (default: balanced)"
    )
    model = group(parser, MODEL)
    model.add_argument(
        "--mixed-dtypes",
        action="store_true",
        help="let devices keep the weights in float32, int8 or int4, each as its --dtype says; the "
        "same on all devices (default: others than one's own are refused)",
    )
    model.add_argument(
        "--pack-weights",
        action="store_true",
        help="keep a second copy of the float32 weights, in the order in which MKL reads them: "
        "faster where few tokens share a pass, for about twice the memory; each device by itself",
    )
    group(parser, DEVICES).add_argument(
        "--threads",
        type=thread_count,
        metavar="N",
        help="CPU threads a rank (default: all physical cores; ranks on one machine share them)",
    )
    add_connection(parser)


def add_connection(parser: argparse.ArgumentParser) -> None:
    devices = group(parser, DEVICES)
    devices.add_argument(
        "--connect-timeout",
        type=seconds,
        default=600.0,
        metavar="S",
        help="seconds to wait for the other devices to start (default: %(default)g)",
    )
    devices.add_argument(
        "--timeout",
        type=seconds,
        default=60.0,
        metavar="S",
        help="seconds any wait for a peer may take (default: %(default)g)",
    )
    devices.add_argument(
        "--listen",
        type=host,
        metavar="HOST",
        help="the address of this device to listen at, where that is not its own in --peers "
        "(behind address translation, say); the port stays",
    )
    security = devices.add_mutually_exclusive_group()
    security.add_argument(
        "--keys",
        metavar="DIR",
        help="a folder of `astra keys init`, all ranks' or this rank's part (default: the one that "
        "ASTRA_KEYS names; the processes of one command get keys of their own)",
    )
    security.add_argument("--insecure", action="store_true", help="plaintext; refused off loopback")


def add_halo(parser: argparse.ArgumentParser) -> None:
    group(parser, CODES).add_argument(
        "--halo",
        type=not_negative,
        metavar="H",
        help="tokens before its shard that a rank computes, too: better answers for more work "
        "(default: 0 with fine codes, 32 with others, at most an eighth of a shard)",
    )


def add_missing(parser: argparse.ArgumentParser) -> None:
    late = group(parser, "late and lost devices, links that lose packets")
    late.add_argument(
        "--on-missing",
        choices=("raise", "degrade"),
        default="raise",
        help="what to do about a device that is late or lost: end with an error, or answer without "
        "it and say so; the same on all devices (default: raise)",
    )
    late.add_argument(
        "--deadline-ms",
        type=float,
        metavar="X",
        help="how long a block may wait for the codes of the others; the same on all devices",
    )
    late.add_argument(
        "--transport",
        choices=("tcp", "datagram"),
        default="tcp",
        help="how codes cross: datagram, for links that lose packets, goes on without what is lost "
        "(with --on-missing degrade); the same on all devices (default: tcp)",
    )


def add_ranks(
    parser: argparse.ArgumentParser, local: str, rank: str = "with --peers: 0, the leader"
) -> None:
    """Of commands that start local processes, or lead other devices."""
    devices = group(parser, DEVICES)
    devices.add_argument("--world-size", type=positive, metavar="N", help=local)
    devices.add_argument("--rank", type=int, metavar="R", help=rank)
    devices.add_argument("--peers", metavar="HOST:PORT,…", help="of every rank, by rank")


def add_leader(parser: argparse.ArgumentParser) -> None:
    """Of commands that answer requests with local processes, or lead other devices; behind
    `add_mesh_options`, whose --timeout has another default."""
    parser.set_defaults(timeout=5.0)
    devices = group(parser, DEVICES)
    devices.add_argument("--mbit", type=float, default=0.0, help="emulate links of this rate")
    devices.add_argument("--delay-ms", type=float, default=0.0, help="and of this one-way delay")
    parser.add_argument(
        "--max-queue",
        type=positive,
        default=64,
        metavar="N",
        help="requests that wait (default: 64)",
    )
    parser.add_argument(
        "--memory",
        type=positive,
        metavar="MIB",
        help="for keys and values, on each device (default: half of what is free)",
    )


def missing_of(options: argparse.Namespace) -> dict[str, Any]:
    """--on-missing and --deadline-ms as keyword arguments; a command may have neither."""
    settings: dict[str, Any] = {"on_missing": "raise", "deadline_ms": None}
    settings |= {name: getattr(options, name, value) for name, value in settings.items()}
    deadline = settings["deadline_ms"]
    if settings["on_missing"] == "degrade" and deadline is None:
        raise AstraError("--on-missing degrade: expected --deadline-ms beside it")
    if deadline is not None and not 0 < deadline <= 1e9:
        raise AstraError(f"--deadline-ms: expected above 0, at most 1e9, got {deadline:g}")
    if getattr(options, "transport", "tcp") == "datagram" and settings["on_missing"] == "raise":
        raise AstraError("--transport datagram: expected --on-missing degrade beside it")
    return settings


def engine_options(options: argparse.Namespace, world_size: int) -> dict[str, Any]:
    """--weights, --halo, --on-missing and --deadline-ms, judged, and how a rank keeps its weights:
    keyword arguments of `Ranks`."""
    weights = weights_of(options, world_size)
    forms = {
        "mixed_forms": getattr(options, "mixed_dtypes", False),
        "pack_weights": getattr(options, "pack_weights", False),
    }
    return {"weights": weights, "halo": options.halo, **missing_of(options), **forms}


def settle_threads(options: argparse.Namespace, processes: int) -> None:
    """--threads, where nobody said how many: of `processes` that share this machine."""
    from ..cores import threads_of

    if options.threads is None:
        options.threads = threads_of(processes)


def add_trace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write a timeline of every rank's stages, for chrome://tracing or ui.perfetto.dev",
    )


def output_folder(options: argparse.Namespace) -> Path:
    """The folder that --output names, made, and found to take files before hours are spent."""
    folder = Path(options.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise AstraError(f"--output: {folder} cannot be written to: {error.strerror}") from error
    return folder


def check_trace(options: argparse.Namespace) -> None:
    """Refuses a --trace file that could not be written after the run."""
    if not options.trace:
        return
    path = Path(os.path.realpath(options.trace))
    try:
        if path.exists() and not path.is_file():  # a pipe or a device, if it is no folder
            good = not path.is_dir() and os.access(path, os.W_OK)
        else:  # a file is written beside the old one, and takes its place
            with tempfile.TemporaryFile(dir=path.parent):
                good = True
    except OSError:
        good = False
    if not good:
        raise AstraError(f"--trace: expected a file that can be written, got {options.trace}")


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
    from ..transport.addresses import parse_address

    peers: list[str] = options.peers.split(",")
    for peer in peers:
        parse_address(peer)
    if options.rank is None or not 0 <= options.rank < len(peers):
        raise AstraError(f"--rank: expected 0 to {len(peers) - 1} with --peers, got {options.rank}")
    return peers


def led_peers(options: argparse.Namespace) -> list[str] | None:
    """The addresses of --peers, which this process leads as rank 0; None: it was given none.

    Refuses contradictions, and keys that cannot be used, before a model is loaded.
    """
    if options.peers is None:
        if options.rank is not None:
            raise AstraError("--rank: expected together with --peers")
        return None
    peers = peers_of(options)
    if options.rank != 0:
        raise AstraError("--rank: expected 0 with --peers; the other devices run `astra worker`")
    if options.world_size not in (None, len(peers)):
        raise AstraError(
            f"--world-size: expected {len(peers)}, the addresses of --peers, or none, "
            f"got {options.world_size}"
        )
    check_keys(options, peers)
    return peers


def sharing(peers: list[str], rank: int) -> int:
    """How many of the ranks at these addresses share the machine of `rank`, itself among them.

    That is the same host by name, or loopback under any name.
    """
    from ..transport.addresses import is_loopback, parse_address

    hosts = [parse_address(peer)[0].lower() for peer in peers]
    own = hosts[rank]
    if is_loopback(own):
        return sum(map(is_loopback, hosts))
    return hosts.count(own)


def connect_options(
    options: argparse.Namespace, rank: int, world_size: int, peers: list[str] | None, **changes: Any
) -> Any:
    """The `ConnectOptions` of this command; `changes`: what its own options do not say."""
    from ..transport import ConnectOptions

    settings = {name: getattr(options, name) for name in ("timeout", "connect_timeout")}
    settings |= {name: getattr(options, name) for name in ("keys", "insecure")}
    settings["host"] = getattr(options, "listen", None)
    addresses = None if peers is None else tuple(peers)
    return ConnectOptions(rank, world_size, addresses, **settings | changes)


def model_name(options: argparse.Namespace) -> str:
    """What --model is called: the last part of a path, of "." the working folder's name."""
    return Path(os.path.abspath(Path(options.model).expanduser())).name


def check_text(option: str, text: str) -> str:
    """`text`, which a terminal or a file may have given as bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        given = text.encode(errors="surrogateescape")
        raise AstraError(
            f"{option}: expected text in UTF-8, got the bytes {given!r:.99}"
        ) from error
    return text


def check_keys(options: argparse.Namespace, peers: list[str]) -> None:
    """Refuses plaintext between devices, keys that cannot be used and an address that is none of
    this machine's, before a model is loaded."""
    from ..transport import check_keys
    from ..transport.addresses import parse_address
    from ..transport.sockets import check_host

    host = getattr(options, "listen", None)
    check_keys(options.rank, peers, options.keys, options.insecure, host)
    check_host(host or parse_address(peers[options.rank])[0], options.rank)


def check_own_keys(options: argparse.Namespace, ranks: Iterable[int], world_size: int) -> None:
    """Refuses keys that these ranks, all on this machine, could not use."""
    from ..transport import check_keys

    peers = [f"127.0.0.1:{1 + rank}" for rank in range(world_size)]
    for rank in ranks:
        check_keys(rank, peers, options.keys, options.insecure)
