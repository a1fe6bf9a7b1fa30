"""The demo as a benchmark: time to first token on real processes over an emulated link.

    python -m bench.demo

Runs `astra demo --json` at several link rates and writes latency_demo.json. The roofline is the
single device's time over the number of ranks.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from bench.report import Case, command_line, percentiles, write


def run(mbit: float, delay_ms: float, world_size: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "astra_runtime", "demo", "--json", "--repeats", "5"]
    command += ["--mbit", str(mbit), "--delay-ms", str(delay_ms), "--world-size", str(world_size)]
    result: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    )
    return result


def case(result: dict[str, Any]) -> Case:
    runs = {row["method"]: row for row in result["runs"]}
    single = 1e3 * runs["single"]["seconds_to_first_token"]
    link = result["link"]
    rate = link["mbit_per_s"]
    return Case(
        name=f"latency_demo_{result['world_size']}ranks_{rate:g}mbit_{link['delay_ms']:g}ms",
        shape={
            "model": result["model"],
            "tokens": result["tokens"],
            "world_size": result["world_size"],
            "mbit_per_s": rate,
            "rtt_ms": 2 * link["delay_ms"],
            "space": result["codebook"]["space"],
            "groups": result["codebook"]["groups"],
            "codewords": result["codebook"]["codewords"],
        },
        dtype="float32",
        impl=f"astra {result['codebook']['space']}",
        ms=percentiles([1e3 * s for s in runs["astra"]["seconds"]]),
        floor_ms=single / result["world_size"],
        peers={"single": single, "sp": 1e3 * runs["dense"]["seconds_to_first_token"]},
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--links", nargs="+", default=["10:0", "10:10", "100:0"], help="MBIT:DELAY")
    parser.add_argument("--world-size", type=int, default=2)
    options = parser.parse_args()
    results = []
    for link in options.links:
        mbit, delay_ms = map(float, link.split(":"))
        results.append(run(mbit, delay_ms, options.world_size))
    path = write(
        "latency_demo",
        [case(result) for result in results],
        command=command_line("bench.demo"),
        packages=("torch", "numpy", "transformers"),
        link={"emulator": results[0]["link"]["emulator"]},
        extra={"demos": results},
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
