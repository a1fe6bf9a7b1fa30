"""What `astra run` says behind an answer: figures, and what it lacks or rests on."""

from __future__ import annotations

import argparse
from typing import Any

from ..console import say, show_json
from .options import model_name


def report(options: argparse.Namespace, tokenizer: Any, answer: Any, world_size: int) -> None:
    """Figures on stderr, behind the text; or all as one JSON object."""
    times = answer["times"]
    each = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
    if options.json:
        show_json(
            {
                "text": tokenizer.decode(answer["ids"][0], skip_special_tokens=True),
                "world_size": world_size,
                "seconds_to_first_token": times[0],
                "seconds_per_token": each,
                "bits_per_token_block": answer["bits_per_token_block"],
                "degraded": answer["degraded"],
                "missing": {str(rank): blocks for rank, blocks in answer["missing"].items()},
                "dtype": options.dtype,
                **answer["devices"],
            }
        )
        return
    if answer["degraded"]:
        say(f"WARNING: a degraded answer, without {without(answer['missing'])}")
    pace = "" if each is None else f", then {each:.3f} s a token"
    say(
        f"{world_size} rank{'s' if world_size > 1 else ''}, "
        f"{answer['bits_per_token_block']:.0f} bits a token and block: first token after "
        f"{times[0]:.2f} s{pace} ({model_name(options)})"
    )
    devices = answer["devices"]
    say(
        f"threads by rank: {listed(devices['threads'])}; weights in {options.dtype}: "
        f"{listed(devices['weight_bytes'], 2**20)} MiB; most memory: "
        f"{listed(devices['peak_bytes'], 2**20)} MiB"
    )


def listed(by_rank: dict[str, int], unit: int = 1) -> str:
    """Figures of the ranks, one where all are alike."""
    figures = [str(round(value / unit)) for value in by_rank.values()]
    return figures[0] if len({*figures}) == 1 else ", ".join(figures)


def say_exactness(options: argparse.Namespace, codebook: Any, answer: Any) -> None:
    """Says when the answer is not what one device would give."""
    from ..codes.local_only import LocalOnly

    local_only = options.space == LocalOnly.key
    if not answer["bits_per_token_block"] and not local_only:
        return
    if local_only:
        say("the ranks computed without each other's tokens (--space drop)")
    elif options.space == "codes" and codebook.coded:
        say(
            "the answer rests on codes: ranks read each other's tokens as codewords, so it may "
            "differ from one device's (--space none: exact)"
        )


def without(missing: dict[int, list[int]]) -> str:
    """Whose tokens were left out where, in words."""
    parts = []
    for rank, blocks in missing.items():
        starts = [i for i in range(len(blocks)) if i == 0 or blocks[i] != blocks[i - 1] + 1]
        runs = [blocks[a:b] for a, b in zip(starts, [*starts[1:], len(blocks)], strict=True)]
        ranges = ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs)
        parts.append(f"rank {rank} in block{'s' if len(blocks) > 1 else ''} {ranges}")
    return "; ".join(parts)
