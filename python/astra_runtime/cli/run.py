"""`astra run`: continue a prompt."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ..console import say, show_json
from ..errors import AstraError
from .cluster import cluster, traced
from .common import load
from .fitting import ensure_codebook
from .options import (
    DENSE,
    add_fit_options,
    add_mesh_options,
    add_missing,
    add_model,
    add_trace,
    check_keys,
    connect_options,
    missing_of,
    peers_of,
    positive,
    weights_of,
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        '  astra run --world-size 2 --prompt "The capital of France is" --max-new-tokens 20\n'
        "  torchrun --nproc-per-node 2 -m astra_runtime run --prompt TEXT\n"
        "  astra run --rank 0 --peers 10.0.0.1:7000,10.0.0.2:7000 --keys rank-0/ --codebook DIR "
        "--prompt TEXT\n"
        "      (the other devices run `astra worker`; `astra keys init` makes the keys)"
    )
    add_model(parser)
    add_fit_options(parser)
    add_mesh_options(parser)
    add_missing(parser)
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
    add_trace(parser)


def run(options: argparse.Namespace) -> int:
    import torch

    from ..store import read_text
    from ..transport.rendezvous import from_environment

    prompt = options.prompt if options.text is None else read_text(options.text)
    place = None
    if options.peers is None:
        place = from_environment()
    if place is not None and options.world_size is not None:
        raise AstraError("--world-size: torchrun has said how many ranks there are; leave it out")
    if place is not None and options.trace:
        raise AstraError("--trace: not under torchrun, where no rank leads the others")
    if options.rank is not None and options.peers is None:
        raise AstraError("--rank: expected together with --peers")
    if options.backend != "tcp" and options.transport != "tcp":
        raise AstraError(f"--backend {options.backend}: expected without --transport datagram")
    if options.backend != "tcp" and place is None:
        raise AstraError(f"--backend {options.backend}: expected under torchrun only")
    peers = None if options.peers is None else peers_of(options)
    if peers is not None and options.rank != 0:
        raise AstraError("--rank: expected 0 with --peers; the other devices run `astra worker`")
    if peers is not None:
        check_keys(options, peers)
    world_size = place[1] if place else len(peers) if peers else options.world_size or 1
    weights_of(options, world_size)
    missing_of(options)
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.model, decoder=True)
    ids = tokenizer(prompt, return_tensors="pt", verbose=False).input_ids
    check_prompt(ids.shape[1], world_size)
    if options.codebook is None and (options.space != "codes" or world_size == 1):
        options.codebook = DENSE  # no codes are wanted, so none are fitted
    codebook, folder = ensure_codebook(options, model, tokenizer)
    torch.set_num_threads(options.threads)  # fitting used every core
    job = {
        "do": "generate",
        "input_ids": ids.tolist(),
        "space": options.space,
        "max_new_tokens": options.max_new_tokens,
    }
    if place is None and peers is None:
        with cluster(options, world_size, folder, model, codebook) as ranks:
            found, rank = traced(options, ranks, lambda: ranks.lead(**job)), 0
    else:
        rank, found = _joined(options, place, peers, model, codebook, job)
    if rank == 0:
        report(options, tokenizer, found, world_size)
    return 0


def check_prompt(tokens: int, world_size: int) -> None:
    """Before any process starts: every rank needs a token."""
    if tokens == 0:
        raise AstraError("prompt: expected at least one token, got an empty text")
    if tokens < world_size:
        raise AstraError(
            f"the prompt has {tokens} tokens for {world_size} ranks: expected at least one token "
            "a rank; give a longer prompt or a smaller --world-size"
        )


def _joined(
    options: argparse.Namespace,
    place: tuple[int, int] | None,
    peers: list[str] | None,
    model: Any,
    codebook: Any,
    job: dict[str, Any],
) -> tuple[int, Any]:
    """Runs the job in a mesh that others started too: this rank and its result.

    Under torchrun every rank was started alike and knows the job; else rank 0 tells the workers.
    """
    from ..deploy.jobs import Ranks
    from ..transport import open_mesh

    rank, world_size = place or (0, len(peers or ()))
    backend = options.backend if options.transport == "tcp" else options.transport
    with open_mesh(connect_options(options, rank, world_size, peers, backend=backend)) as mesh:
        weights = weights_of(options, world_size)
        ranks = Ranks(model, codebook, mesh, None, weights, options.halo, **missing_of(options))
        if peers is None:
            found = ranks.run(job)
        else:
            found = traced(options, ranks, lambda: ranks.lead(**job))
        if peers is not None:
            ranks.lead(do="stop")
        ranks.close()
    return rank, found


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
                "degraded": found["degraded"],
                "missing": {str(rank): blocks for rank, blocks in found["missing"].items()},
            }
        )
        return
    print(text)
    if found["degraded"]:
        say(f"WARNING: a degraded answer, without {without(found['missing'])}")
    pace = "" if each is None else f", then {each:.3f} s a token"
    say(
        f"{world_size} rank{'s' if world_size > 1 else ''}, "
        f"{found['bits_per_token_block']:.0f} bits a token and block: first token after "
        f"{times[0]:.2f} s{pace} ({os.path.basename(options.model)})"
    )


def without(missing: dict[int, list[int]]) -> str:
    """Whose tokens were left out where, in words."""
    parts = []
    for rank, blocks in missing.items():
        cuts = [i for i in range(len(blocks)) if i == 0 or blocks[i] != blocks[i - 1] + 1]
        runs = [blocks[a:b] for a, b in zip(cuts, [*cuts[1:], len(blocks)], strict=True)]
        told = ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs)
        parts.append(f"rank {rank} in block{'s' if len(blocks) > 1 else ''} {told}")
    return "; ".join(parts)
