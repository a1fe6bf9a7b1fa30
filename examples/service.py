"""A service of one's own: a leader with a queue on rank 0, workers on the other ranks.

    python examples/service.py 1 127.0.0.1:7000,127.0.0.1:7001 &
    python examples/service.py 0 127.0.0.1:7000,127.0.0.1:7001

Rank 0 reads questions, a line each, from standard input; any number of threads may ask at once.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import astra_runtime as astra
from astra_runtime.serve import GenerationRequest, Leader, Sampling, follow


def serve(model: Any, tokenizer: Any, codebook: Any, rank: int, peers: list[str]) -> None:
    """One rank's part; rank 0 answers until its standard input ends."""
    with astra.connect(rank, peers=peers) as mesh, astra.Engine(model, codebook, mesh) as engine:
        engine.warmup()
        if rank:
            follow(engine)  # until the leader is closed
            return
        with Leader(engine, tokenizer, max_queue=16) as leader:
            for number, line in zip(itertools.count(), sys.stdin, strict=False):
                ids = tokenizer(line.strip()).input_ids
                asked = GenerationRequest(f"{number}", ids, 32, Sampling(seed=1), within_s=60)
                for event in leader.stream(asked):  # closing the stream cancels the request
                    print(event.text, end="", flush=True)
                print()


if __name__ == "__main__":
    from astra_runtime.store import load_model, load_tokenizer

    smollm2 = load_model("smollm2"), load_tokenizer("smollm2")
    serve(*smollm2, astra.Codebook.dense(), int(sys.argv[1]), sys.argv[2].split(","))
