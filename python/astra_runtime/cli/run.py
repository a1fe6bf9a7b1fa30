"""`astra run`: continue a prompt."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import AstraError
from .common import (
    add_fit_options,
    add_mesh_options,
    add_model,
    cluster,
    ensure_codebook,
    environment_place,
    load,
    positive,
    say,
    show_json,
    weights_of,
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        '  astra run --world-size 2 --prompt "The capital of France is" --max-new-tokens 20\n'
        "  torchrun --nproc-per-node 2 -m astra_runtime run --prompt TEXT\n"
        "  astra run --rank 0 --peers 10.0.0.1:7000,10.0.0.2:7000 --prompt TEXT\n"
        "      (the other devices run `astra worker`)"
    )
    add_model(parser)
    add_fit_options(parser)
    add_mesh_options(parser)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--prompt", help="the text to continue")
    where.add_argument("--text", metavar="FILE", help="a file with the text to continue")
    parser.add_argument("--max-new-tokens", type=positive, default=40)
    parser.add_argument(
        "--space",
        choices=("codes", "none", "drop"),
        default="codes",
        help="what to send: the codebook's codes, dense tensors, or nothing (default: codes)",
    )
    parser.add_argument("--world-size", type=positive, help="processes on this machine")
    parser.add_argument("--rank", type=int, help="with --peers: 0, the rank that leads")
    parser.add_argument("--peers", help="host:port of every rank, by rank")
    parser.add_argument(
        "--backend", choices=("tcp", "gloo"), default="tcp", help="under torchrun only"
    )


def run(options: argparse.Namespace) -> int:
    import torch

    from ..store import read_text

    prompt = options.prompt if options.text is None else read_text(options.text)
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.model)
    ids = tokenizer(prompt, return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] < 1:
        raise AstraError("prompt: expected at least one token, got an empty text")
    job = {
        "do": "generate",
        "input_ids": ids.tolist(),
        "space": options.space,
        "max_new_tokens": options.max_new_tokens,
    }
    place = environment_place() if options.peers is None and options.world_size is None else None
    if place is None and options.peers is None:
        check_prompt(ids.shape[1], options.world_size or 1)
    codebook, folder = ensure_codebook(options, model, tokenizer)
    torch.set_num_threads(options.threads)  # fitting used every core
    with _ranks(options, place, folder, model, codebook) as (ranks, leads):
        found = ranks.lead(**job) if leads else ranks.run(job)
        world_size, rank = ranks.mesh.world_size, ranks.mesh.rank
    if rank == 0:
        report(options, tokenizer, found, world_size)
    return 0


def check_prompt(tokens: int, world_size: int) -> None:
    """Before any process starts: every rank needs a token."""
    if tokens < world_size:
        raise AstraError(
            f"the prompt has {tokens} tokens for {world_size} ranks: expected at least one token "
            "a rank; give a longer prompt or a smaller --world-size"
        )


@contextlib.contextmanager
def _ranks(
    options: argparse.Namespace, place: Any, folder: Path, model: Any, codebook: Any
) -> Iterator[tuple[Any, bool]]:
    """The ranks to run with, and whether this process leads them (or all were started alike)."""
    from ..jobs import Ranks
    from ..transport import connect

    if place is None and options.peers is None:
        with cluster(options, options.world_size or 1, folder, model, codebook) as ranks:
            yield ranks, True
        return
    peers = None if options.peers is None else options.peers.split(",")
    if peers is not None and options.rank != 0:
        raise AstraError("--rank: expected 0 with --peers; the other devices run `astra worker`")
    rank, world_size = place or (0, len(peers or ()))
    with connect(rank, world_size, peers, backend=options.backend, timeout=options.timeout) as mesh:
        ranks = Ranks(model, codebook, mesh, weights=weights_of(options))
        yield ranks, peers is not None
        if peers is not None:
            ranks.lead(do="stop")
        ranks.close()


def report(options: argparse.Namespace, tokenizer: Any, found: Any, world_size: int) -> None:
    """The continuation on stdout, figures on stderr; or all as one JSON object."""
    text = tokenizer.decode(found["ids"][0], skip_special_tokens=True)
    times = found["times"]
    each = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
    if options.json:
        show_json(
            {
                "text": text,
                "world_size": world_size,
                "seconds_to_first_token": times[0],
                "seconds_per_token": each,
                "bits_per_token_block": found["bits_per_token_block"],
                "degraded": False,
                "missing": [],
            }
        )
        return
    print(text)
    pace = "" if each is None else f", then {each:.3f} s a token"
    say(
        f"{world_size} rank{'s' if world_size > 1 else ''}, "
        f"{found['bits_per_token_block']:.0f} bits a token and block: first token after "
        f"{times[0]:.2f} s{pace} ({os.path.basename(options.model)})"
    )
