"""`astra run`: continue a prompt."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

from ..console import working
from .cluster import cluster, traced, write_trace
from .common import load
from .fitting import codebook_at_hand, ensure_codebook
from .options import (
    CODES,
    DENSE,
    DEVICES,
    add_fit_options,
    add_mesh_options,
    add_missing,
    add_model,
    add_ranks,
    add_trace,
    check_trace,
    engine_options,
    group,
    positive,
    settle_threads,
)
from .place import Place, connected, place_of
from .prompt import check_length, check_prompt, encode_prompt, prompt_of
from .report import report, say_exactness
from .streaming import Streaming, add_sampling, sampling_of


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        '  astra run --world-size 2 --prompt "What is the capital of France?"\n'
        "  torchrun --nproc-per-node 2 -m astra_runtime run --prompt TEXT\n"
        "  astra run --rank 0 --peers 10.0.0.1:7000,10.0.0.2:7000 --keys rank-0/ --codebook DIR "
        "--prompt TEXT\n"
        "      (the other devices run `astra worker`; `astra keys init` makes the keys)"
    )
    add_model(parser)
    add_fit_options(parser)
    add_ranks(parser, "processes on this machine")
    add_mesh_options(parser)
    add_missing(parser)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--prompt", help="the text to continue; -: what standard input has")
    where.add_argument(
        "--text", metavar="FILE", help="a file with the text to continue; -: standard input"
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="take the prompt as it stands, also where the model has a chat template",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=40,
        metavar="N",
        help="of the answer (default: 40)",
    )
    group(parser, CODES).add_argument(
        "--space",
        choices=("codes", "none", "drop"),
        default="codes",
        help="what to send: the codebook's codes, dense tensors, or nothing (default: codes)",
    )
    group(parser, DEVICES).add_argument(
        "--backend",
        choices=("tcp", "gloo"),
        default="tcp",
        help="under torchrun: what carries the frames; gloo is not encrypted (default: tcp)",
    )
    add_sampling(parser)
    add_trace(parser)


def run(options: argparse.Namespace) -> int:
    prompt = prompt_of(options)
    place = place_of(options)
    settings = engine_options(options, place.world_size)
    sampling = sampling_of(options)
    check_trace(options)
    settle_threads(options, place.on_this_machine)
    with contextlib.ExitStack() as stack:
        others = None
        if place.local:
            others = stack.enter_context(cluster(options, place.world_size, settings))
            if options.space != "codes":
                others.start(DENSE)
            elif codebook_at_hand(options):
                others.start(options.codebook)
        import torch  # which takes seconds, while the other ranks load too

        from ..serve.sampling import sampling_to_json

        torch.set_num_threads(options.threads)
        model, tokenizer = load(options, decoder=True)
        ids = encode_prompt(options, tokenizer, prompt, speak=place.rank == 0)
        check_prompt(ids.shape[1], place.world_size)
        check_length(model, ids.shape[1], options.max_new_tokens)
        if options.codebook is None and (others is None or others.workers is None):
            _without_codes(options, place, ids.shape[1], settings)
        elif options.space != "codes":
            options.codebook = DENSE
        codebook, folder = ensure_codebook(options, model, tokenizer)
        torch.set_num_threads(options.threads)  # fitting used every core
        if others is not None:
            ranks = stack.enter_context(others.ranks(model, codebook, folder))
        else:
            ranks = stack.enter_context(connected(options, place, model, codebook, settings))
        job = {
            "do": "generate",
            "input_ids": ids.tolist(),
            "space": options.space,
            "max_new_tokens": options.max_new_tokens,
            "sampling": sampling_to_json(sampling) if sampling.temperature else None,
        }
        _answer(options, place, ranks, tokenizer, codebook, job)
    return 0


def _answer(
    options: argparse.Namespace,
    place: Place,
    ranks: Any,
    tokenizer: Any,
    codebook: Any,
    job: dict[str, Any],
) -> None:
    """Has the ranks continue the prompt, and shows what they give, as it comes."""
    from ..models import adapt

    streaming = None
    if place.rank == 0 and not options.json:
        streaming = Streaming(tokenizer, len(adapt(ranks.model).blocks))
        ranks.on_block, ranks.on_token = streaming.on_block, streaming.on_token
    try:
        with working("computing the answer") if place.rank == 0 else contextlib.nullcontext():
            if place.torchrun:
                answer = ranks.run(job)
            else:
                answer = traced(options, ranks, lambda: ranks.submit(**job))
    finally:
        if streaming is not None:
            streaming.end_progress()
    if streaming is not None:
        streaming.finish()
    if place.rank == 0:
        report(options, tokenizer, answer, place.world_size)
        say_exactness(options, codebook, answer)
    if not place.torchrun:
        write_trace(options, ranks)


def _without_codes(
    options: argparse.Namespace, place: Place, tokens: int, settings: dict[str, Any]
) -> None:
    """Spares a fit where no codes are wanted, or none would be sent of so short a prompt."""
    from ..costs import EXACT_TOKENS

    if options.space != "codes" or place.world_size == 1:
        options.codebook = DENSE
    elif place.local and settings["halo"] is None and tokens <= EXACT_TOKENS:
        options.codebook, settings["halo"] = DENSE, tokens
