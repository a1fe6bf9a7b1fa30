"""`astra demo`: one device, dense exchange and ASTRA side by side, over a slow link."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from typing import Any

from ..console import say, show_json
from .cluster import cluster, traced
from .common import load
from .fitting import ensure_codebook
from .options import (
    add_fit_options,
    add_mesh_options,
    add_model,
    add_trace,
    positive,
    two_or_more,
    weights_of,
)
from .run import check_prompt

CONTINUED = 40


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  astra demo --mbit 10 --world-size 2"
    add_model(parser)
    add_fit_options(parser)
    add_mesh_options(parser)
    parser.add_argument(
        "--world-size",
        type=two_or_more,
        default=max(2, min(4, len(os.sched_getaffinity(0)))),
        help="processes (default: the cores, 2 to 4)",
    )
    parser.add_argument("--text", metavar="FILE", help="prompt (default: built-in prose)")
    parser.add_argument("--tokens", type=two_or_more, default=1024, help="of the prompt (1024)")
    parser.add_argument("--mbit", type=float, default=10.0, help="link rate (10); 0: not limited")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one-way delay of the link")
    parser.add_argument("--repeats", type=positive, default=3, help="timed runs, median reported")
    add_trace(parser)


def run(options: argparse.Namespace) -> int:
    import torch

    from ..store import builtin_text, read_text, token_windows
    from ..transport import Link

    begun = time.perf_counter()
    world_size = options.world_size
    say(
        f"ASTRA demo: {options.model} reads {options.tokens} tokens on {world_size} processes, "
        f"{options.threads} thread each. With the model and codebook cached this takes about a "
        "minute and a half; the first run fits the codebook, a few minutes more."
    )
    link = Link(options.mbit or None, options.delay_ms)
    weights_of(options, world_size)
    model, tokenizer = load(options.model, decoder=True)
    text = builtin_text()[1] if options.text is None else read_text(options.text)
    ids = token_windows(tokenizer, text, options.tokens, 1)[0][None]
    check_prompt(ids.shape[1], world_size)
    codebook, folder = ensure_codebook(options, model, tokenizer)
    torch.set_num_threads(options.threads)
    new_tokens = min(CONTINUED, model.config.max_position_embeddings - ids.shape[1] + 1)
    say(f"starting {world_size - 1} worker processes")
    with cluster(options, world_size, folder, model, codebook, link) as ranks:
        result = traced(options, ranks, lambda: _measure(options, model, ranks, ids))
        found = ranks.lead(
            do="generate",
            input_ids=ids.tolist(),
            space="codes",
            max_new_tokens=new_tokens,
        )
    result["continuation"] = tokenizer.decode(found["ids"][0], skip_special_tokens=True)
    result["seconds_per_token"] = (found["times"][-1] - found["times"][0]) / max(
        1, len(found["times"]) - 1
    )
    result["seconds"] = time.perf_counter() - begun
    if options.json:
        show_json(result)
    else:
        show(result)
    return 0


def _measure(options: argparse.Namespace, model: Any, ranks: Any, ids: Any) -> dict[str, Any]:
    """Times and perplexities of the three methods, and of the local-only control."""
    import torch

    given = ids.tolist()
    say("ASTRA: codes on the link")
    ranks.lead(do="prefill", input_ids=given, space="codes", repeats=1)  # warms every rank up
    astra = ranks.lead(do="prefill", input_ids=given, space="codes", repeats=options.repeats)
    say("single device: the model alone, in this process")
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits  # warms up, and tells the perplexity
        single = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            model(input_ids=ids, logits_to_keep=1, use_cache=False)
            single.append(time.perf_counter() - start)
    say("dense sequence parallel: keys and values in fp32 on the same link (be patient)")
    dense = ranks.lead(do="prefill", input_ids=given, space="none", repeats=1)
    say("perplexity of the prompt after the first shard, link not limited")
    first = astra["sizes"][0] if ranks.mesh.world_size > 1 else 0
    exact = torch.nn.functional.cross_entropy(logits[0, first:-1].float(), ids[0, first + 1 :])
    losses = {
        space: ranks.lead(do="loss", input_ids=given, space=space)
        for space in ("codes", "none", "drop")
    }
    perplexity = {space: math.exp(total / count) for space, (total, count) in losses.items()}
    samples = {"single": single, "dense": dense["seconds"], "astra": astra["seconds"]}
    seconds = {method: statistics.median(values) for method, values in samples.items()}
    bits = {
        "single": 0.0,
        "dense": dense["bits_per_token_block"],
        "astra": astra["bits_per_token_block"],
    }
    accuracy = {
        "single": math.exp(float(exact)),
        "dense": perplexity["none"],
        "astra": perplexity["codes"],
    }
    return {
        "model": options.model,
        "world_size": ranks.mesh.world_size,
        "tokens": ids.shape[1],
        "shards": astra["sizes"],
        "threads": options.threads,
        "codebook": {
            "space": ranks.codebook.space,
            "groups": ranks.codebook.groups,
            "codewords": ranks.codebook.codewords,
        },
        "link": {
            "mbit_per_s": options.mbit or None,
            "delay_ms": options.delay_ms,
            "emulator": "in-process pacing of each sender, no burst credit",
        },
        "runs": [
            {
                "method": method,
                "seconds_to_first_token": seconds[method],
                "speedup": seconds["single"] / seconds[method],
                "bits_per_token_block": bits[method],
                "perplexity": accuracy[method],
                "seconds": samples[method],
            }
            for method in ("single", "dense", "astra")
        ],
        "local_only_perplexity": perplexity["drop"],
    }


def show(result: dict[str, Any]) -> None:
    """The table."""
    link = result["link"]
    rate = "no limit" if link["mbit_per_s"] is None else f"{link['mbit_per_s']:g} Mbit/s"
    print(
        f"\n{result['model']}, {result['tokens']} tokens on {result['world_size']} ranks "
        f"(shards {'+'.join(map(str, result['shards']))}), link {rate}, "
        f"delay {link['delay_ms']:g} ms\nlink emulated by {link['emulator']}; "
        "all traffic really crosses loopback sockets\n"
    )
    names = {
        "single": "single device",
        "dense": "dense sequence parallel (fp32)",
        "astra": "ASTRA",
    }
    print(f"{'':32}{'first token':>12}{'speedup':>9}{'bits/token/block':>18}{'perplexity':>12}")
    for row in result["runs"]:
        print(
            f"{names[row['method']]:32}{row['seconds_to_first_token']:10.2f} s"
            f"{row['speedup']:8.2f}×{row['bits_per_token_block']:18.1f}{row['perplexity']:12.2f}"
        )
    print(f"{'local only (remote dropped)':32}{'':39}{result['local_only_perplexity']:12.2f}")
    print(f"\ncontinued at {result['seconds_per_token']:.3f} s a token:")
    print(result["continuation"])
    say(f"\nthe demo took {result['seconds']:.0f} s")
