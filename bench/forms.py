"""What the weights are kept in: float32, bfloat16, int8 and int4, on one device and on two.

    python -m bench.forms [--rounds 2] [--tokens 1024]

Runs `astra demo --json` once a form and round, the forms in turns, and writes latency_forms.json:
time to first token of two real processes on an emulated link, beside one device of the same form
(`single`) and of float32 (`single_float32`). `forms` has perplexity, memory and ratios of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from astra_runtime.console import say
from bench.report import Case, command_line, percentiles, write

FORMS = ("bfloat16", "int8", "int4")  # beside float32


def run(form: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "astra_runtime", "demo", "--json", "--dtype", form]
    command += ["--model", options.model, "--tokens", str(options.tokens)]
    command += ["--repeats", str(options.repeats), "--mbit", str(options.mbit)]
    command += ["--world-size", str(options.ranks), "--threads", "1"]
    command += ["--codebook", options.codebook] if options.codebook else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def samples(demos: Sequence[dict[str, Any]], method: str) -> list[float]:
    """Milliseconds to the first token of all rounds."""
    rows = [row for demo in demos for row in demo["runs"] if row["method"] == method]
    return [1e3 * second for row in rows for second in row["seconds"]]


def case(form: str, demos: Sequence[dict[str, Any]], single_float32: float) -> Case:
    first = demos[0]
    single = statistics.median(samples(demos, "single"))
    return Case(
        name=f"latency_forms_{form}",
        shape={
            "model": first["model"],
            "tokens": first["tokens"],
            "world_size": first["world_size"],
            "mbit_per_s": first["link"]["mbit_per_s"],
            "space": first["codebook"]["space"],
        },
        dtype=form,
        impl=f"astra {first['codebook']['space']}",
        ms=percentiles(samples(demos, "astra")),
        floor_ms=single / first["world_size"],
        peers={"single": single, "single_float32": single_float32},
    )


def figures(demos: Sequence[dict[str, Any]], single_float32: float) -> dict[str, Any]:
    """Of one form: seconds, what is left of one device's, perplexity of each method, memory."""
    single, astra = (statistics.median(samples(demos, name)) for name in ("single", "astra"))
    first = demos[0]
    return {
        "single_ms": single,
        "astra_ms": astra,
        "astra_over_single": astra / single,
        "astra_over_single_float32": astra / single_float32,
        "perplexity": {row["method"]: row["perplexity"] for row in first["runs"]},
        "weight_bytes": first["devices"]["weight_bytes"],
        "peak_bytes": first["devices"]["peak_bytes"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.forms", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--codebook", help="default: the cached one")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mbit", type=float, default=10.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args(arguments)
    demos: dict[str, list[dict[str, Any]]] = {form: [] for form in ("float32", *options.forms)}
    for number in range(options.rounds):
        for form in demos:
            say(f"round {number + 1} of {options.rounds}: {form}")
            demos[form].append(run(form, options))
    reference = statistics.median(samples(demos["float32"], "single"))
    path = write(
        "latency_forms",
        [case(form, found, reference) for form, found in demos.items()],
        command=command_line("bench.forms"),
        packages=("torch", "numpy", "transformers"),
        link={"emulator": demos["float32"][0]["link"]["emulator"]},
        extra={"forms": {form: figures(found, reference) for form, found in demos.items()}},
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
