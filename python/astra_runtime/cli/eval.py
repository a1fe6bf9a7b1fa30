"""`astra eval`: what the codes cost in accuracy."""

from __future__ import annotations

import argparse
import math
from typing import Any

from ..console import say, show_json
from .common import load
from .fitting import ensure_codebook, progress_bar
from .options import add_fit_options, add_halo, add_model, positive, two_or_more


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "example:\n"
        "  astra eval --model smollm2 --codebook DIR --text FILE --world-size 4 --windows 8 --json"
    )
    add_model(parser)
    add_fit_options(parser)
    add_halo(parser)
    parser.add_argument("--text", metavar="FILE", help="evaluation text (default: built-in)")
    parser.add_argument("--world-size", type=two_or_more, default=4, help="simulated ranks (4)")
    parser.add_argument("--tokens", type=positive, default=1024, help="tokens a window (1024)")
    parser.add_argument("--windows", type=positive, default=4, help="windows over the text (4)")


def run(options: argparse.Namespace) -> int:
    from ..codes.codebook import geometry
    from ..evaluate import measure
    from ..models import adapt
    from ..store import builtin_text, read_text, token_windows
    from ..train.calibration import as_windows

    model, tokenizer = load(options.model)
    text = builtin_text()[1] if options.text is None else read_text(options.text)
    windows = token_windows(tokenizer, text, options.tokens, options.windows)
    codebook, _ = ensure_codebook(options, model, tokenizer)
    with progress_bar() as progress:

        def step(done: int, steps: int) -> None:
            progress("evaluating", done, steps)

        found = measure(
            model,
            codebook,
            as_windows(windows),
            world_size=options.world_size,
            halo=options.halo,
            progress=step,
        )
    sizes = geometry(adapt(model))
    dense = 2 * sizes["num_key_value_heads"] * sizes["head_dim"] * 32
    if codebook.space in ("hidden", "differential"):
        dense = sizes["hidden_size"] * 32
    result: dict[str, Any] = {
        found.metric: {
            "exact": found.exact,
            "astra": found.astra,
            "local_only": found.local_only,
        },
        "gap_recovered": found.gap_recovered,
        "bits_per_token_block": found.bits_per_token_block,
        "compression": dense / (found.bits_per_token_block or math.nan),
        "world_size": options.world_size,
        "windows": len(windows),
        "tokens": options.tokens,
    }
    if found.local_overlap is not None:  # remote tokens dropped but for those computed everywhere
        result[found.metric]["local_overlap"] = found.local_overlap
    if options.json:
        show_json(result)
        return 0
    print(f"{'':14}{found.metric:>12}")
    for name, value in result[found.metric].items():
        print(f"{name:14}{value:12.4f}")
    print(
        f"kept of the gap: {found.gap_recovered:.2f}   "
        f"bits a token and block: {found.bits_per_token_block:.1f}   "
        f"compression of the fp32 tensors: {result['compression']:.0f}×"
    )
    if found.astra >= found.local_only:
        say("these codes are worse than dropping the remote tokens")
    return 0
