"""`astra plan`: how quick a model will be on N devices, and what to choose, before deploying it."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..console import say, show_json, working
from ..errors import AstraError
from .common import TOKENS, load, window_tokens
from .fitting import cached_codebook, ensure_codebook
from .options import (
    DENSE,
    MODEL,
    add_connection,
    add_form,
    add_tokens,
    check_keys,
    connect_options,
    group,
    peers_of,
    positive,
    settle_threads,
    sharing,
    thread_count,
)
from .waiting import Waiting

WORLDS = (2, 3, 4, 8)
MBIT, RTT_MS = 10.0, 1.0  # of the links, where nobody gives or measures them


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  astra plan --model smollm2 --tokens 1024 --mbit 10 --rtt-ms 2 --codebook DIR\n"
        "      (measures this machine; every device is taken to be like it)\n"
        "  astra plan --peers 10.0.0.1:7000,10.0.0.2:7000 --keys rank-0/ --codebook DIR\n"
        "      (measures these devices and their links; the others run `astra worker`)\n"
        "  astra plan --model llama-3-8b --tokens 4096 --mbit 20 --flops 50e12 --world-size 2 4 8"
    )
    group(parser, MODEL).add_argument(
        "--model",
        default="smollm2",
        help="a model's folder or smollm2 (default); with --flops also the name of a shape: "
        "vit-base, gpt2, gpt2-medium, llama-3-8b",
    )
    add_form(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_tokens(parser, "of the input")
    parser.add_argument(
        "--mbit", type=float, help="rate of each device's link (default: 10, or measured)"
    )
    parser.add_argument(
        "--rtt-ms", type=float, help="round trip of two devices (default: 1, or measured)"
    )
    parser.add_argument(
        "--world-size", type=positive, nargs="+", help="devices (2 3 4 8; with --peers: all counts)"
    )
    parser.add_argument(
        "--peers",
        help="host:port of every rank, by rank, this one being 0: they and their links are "
        "measured; the other devices run `astra worker` with the same codebook",
    )
    parser.add_argument(
        "--codebook",
        nargs="+",
        metavar="DIR",
        help="codebooks fitted for this model (default: the cached one, if there is one; none: "
        "dense tensors only)",
    )
    parser.add_argument(
        "--flops", type=float, help="FLOP/s of a device; default: this machine is measured"
    )
    parser.add_argument(
        "--threads",
        type=thread_count,
        help="CPU threads measured with (default: all physical cores)",
    )
    parser.add_argument(
        "--speeds",
        metavar="S,S,…",
        help="how quick each device is beside the first, 1,0.5 for one at half its speed; "
        "with one --world-size",
    )
    add_connection(parser)


@dataclass(frozen=True)
class Devices:
    """The links, and every rank's rates by codes."""

    mbit_per_s: float
    rtt_ms: float
    rates: dict[str, list[Any]]


def run(options: argparse.Namespace) -> int:
    import torch

    from ..models import adapt
    from ..models.families import ViT
    from ..models.shapes import SHAPES, shaped

    shape = options.model in SHAPES
    if shape and options.flops is None:
        raise AstraError(f"--flops: expected with the shape {options.model}, which has no weights")
    peers = None if options.peers is None else _check_peers(options)
    if peers is None and options.world_size is None:
        options.world_size = list(WORLDS)
    speeds = _speeds(options)
    _check_rates(options)
    books = _read_books(options.codebook or [])
    # without --peers every device has a machine of its own
    settle_threads(options, 1 if peers is None else sharing(peers, options.rank))
    torch.set_num_threads(options.threads)
    fits = peers is not None and options.codebook is None  # on text, if none is cached
    model, tokenizer = (shaped(options.model), None) if shape else load(options, tokenizer=fits)
    adapter = adapt(model)
    if not shape and isinstance(adapter, ViT):
        options.tokens = options.tokens or adapter.num_patches
    options.tokens = (options.tokens or TOKENS) if shape else window_tokens(options, model)
    # beside the class token, which every rank of an encoder computes
    tokens = options.tokens - (adapter.class_tokens if adapter.token_ids else 0)
    if peers is None:
        books = _books(options, books, model, shape)
        devices = _this_machine(options, model, books, tokens, speeds)
    else:
        if not options.codebook:
            books = {"codes": ensure_codebook(options, model, tokenizer)[0]}
        name, book = next(iter(books.items()), (DENSE, None))
        books = _checked(books, adapter) | _dense_books()
        devices = _measured(options, peers, model, tokens, name, book)
        options.world_size = options.world_size or range(2, len(peers) + 1)
    rows = _rows(options, adapter, books, devices, tokens)
    result = _result(options, adapter, devices, tokens, rows)
    (show_json if options.json else show)(result)
    return 0


def _rows(
    options: argparse.Namespace, adapter: Any, books: dict[str, Any], devices: Devices, tokens: int
) -> list[dict[str, Any]]:
    link = (devices.mbit_per_s, devices.rtt_ms)
    beyond = [world for world in options.world_size if world > tokens]
    if beyond:
        say(f"left out: {beyond[0]} devices, which are more than the {tokens} tokens")
    return [
        {"codes": name, **row(adapter, books[name], rates[:world], link, tokens)}
        for name, rates in devices.rates.items()
        for world in options.world_size
        if 1 < world <= min(tokens, len(rates))
    ]


def _result(
    options: argparse.Namespace,
    adapter: Any,
    devices: Devices,
    tokens: int,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    from ..deploy.predict import one_device

    alone = min(one_device(adapter, rates[0], tokens) for rates in devices.rates.values())
    for each in rows:
        each["speedup"] = alone / each["seconds"]
    rows = sorted(rows, key=lambda each: each["seconds"])
    return {
        "model": options.model,
        "tokens": options.tokens,
        "mbit_per_s": devices.mbit_per_s or None,
        "rtt_ms": devices.rtt_ms,
        "flops": options.flops,
        "single_seconds": alone,
        "rows": rows,
        "recommended": rows[0] if rows and rows[0]["speedup"] > 1 else None,
    }


def _check_peers(options: argparse.Namespace) -> list[str]:
    options.rank = 0
    peers = peers_of(options)
    for name in ("flops", "speeds"):
        if getattr(options, name) is not None:
            raise AstraError(f"--{name}: expected without --peers, which are measured")
    if len(options.codebook or []) > 1:
        raise AstraError(
            f"--codebook: expected one with --peers, the workers' own, got {len(options.codebook)}"
        )
    if any(n > len(peers) for n in options.world_size or ()):
        raise AstraError(f"--world-size: expected at most the {len(peers)} of --peers")
    check_keys(options, peers)
    return peers


def _check_rates(options: argparse.Namespace) -> None:
    """Refuses links and devices that cannot be, before anything is measured."""
    for name, least in (("mbit", "from 0 on"), ("rtt_ms", "from 0 on"), ("flops", "above 0")):
        value = getattr(options, name)
        good = value is None or (0 <= value < math.inf and (name != "flops" or value > 0))
        if not good:
            option = name.replace("_", "-")
            raise AstraError(f"--{option}: expected a finite number {least}, got {value}")


def _read_books(folders: list[str]) -> dict[str, Any]:
    """The codebooks of --codebook, by the names of their folders; of one name, by their paths."""
    from ..codes.codebook import Codebook

    paths = list(dict.fromkeys(Path(folder) for folder in folders if folder != DENSE))
    names = [path.resolve().name for path in paths]
    return {
        str(path) if names.count(name) > 1 else name: Codebook.from_pretrained(path)
        for path, name in zip(paths, names, strict=True)
    }


def _books(
    options: argparse.Namespace, books: dict[str, Any], model: Any, shape: bool
) -> dict[str, Any]:
    """What to predict: fitted codebooks, or codes as wide as fitted ones, and dense exchange."""
    from ..codes.codebook import Codebook
    from ..models import adapt

    adapter = adapt(model)
    if options.codebook is None:
        cached = None if shape else cached_codebook(options.model, model)
        if cached is not None:
            books = {cached.name: Codebook.from_pretrained(cached)}
        if options.flops is not None:
            books |= nominal(adapter)
        elif not books:
            say(
                f"codes were not looked at: there is no codebook for {options.model} yet. "
                f"`astra fit --model {options.model} --output DIR` makes one for --codebook DIR; "
                "--flops predicts without one"
            )
    return _checked(books, adapter) | _dense_books()


def _checked(books: dict[str, Any], adapter: Any) -> dict[str, Any]:
    for book in books.values():
        if book.model:  # fitted, and for which model
            book.check_model(adapter)
    return books


def _dense_books() -> dict[str, Any]:
    from ..codes.codebook import Codebook
    from ..codes.fields import DENSE_DTYPES

    return {f"dense {dtype}": Codebook.dense(dtype) for dtype in DENSE_DTYPES}


def _this_machine(
    options: argparse.Namespace,
    model: Any,
    books: dict[str, Any],
    tokens: int,
    speeds: list[float] | None,
) -> Devices:
    """As many devices as are asked for, each like this machine or as --flops and --speeds say."""
    from ..deploy.rates import measure_rates, rates_of_flops
    from ..models import adapt

    by_codes = {}
    for name, book in books.items():
        if options.flops is not None:
            rates = rates_of_flops(adapt(model), book, options.flops)
        else:
            what = f"measuring {name} on this machine, {options.threads} thread(s)"
            say(what)
            with working(what):
                rates = measure_rates(model, book, tokens)
        count = min(tokens, max(options.world_size))  # more have no token
        by_codes[name] = [rates.slower(1 / speed) for speed in speeds or [1.0] * count]
    mbit = MBIT if options.mbit is None else options.mbit
    return Devices(mbit, RTT_MS if options.rtt_ms is None else options.rtt_ms, by_codes)


def _measured(
    options: argparse.Namespace, peers: list[str], model: Any, tokens: int, name: str, book: Any
) -> Devices:
    """Joins the workers: the slowest of their links, and every rank's rates with `book`.

    None: the workers were started with --codebook none.
    """
    from ..codes.codebook import Codebook
    from ..deploy.jobs import Ranks
    from ..transport import open_mesh

    book = Codebook.dense() if book is None else book
    say(f"rank 0 of {len(peers)} waits for the others at {peers[0]}")
    waiting = Waiting(0, peers)
    with open_mesh(connect_options(options, 0, len(peers), peers, on_wait=waiting)) as mesh:
        what = f"measuring {len(peers)} devices and the links between them"
        say(what)
        ranks = Ranks(model, book, mesh)
        with working(what):
            answer = ranks.submit(do="probe", tokens=tokens, codebook=book.digest)
        ranks.submit(do="stop")
        ranks.close()
    for peer in range(1, len(peers)):
        say(
            f"rank {peer}: round trip {answer.rtt_ms[peer]:.2f} ms, "
            f"{answer.up_mbit[peer]:.1f} Mbit/s to it, {answer.down_mbit[peer]:.1f} back"
        )
    link, rates = answer.link(), dict(answer.rates)
    of_codes = rates.pop("codes")
    if book.coded:
        rates = {name: of_codes} | rates
    mbit = link.mbit_per_s if options.mbit is None else options.mbit
    rtt_ms = 2 * link.delay_ms if options.rtt_ms is None else options.rtt_ms
    return Devices(mbit, rtt_ms, rates)


def nominal(adapter: Any) -> dict[str, Any]:
    """Codes as wide as fitted ones, without tables: what can be predicted before any fit."""
    from ..codes.base import geometry
    from ..codes.codebook import Codebook
    from ..codes.hidden import HiddenCodes
    from ..codes.kv import KeyValueCodes

    sizes = geometry(adapter)
    heads = sizes["num_key_value_heads"]
    return {
        "kv, one code": Codebook(KeyValueCodes.key, 1, 1024, True, geometry=sizes),
        "kv, one code a head": Codebook(KeyValueCodes.key, heads, 1024, geometry=sizes),
        "hidden, one code": Codebook(HiddenCodes.key, 1, 1024, geometry=sizes),
        "hidden, 16 codes": Codebook(HiddenCodes.key, 16, 1024, geometry=sizes),
    }


def row(
    adapter: Any, book: Any, rates: list[Any], rate_and_trip: tuple[float, float], tokens: int
) -> dict[str, Any]:
    """What to expect of a codebook on devices of these rates."""
    from ..costs import engine_plan
    from ..deploy.predict import bits_sent, quickest_plan
    from ..transport import Link

    mbit, rtt_ms = rate_and_trip
    world = len(rates)
    plan, prediction = quickest_plan(adapter, book, rates, Link(mbit or None, rtt_ms / 2), tokens)
    shards = [plan.size(n) for n in range(world)]
    usual = plan == engine_plan(adapter, book, tokens, world)
    held_back = book.notes.get("held_back") or {}
    return {
        "world_size": world,
        "seconds": prediction.seconds,
        "waiting_share": max(
            waiting / (waiting + busy) if waiting else 0.0
            for waiting, busy in zip(prediction.waiting, prediction.busy, strict=True)
        ),
        "shards": shards,
        "weights": None if usual else shards,
        "halo": plan.halo,
        "bits_per_token_block": bits_sent(adapter, book, plan),
        "gap_recovered": held_back.get("gap_recovered"),
    }


def _speeds(options: argparse.Namespace) -> list[float] | None:
    if options.speeds is None:
        return None
    wanted = f"expected positive numbers, one a device, got {options.speeds!r}"
    try:
        speeds = [float(text) for text in options.speeds.split(",")]
    except ValueError as error:
        raise AstraError(f"--speeds: {wanted}") from error
    if not all(0 < speed < math.inf for speed in speeds):
        raise AstraError(f"--speeds: {wanted}")
    if options.world_size != [len(speeds)]:
        raise AstraError(
            f"--speeds: expected together with --world-size {len(speeds)}, "
            f"got {' '.join(map(str, options.world_size))}"
        )
    return speeds


def show(result: dict[str, Any]) -> None:
    rate = "no limit" if result["mbit_per_s"] is None else f"{result['mbit_per_s']:g} Mbit/s"
    print(
        f"\n{result['model']}, {result['tokens']} tokens, link {rate}, "
        f"round trip {result['rtt_ms']:g} ms; one device alone: {result['single_seconds']:.3f} s\n"
    )
    wide = max([23, *(len(row["codes"]) for row in result["rows"])]) + 1
    print(
        f"{'':{wide}}{'devices':>8}{'seconds':>10}{'speedup':>9}{'waiting':>9}"
        f"{'bits/token/block':>18}{'recovered':>11}"
    )
    for row in result["rows"]:
        recovered = "" if row["gap_recovered"] is None else f"{row['gap_recovered']:.2f}"
        print(
            f"{row['codes']:{wide}}{row['world_size']:8}{row['seconds']:10.3f}"
            f"{row['speedup']:8.2f}×{row['waiting_share']:9.0%}"
            f"{row['bits_per_token_block']:18.0f}{recovered:>11}"
        )
    best = result["recommended"]
    if best is None:
        print("\nrecommended: stay on one device")
    else:
        shards = "+".join(map(str, best["shards"]))
        print(
            f"\nrecommended: {best['codes']} on {best['world_size']} devices, shards {shards}: "
            f"{best['speedup']:.2f}× ({best['seconds']:.3f} s)"
        )
        if best["weights"]:
            print(f"with --weights {','.join(map(str, best['weights']))} on every device")
        if best["gap_recovered"] is None and best["codes"] not in _dense_books():
            print("how accurate these codes are is known after a fit: see `astra fit`")
