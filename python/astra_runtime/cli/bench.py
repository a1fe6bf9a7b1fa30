"""`astra bench`: the benchmarks of a checkout, by name."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from ..errors import AstraError

ROOT = Path(__file__).resolve().parents[3]
BENCHES = {
    "latency": "time to first token of ASTRA and its baselines, on a virtual clock",
    "latency.real": "the same with real processes behind a user-space switch (root)",
    "service": "concurrent chats on several processes beside one",
    "service.faults": "a service whose workers are killed and stopped",
    "demo": "the demo at several links",
    "exchange": "one block's exchange beside gloo and ZeroMQ",
    "pack": "bit packing beside numpy and faiss",
    "ops": "the ops on the CPU",
    "gpu": "everything that a GPU is needed for",
    "accuracy": "perplexity of SmolLM2 against bits",
    "vision": "accuracy of a ViT against bits",
    "gpt2": "perplexity of a small GPT-2 against bits and settings",
    "encoder": "embeddings of MiniLM against bits",
    "link": "whether the emulated links agree",
}


def configure(parser: argparse.ArgumentParser) -> None:
    width = max(map(len, BENCHES)) + 2
    listed = "\n".join(f"  {name:{width}}{about}" for name, about in BENCHES.items())
    parser.epilog = (
        f"benchmarks, each with a --help of its own:\n{listed}\n\n"
        "example:\n  astra bench latency --models vit-base --ranks 2 4 --mbit 10 --rtt-ms 2"
    )
    parser.add_argument("bench", choices=list(BENCHES), metavar="BENCH", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the benchmark's own")
    parser.add_argument(
        "--json", action="store_true", help="no effect: results are JSON files in bench/results"
    )


def run(options: argparse.Namespace) -> int:
    if not (ROOT / "bench" / "report").is_dir():
        raise AstraError(
            "bench: expected a checkout of the repository, from which this package is installed "
            f"with `pip install --editable`; there is no bench/ in {ROOT}"
        )
    sys.path.insert(0, str(ROOT))
    before = sys.argv
    sys.argv = [f"bench.{options.bench}", *options.arguments]
    try:
        runpy.run_module(f"bench.{options.bench}", run_name="__main__", alter_sys=False)
    except SystemExit as ended:  # of its own --help, or of arguments that it refuses
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = before
        sys.path.remove(str(ROOT))
    return 0
