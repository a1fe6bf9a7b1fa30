"""`astra plan`: how quick a model will be on N devices, and what to choose, before deploying it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ..errors import AstraError
from .common import load, positive, say, show_json

WORLDS = (2, 3, 4, 8)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  astra plan --model smollm2 --tokens 1024 --mbit 10 --rtt-ms 2 --codebook DIR\n"
        "      (measures this machine; every device is taken to be like it)\n"
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
    parser.add_argument("--mbit", type=float, default=10.0, help="rate of each device's link (10)")
    parser.add_argument("--rtt-ms", type=float, default=1.0, help="round trip of two devices (1)")
    parser.add_argument(
        "--world-size", type=positive, nargs="+", default=WORLDS, help="devices (2 3 4 8)"
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


def run(options: argparse.Namespace) -> int:
    import torch

    from ..codebook import Codebook
    from ..models import adapt
    from ..models.shapes import SHAPES, shaped
    from ..predict import measured, of_flops, single
    from ..transport import Link

    if options.model in SHAPES and options.flops is None:
        raise AstraError(f"--flops: expected with the shape {options.model}, which has no weights")
    speeds = _speeds(options)
    torch.set_num_threads(options.threads)
    model = shaped(options.model) if options.model in SHAPES else load(options.model)[0]
    adapter = adapt(model)
    books: dict[str, Codebook] = {
        Path(at).name: Codebook.from_pretrained(at) for at in options.codebook
    }
    books |= nominal(adapter) if not books else {}
    for book in books.values():
        if book.model:
            book.check_model(adapter)
    books |= {f"dense {dtype}": Codebook.none(dtype) for dtype in ("float32", "float16", "int8")}
    link = Link(options.mbit or None, options.rtt_ms / 2)
    rows = []
    alone = math.inf
    for name, book in books.items():
        if options.flops is not None:
            rates = of_flops(adapter, book, options.flops)
        elif book.tables is None and not book.transforms and book.coded:
            continue  # nothing to measure: only --flops can tell of codes that are not fitted
        else:
            say(f"measuring {name} on this machine, {options.threads} thread(s)")
            rates = measured(model, book, options.tokens)
        alone = min(alone, single(adapter, rates, options.tokens))
        worlds = [n for n in options.world_size if 1 < n <= options.tokens]
        rows += [
            {"codes": name, **row(adapter, book, rates, link, n, options, speeds)} for n in worlds
        ]
    for found in rows:
        found["speedup"] = alone / found["seconds"]
    best = min(rows, key=lambda found: found["seconds"], default=None)
    if best is not None and best["speedup"] <= 1:
        best = None
    result = {
        "model": options.model,
        "tokens": options.tokens,
        "mbit_per_s": options.mbit or None,
        "rtt_ms": options.rtt_ms,
        "flops": options.flops,
        "single_seconds": alone,
        "rows": sorted(rows, key=lambda found: found["seconds"]),
        "recommended": best,
    }
    if options.json:
        show_json(result)
    else:
        show(result)
    return 0


def nominal(adapter: Any) -> dict[str, Any]:
    """Codes as wide as fitted ones, without tables: what can be predicted before any fit."""
    from ..codebook import Codebook, geometry

    sizes = geometry(adapter)
    heads = sizes["num_key_value_heads"]
    return {
        "kv, one code": Codebook("kv", 1, 1024, True, geometry=sizes),
        "kv, one code a head": Codebook("kv", heads, 1024, geometry=sizes),
        "hidden, one code": Codebook("hidden", 1, 1024, geometry=sizes),
        "hidden, 16 codes": Codebook("hidden", 16, 1024, geometry=sizes),
    }


def row(
    adapter: Any,
    book: Any,
    rates: Any,
    link: Any,
    world: int,
    options: argparse.Namespace,
    speeds: list[float] | None,
) -> dict[str, Any]:
    """What to expect of a codebook on `world` devices."""
    from ..costs import engine_plan
    from ..predict import first_token

    of_ranks = [rates.slower(1 / speed) for speed in speeds or [1.0] * world]
    plan = engine_plan(adapter, book, options.tokens, world)
    if speeds is not None:  # shares in proportion to speed, on top of the balance of equal ones
        sizes = [plan.size(n) * speeds[n] for n in range(world)]
        plan = engine_plan(adapter, book, options.tokens, world, weights=sizes)
    found = first_token(adapter, book, plan, of_ranks, link)
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
    from ..predict import bits_of

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
    if list(options.world_size) != [len(speeds)]:
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
