"""`astra plan`: how quick a model will be on N devices, and what to choose, before deploying it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ..console import say, show_json
from ..errors import AstraError
from .common import load
from .options import add_connection, check_keys, connect_options, peers_of, positive

WORLDS = (2, 3, 4, 8)
DENSE_DTYPES = ("float32", "float16", "int8")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  astra plan --model smollm2 --tokens 1024 --mbit 10 --rtt-ms 2 --codebook DIR\n"
        "      (measures this machine; every device is taken to be like it)\n"
        "  astra plan --peers 10.0.0.1:7000,10.0.0.2:7000 --keys rank-0/ --codebook DIR\n"
        "      (measures these devices and their links; the others run `astra worker`)\n"
        "  astra plan --model llama-3-8b --tokens 4096 --mbit 20 --flops 50e12 --world-size 2 4 8"
    )
    parser.add_argument(
        "--model",
        default="smollm2",
        help="a model's folder or smollm2 (default); with --flops also the name of a shape: "
        "vit-base, gpt2, gpt2-medium, llama-3-8b",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--tokens", type=positive, default=1024, help="of the input (1024)")
    parser.add_argument("--mbit", type=float, help="rate of each device's link (10, or measured)")
    parser.add_argument("--rtt-ms", type=float, help="round trip of two devices (1, or measured)")
    parser.add_argument(
        "--world-size", type=positive, nargs="+", help="devices (2 3 4 8; with --peers: all counts)"
    )
    parser.add_argument(
        "--peers",
        help="host:port of every rank, by rank, this one being 0: they and their links are "
        "measured; the other devices run `astra worker` with the same codebook",
    )
    parser.add_argument(
        "--codebook", nargs="*", default=[], metavar="DIR", help="codebooks fitted for this model"
    )
    parser.add_argument(
        "--flops", type=float, help="FLOP/s of a device; default: this machine is measured"
    )
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads measured with (1)")
    parser.add_argument(
        "--speeds",
        metavar="S,S,…",
        help="how quick each device is beside the first, 1,0.5 for one at half its speed; "
        "with one --world-size",
    )
    add_connection(parser)


def run(options: argparse.Namespace) -> int:
    import torch

    from ..deploy.predict import single
    from ..models import adapt
    from ..models.shapes import SHAPES, shaped

    if options.model in SHAPES and options.flops is None:
        raise AstraError(f"--flops: expected with the shape {options.model}, which has no weights")
    peers = None if options.peers is None else _peers(options)
    if peers is None and options.world_size is None:
        options.world_size = list(WORLDS)
    speeds = _speeds(options)
    torch.set_num_threads(options.threads)
    model = shaped(options.model) if options.model in SHAPES else load(options.model)[0]
    adapter = adapt(model)
    books = _books(options, adapter)
    if peers is None:
        mbit = 10.0 if options.mbit is None else options.mbit
        rtt_ms = 1.0 if options.rtt_ms is None else options.rtt_ms
        rates = _rates_here(options, model, books)
        most = max(options.world_size)
        of_ranks = {
            name: [found.slower(1 / speed) for speed in speeds or [1.0] * most]
            for name, found in rates.items()
        }
    else:
        (name,) = [name for name, book in books.items() if book.coded]
        mbit, rtt_ms, of_ranks = _measured(options, peers, model, name, books[name])
        options.world_size = options.world_size or range(2, len(peers) + 1)
    rows = []
    alone = min(single(adapter, found[0], options.tokens) for found in of_ranks.values())
    for name, found in of_ranks.items():
        worlds = [n for n in options.world_size if 1 < n <= min(options.tokens, len(found))]
        rows += [
            {"codes": name, **row(adapter, books[name], found[:n], (mbit, rtt_ms), options.tokens)}
            for n in worlds
        ]
    for each in rows:
        each["speedup"] = alone / each["seconds"]
    best = min(rows, key=lambda each: each["seconds"], default=None)
    if best is not None and best["speedup"] <= 1:
        best = None
    result = {
        "model": options.model,
        "tokens": options.tokens,
        "mbit_per_s": mbit or None,
        "rtt_ms": rtt_ms,
        "flops": options.flops,
        "single_seconds": alone,
        "rows": sorted(rows, key=lambda each: each["seconds"]),
        "recommended": best,
    }
    if options.json:
        show_json(result)
    else:
        show(result)
    return 0


def _peers(options: argparse.Namespace) -> list[str]:
    options.rank = 0
    peers = peers_of(options)
    for name in ("flops", "speeds"):
        if getattr(options, name) is not None:
            raise AstraError(f"--{name}: expected without --peers, which are measured")
    if len(options.codebook) != 1:
        raise AstraError(
            f"--codebook: expected one with --peers, the workers' own, got {len(options.codebook)}"
        )
    if any(n > len(peers) for n in options.world_size or ()):
        raise AstraError(f"--world-size: expected at most the {len(peers)} of --peers")
    check_keys(options, peers)
    return peers


def _books(options: argparse.Namespace, adapter: Any) -> dict[str, Any]:
    """What to predict: fitted codebooks, or codes as wide as fitted ones, and dense exchange."""
    from ..codes.codebook import Codebook

    books = {Path(at).name: Codebook.from_pretrained(at) for at in options.codebook}
    for book in books.values():
        book.check_model(adapter)
    books |= nominal(adapter) if not books else {}
    return books | {f"dense {dtype}": Codebook.none(dtype) for dtype in DENSE_DTYPES}


def _rates_here(options: argparse.Namespace, model: Any, books: dict[str, Any]) -> dict[str, Any]:
    """This machine's rates, or those of --flops."""
    from ..deploy.predict import measured, of_flops
    from ..models import adapt

    found = {}
    for name, book in books.items():
        if options.flops is not None:
            found[name] = of_flops(adapt(model), book, options.flops)
        elif book.coded and book.tables is None and not book.transforms:
            continue  # nothing to measure: only --flops can tell of codes that are not fitted
        else:
            say(f"measuring {name} on this machine, {options.threads} thread(s)")
            found[name] = measured(model, book, options.tokens)
    return found


def _measured(
    options: argparse.Namespace, peers: list[str], model: Any, name: str, book: Any
) -> tuple[float, float, dict[str, Any]]:
    """Joins the workers: Mbit/s and round trip of the slowest link, every rank's rates by codes."""
    from ..deploy.jobs import Ranks
    from ..transport import open_mesh

    with open_mesh(connect_options(options, 0, len(peers), peers)) as mesh:
        say(f"measuring {len(peers)} devices and the links between them")
        ranks = Ranks(model, book, mesh)
        found = ranks.lead(do="probe", tokens=options.tokens, codebook=book.digest)
        ranks.lead(do="stop")
        ranks.close()
    for peer in range(1, len(peers)):
        say(
            f"rank {peer}: round trip {found.rtt_ms[peer]:.2f} ms, "
            f"{found.up_mbit[peer]:.1f} Mbit/s to it, {found.down_mbit[peer]:.1f} back"
        )
    link = found.link()
    rates = {name if told == "codes" else told: of for told, of in found.rates.items()}
    mbit = link.mbit_per_s if options.mbit is None else options.mbit
    rtt_ms = 2 * link.delay_ms if options.rtt_ms is None else options.rtt_ms
    return mbit, rtt_ms, rates


def nominal(adapter: Any) -> dict[str, Any]:
    """Codes as wide as fitted ones, without tables: what can be predicted before any fit."""
    from ..codes.codebook import Codebook, geometry

    sizes = geometry(adapter)
    heads = sizes["num_key_value_heads"]
    return {
        "kv, one code": Codebook("kv", 1, 1024, True, geometry=sizes),
        "kv, one code a head": Codebook("kv", heads, 1024, geometry=sizes),
        "hidden, one code": Codebook("hidden", 1, 1024, geometry=sizes),
        "hidden, 16 codes": Codebook("hidden", 16, 1024, geometry=sizes),
    }


def row(
    adapter: Any, book: Any, rates: list[Any], rate_and_trip: tuple[float, float], tokens: int
) -> dict[str, Any]:
    """What to expect of a codebook on devices of these rates."""
    from ..costs import engine_plan
    from ..deploy.predict import first_token, single
    from ..transport import Link

    mbit, rtt_ms = rate_and_trip
    world = len(rates)
    plan = engine_plan(adapter, book, tokens, world)
    seconds = [single(adapter, of_rank, tokens) for of_rank in rates]
    if max(seconds) > min(seconds):  # shares by pace, on top of the balance of equal ones
        sizes = [plan.size(n) / seconds[n] for n in range(world)]
        plan = engine_plan(adapter, book, tokens, world, shard_weights=sizes)
    found = first_token(adapter, book, plan, rates, Link(mbit or None, rtt_ms / 2))
    held_back = book.notes.get("held_back") or {}
    return {
        "world_size": world,
        "seconds": found.seconds,
        "waiting_share": max(
            waiting / (waiting + busy) if waiting else 0.0
            for waiting, busy in zip(found.waiting, found.busy, strict=True)
        ),
        "shards": [plan.size(n) for n in range(world)],
        "halo": plan.halo,
        "bits_per_token_block": _bits(adapter, book),
        "gap_recovered": held_back.get("gap_recovered"),
    }


def _bits(adapter: Any, book: Any) -> float:
    from ..deploy.predict import bits_of

    blocks = len(adapter.blocks)
    return sum(bits_of(adapter, book, block) for block in range(blocks)) / blocks


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
    print(
        f"{'':24}{'devices':>8}{'seconds':>10}{'speedup':>9}{'waiting':>9}"
        f"{'bits/token/block':>18}{'gap kept':>10}"
    )
    for row in result["rows"]:
        kept = "" if row["gap_recovered"] is None else f"{row['gap_recovered']:.2f}"
        print(
            f"{row['codes'][:24]:24}{row['world_size']:8}{row['seconds']:10.3f}"
            f"{row['speedup']:8.2f}×{row['waiting_share']:9.0%}"
            f"{row['bits_per_token_block']:18.0f}{kept:>10}"
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
