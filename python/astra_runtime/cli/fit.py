"""`astra fit`: learn codebooks for a model."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from ..errors import AstraError
from .common import add_model, fit_text, load, positive, say, show_json, two_or_more, verdict


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  astra fit --model smollm2 --bits 30 --output codebook/\n"
        "  astra fit --model path/to/gpt2 --space hidden --groups 16 --text calibration.txt "
        "--output DIR"
    )
    add_model(parser)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the codebook")
    spaces = ("kv", "hidden", "differential")
    parser.add_argument("--space", choices=spaces, default="kv", help="what is coded (kv)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--bits", type=positive, help="at most so many bits a token and block")
    size.add_argument("--groups", type=positive, help="codes a token and block")
    parser.add_argument("--codewords", type=positive, default=1024, help="of a group (K) (1024)")
    parser.add_argument("--shared", action="store_true", help="kv: one set of codes for all heads")
    parser.add_argument("--text", metavar="FILE", help="calibration text (default: built-in)")
    parser.add_argument("--tokens", type=positive, default=1024, help="tokens a window (1024)")
    parser.add_argument("--windows", type=positive, default=26, help="windows, two held back (26)")
    parser.add_argument("--world-size", type=two_or_more, default=4, help="ranks to evaluate (4)")
    parser.add_argument("--iterations", type=positive, default=8, help="k-means iterations (8)")
    parser.add_argument("--seed", type=int, default=0)


def groups_within(bits: int, space: str, shared: bool, model: Any, codewords: int) -> int:
    """The most groups that the model can be cut into and that fit `bits`."""
    from ..codebook import check_groups, geometry
    from ..models import adapt

    sizes = geometry(adapt(model))
    width = max(1, (codewords - 1).bit_length())
    for groups in range(bits // width, 0, -1):
        alone = shared or groups % sizes["num_key_value_heads"] != 0
        try:
            check_groups(space, groups, space == "kv" and alone, sizes)
        except ValueError:
            continue
        return groups
    raise AstraError(
        f"--bits: expected at least {width}, one code of {codewords} codewords, got {bits}"
    )


def run(options: argparse.Namespace) -> int:
    from ..store import builtin_text, read_text

    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)  # before minutes are spent
    if not os.access(folder, os.W_OK):
        raise AstraError(f"--output: {folder} cannot be written to")
    model, tokenizer = load(options.model)
    groups = options.groups
    if groups is None:
        bits = options.bits or 30
        groups = groups_within(bits, options.space, options.shared, model, options.codewords)
        say(f"{groups} codes a token and block, of {options.codewords} codewords each")
    text = builtin_text()[0] if options.text is None else read_text(options.text)
    start = time.perf_counter()
    codebook = fit_text(
        model,
        tokenizer,
        text,
        tokens=options.tokens,
        windows=options.windows,
        space=options.space,
        groups=groups,
        codewords=options.codewords,
        shared=True if options.shared else None,
        iterations=options.iterations,
        seed=options.seed,
        world_size=options.world_size,
    )
    codebook.save_pretrained(folder)
    seconds = time.perf_counter() - start
    bits = f"{codebook.bits:.5g} bits a token and block"
    say(f"written to {options.output} after {seconds:.0f} s: {bits}")
    if options.json:
        held_back = codebook.notes.get("held_back")
        show_json(
            {
                "output": str(folder),
                "digest": codebook.digest,
                "space": codebook.space,
                "groups": codebook.groups,
                "codewords": codebook.codewords,
                "shared": codebook.shared,
                "bits_per_token_block": codebook.bits,
                "seconds": seconds,
                "held_back": held_back,
                "verdict": verdict(held_back),
            }
        )
    return 0
