"""`astra fit`: learn codebooks for a model."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

from ..console import say, show_json
from ..errors import AstraError
from .common import load, save_result, window_tokens
from .fitting import (
    FINE_SHARE,
    FINE_TOKENS,
    MORE_WINDOWS,
    OTHERS,
    WINDOWS,
    fit_builtin,
    fit_text,
    verdict,
)
from .options import (
    add_model,
    add_tokens,
    group,
    not_negative,
    output_folder,
    positive,
    seed,
    two_or_more,
)


def coded_key(text: str) -> str:
    """A value of --space. The codecs know theirs, and need torch, which --help does without."""
    from ..codes.registry import coded_keys

    if text not in coded_keys():
        names = ", ".join(coded_keys())
        raise argparse.ArgumentTypeError(f"expected one of {names}, got {text!r}")
    return text


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  astra fit --model smollm2 --bits 100 --output codebook/\n"
        "  astra fit --model smollm2 --target-gap 0.9 --output codebook/\n"
        "  astra fit --model path/to/gpt2 --space hidden --groups 16 --text calibration.txt "
        "--output DIR"
    )
    add_model(parser)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the codebook")
    codes = group(parser, "what is coded, in how many bits")
    codes.add_argument(
        "--space",
        type=coded_key,
        metavar="SPACE",
        help="what is coded (transform; with --groups or --shared: kv)",
    )
    size = codes.add_mutually_exclusive_group()
    size.add_argument("--bits", type=positive, help="at most so many bits a token and block")
    size.add_argument(
        "--target-gap",
        type=share,
        metavar="SHARE",
        help="the fewest bits that recover this share of the gap (transform): of what remote "
        "tokens are worth",
    )
    size.add_argument("--groups", type=positive, help="codes a token and block")
    codes.add_argument(
        "--codewords",
        type=positive,
        help="of a group (K) (1024; space transform: 256, above 200 bits 64)",
    )
    codes.add_argument(
        "--fine-bits",
        type=not_negative,
        metavar="BITS",
        help="at most so many bits more for the last tokens before a cut, sent to the next rank "
        f"alone; 0: none, and a halo instead (transform of a decoder: {FINE_SHARE} times --bits)",
    )
    codes.add_argument(
        "--fine-tokens",
        type=positive,
        default=FINE_TOKENS,
        help=f"how many tokens those are, at most a quarter of a shard ({FINE_TOKENS})",
    )
    codes.add_argument("--shared", action="store_true", help="kv: one set of codes for all heads")
    calibration = group(parser, "calibration and evaluation")
    calibration.add_argument("--text", metavar="FILE", help="calibration text (default: built-in)")
    add_tokens(calibration, "tokens a window")
    calibration.add_argument(
        "--windows",
        type=positive,
        help=f"windows of the text, two of them held out (space transform: {WINDOWS} of the "
        f"built-in one, {WINDOWS + OTHERS} of another; else {MORE_WINDOWS})",
    )
    calibration.add_argument(
        "--sampled",
        type=not_negative,
        default=0,
        metavar="WINDOWS",
        help="windows of text that the model itself writes, to calibrate on as well: for a model "
        "of another language or field than the text (0; 24 take a minute or two)",
    )
    calibration.add_argument(
        "--world-size", type=two_or_more, default=4, help="ranks to evaluate (default: 4)"
    )
    calibration.add_argument(
        "--iterations", type=positive, default=8, help="k-means iterations (default: 8)"
    )
    calibration.add_argument(
        "--seed", type=seed, default=0, help="of windows and codewords (default: 0)"
    )


def share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, got {text}")
    return value


def groups_within(bits: int, space: str, shared: bool, model: Any, codewords: int) -> int:
    """The most groups that the model can be cut into and that fit `bits`."""
    from ..codes.base import geometry
    from ..codes.registry import codec_named
    from ..models import adapt

    codec, sizes = codec_named(space), geometry(adapt(model))
    width = max(1, (codewords - 1).bit_length())
    for groups in range(bits // width, 0, -1):
        together = codec.can_share_heads and (shared or codec.shares_heads(groups, sizes))
        try:
            codec.check_groups(groups, together, sizes)
        except ValueError:
            continue
        return groups
    raise AstraError(
        f"--bits: expected at least {width}, one code of {codewords} codewords, got {bits}"
    )


def size_of(options: argparse.Namespace) -> dict[str, Any]:
    """The space and the size of the codes as options of a fit; refuses contradictions.

    Groups are None where they are to be chosen by --bits once the model is known.
    """
    from ..codes.registry import codec_named, default_space

    space = options.space or default_space(bool(options.groups or options.shared))
    size: dict[str, Any] = {"space": space, "codewords": options.codewords}
    if codec_named(space).allots_bits:
        if options.groups or options.shared:
            raise AstraError(
                f"--space {space} chooses groups itself: expected --bits or --target-gap"
            )
        fine = {"fine_bits": options.fine_bits, "fine_tokens": options.fine_tokens}
        return size | {"bits": options.bits, "target_gap": options.target_gap} | fine
    if options.fine_bits:
        raise AstraError(f"--fine-bits: expected with --space transform, got {space}")
    if options.target_gap:
        raise AstraError(f"--target-gap: expected with --space transform, got {space}")
    return size | {"groups": options.groups, "shared": True if options.shared else None}


def run(options: argparse.Namespace) -> int:
    from ..texts import read_text

    size = size_of(options)
    text = None if options.text is None else read_text(options.text)
    folder = output_folder(options)
    model, tokenizer = load(options)
    if "groups" in size and size["groups"] is None:
        codewords = options.codewords or 1024
        size["groups"] = groups_within(
            options.bits or 30, size["space"], options.shared, model, codewords
        )
        say(f"{size['groups']} codes a token and block, of {codewords} codewords each")
    start = time.perf_counter()
    fitting = (
        partial(fit_builtin, model, tokenizer)
        if text is None
        else partial(fit_text, model, tokenizer, text)
    )
    codebook = fitting(
        tokens=window_tokens(options, model, shorten=True),
        windows=options.windows,
        sampled=options.sampled,
        **size,
        iterations=options.iterations,
        seed=options.seed,
        world_size=options.world_size,
    )
    save_result(codebook.save_pretrained, folder)
    _report(options, folder, codebook, time.perf_counter() - start)
    return 0


def _report(options: argparse.Namespace, folder: Path, codebook: Any, seconds: float) -> None:
    bits = f"{codebook.bits:.5g} bits a token and block"
    if codebook.fine:
        bits += f", {codebook.fine_bits:.5g} more for up to {codebook.fine_tokens} before a cut"
    for tried in codebook.notes.get("tried", []):
        say(
            f"tried {tried['bits']:.4g} bits: {100 * tried['gap_recovered']:.0f} % of the gap "
            "recovered"
        )
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
                "fine_bits": codebook.fine_bits,
                "fine_tokens": codebook.fine_tokens,
                "seconds": seconds,
                "held_back": held_back,
                "tried": codebook.notes.get("tried"),
                "verdict": verdict(held_back),
            }
        )
