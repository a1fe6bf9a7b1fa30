"""Where more devices stop paying, by closed forms: to 1,024 devices and a million tokens.

    python -m bench.scaling [--flops 50e9] [--mbit 10]

Closed forms (`astra_runtime.deploy.predict.closed_form`), nothing is executed: one code a token,
full mesh and rows and columns. Writes scaling.json. `bench.latency --ranks 2 4 8 16 32` executes
what can be.
"""

from __future__ import annotations

import argparse
from typing import Any

from astra_runtime import Codebook
from astra_runtime.codes.base import geometry
from astra_runtime.deploy.predict import closed_form, one_device
from astra_runtime.deploy.rates import rates_of_flops
from astra_runtime.models import adapt
from astra_runtime.models.shapes import shaped
from astra_runtime.transport import Link
from bench.report import command_line, write

MODELS = ("vit-base", "gpt2-medium", "llama-3-8b")
WORLDS = tuple(2**n for n in range(1, 11))
TOKENS = (1024, 16384, 131072, 1048576)


def rows(model_name: str, flops: float, link: Link) -> list[dict[str, Any]]:
    model = shaped(model_name)
    adapter = adapt(model)
    book = Codebook("kv", 1, 1024, True, geometry=geometry(adapter))
    rates = rates_of_flops(adapter, book, flops)
    of_model = []
    for tokens in TOKENS:
        alone = one_device(adapter, rates, tokens)
        for world in WORLDS:
            if world > tokens:
                continue
            times = {
                name: closed_form(
                    adapter, book, rates, link, tokens, world, two_level=name != "full"
                )
                for name in ("full", "two_level")
            }
            of_model.append(
                {
                    "model": model_name,
                    "tokens": tokens,
                    "world_size": world,
                    "flops": flops,
                    "mbit_per_s": link.mbit_per_s,
                    "rtt_ms": 2 * link.delay_ms,
                    "single_s": alone,
                    **{f"{name}_s": seconds for name, seconds in times.items()},
                    **{f"{name}_speedup": alone / seconds for name, seconds in times.items()},
                }
            )
    return of_model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--flops", nargs="+", type=float, default=[50e9, 5e12], help="of a device")
    parser.add_argument("--mbit", nargs="+", type=float, default=[10.0, 100.0])
    parser.add_argument("--rtt-ms", type=float, default=2.0)
    options = parser.parse_args(arguments)
    every = [
        row
        for model in options.models
        for flops in options.flops
        for mbit in options.mbit
        for row in rows(model, flops, Link(mbit, options.rtt_ms / 2))
    ]
    write(
        "scaling",
        [],
        command=command_line("bench.scaling", arguments),
        packages=("torch", "transformers"),
        extra={"rows": every, "executed": False},
    )


if __name__ == "__main__":
    main()
