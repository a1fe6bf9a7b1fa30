"""`astra eval`: what the codes cost in accuracy."""

from __future__ import annotations

import argparse
import math
from typing import Any

from ..console import say, show_json
from .common import load, window_tokens
from .fitting import ensure_codebook, progress_bar
from .options import add_fit_options, add_halo, add_model, add_tokens, positive, two_or_more


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "example:\n"
        "  astra eval --model smollm2 --codebook DIR --text FILE --world-size 4 --windows 8 --json"
    )
    add_model(parser)
    add_fit_options(parser)
    add_halo(parser)
    parser.add_argument("--text", metavar="FILE", help="evaluation text (default: built-in)")
    parser.add_argument(
        "--world-size", type=two_or_more, default=4, help="simulated ranks (default: 4)"
    )
    add_tokens(parser, "tokens a window")
    parser.add_argument(
        "--windows", type=positive, default=4, help="windows over the text (default: 4)"
    )


def run(options: argparse.Namespace) -> int:
    from ..evaluate import measure
    from ..texts import builtin_text, read_text, token_windows
    from ..train.calibration import as_windows

    text = builtin_text()[1] if options.text is None else read_text(options.text)
    model, tokenizer = load(options)
    tokens = window_tokens(options, model)
    windows = token_windows(tokenizer, text, tokens, options.windows)
    if len(windows) < options.windows:
        say(f"the text has {len(windows)} windows of {tokens} tokens, all of which are read")
    codebook, _ = ensure_codebook(options, model, tokenizer)
    with progress_bar() as progress:
        measured = measure(
            model,
            codebook,
            as_windows(windows),
            world_size=options.world_size,
            halo=options.halo,
            progress=lambda done, steps: progress("evaluating", done, steps),
        )
    result = _result(options, model, codebook, measured, windows=len(windows), tokens=tokens)
    if options.json:
        show_json(result)
    else:
        _show(result, measured)
    return 0


def _result(
    options: argparse.Namespace, model: Any, codebook: Any, measured: Any, **sizes: int
) -> dict[str, Any]:
    dense = _dense_bits(model, codebook)
    result: dict[str, Any] = {
        measured.metric: {
            "exact": measured.exact,
            "astra": measured.astra,
            "local_only": measured.local_only,
        },
        "gap_recovered": measured.gap_recovered,
        "bits_per_token_block": measured.bits_per_token_block,
        "bits_per_receiver": measured.bits_per_receiver,
        "flops_over_ideal": _flops_over_ideal(options, model, codebook, sizes["tokens"]),
        "compression": dense / (measured.bits_per_token_block or math.nan),
        "world_size": options.world_size,
        **sizes,
    }
    if measured.local_overlap is not None:
        # remote tokens dropped but for those computed everywhere
        result[measured.metric]["local_overlap"] = measured.local_overlap
    return result


def _flops_over_ideal(options: argparse.Namespace, model: Any, codebook: Any, tokens: int) -> float:
    """Of the plan an engine makes, with balanced shares; accuracy is measured on equal ones."""
    from ..costs import engine_plan, flops_over_ideal
    from ..models import adapt

    adapter, world_size = adapt(model), options.world_size
    tokens -= adapter.class_tokens
    plan = engine_plan(adapter, codebook, tokens, world_size, halo=options.halo)
    return flops_over_ideal(adapter, codebook, tokens, world_size, plan)


def _dense_bits(model: Any, codebook: Any) -> int:
    """Bits of a token and block in fp32: of what the codes stand for."""
    from ..codes.base import geometry
    from ..models import adapt

    return 32 * int(codebook.codec.coded_width(geometry(adapt(model))))


def _show(result: dict[str, Any], measured: Any) -> None:
    print(f"{'':14}{measured.metric:>12}")
    for name, value in result[measured.metric].items():
        print(f"{name:14}{value:12.4f}")
    print(
        f"gap recovered: {measured.gap_recovered:.2f}   "
        f"bits a token and block: {measured.bits_per_token_block:.1f}"
        f" ({measured.bits_per_receiver:.1f} a receiver)   "
        f"compression of the fp32 tensors: {result['compression']:.0f}×   "
        f"FLOPs over ideal: {result['flops_over_ideal']:.3f}"
    )
    if measured.astra >= measured.local_only:
        say("these codes are worse than dropping the remote tokens")
