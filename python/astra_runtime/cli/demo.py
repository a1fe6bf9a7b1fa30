"""`astra demo`: one device, dense exchange and ASTRA side by side, over a slow link."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

from ..console import say, show_json, working
from ..contention import Watch
from .cluster import cluster, traced, write_trace
from .common import load, window_tokens
from .fitting import codebook_at_hand, ensure_codebook
from .options import (
    add_fit_options,
    add_mesh_options,
    add_model,
    add_tokens,
    add_trace,
    check_own_keys,
    check_trace,
    engine_options,
    positive,
    settle_threads,
    two_or_more,
)
from .prompt import check_prompt
from .rounds import Sample, disturbance, in_turns, ratios, sample_of

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
    add_tokens(parser, "of the prompt", two_or_more)
    parser.add_argument("--mbit", type=float, default=10.0, help="link rate (10); 0: not limited")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one-way delay of the link")
    parser.add_argument(
        "--repeats",
        type=positive,
        default=3,
        help="rounds at least; up to three times as many, until the speedup is known to 2 %%",
    )
    add_trace(parser)


def run(options: argparse.Namespace) -> int:
    from ..transport import Link

    begun = time.perf_counter()
    world_size = options.world_size
    link = Link(options.mbit or None, options.delay_ms)
    settings = engine_options(options, world_size)
    check_trace(options)
    if options.keys:
        check_own_keys(options, range(world_size), world_size)
    settle_threads(options, world_size)
    say(
        f"ASTRA demo: {options.model} reads a prompt on {world_size} processes, "
        f"{options.threads} thread each. With the model and codebook cached this takes about a "
        "minute and a half; the first run fits the codebook, about as long again."
    )
    with cluster(options, world_size, settings, link) as others:
        if codebook_at_hand(options):
            others.start(options.codebook)
        import torch  # which takes seconds, while the other ranks load too

        from ..texts import builtin_text, read_text, token_windows

        text = builtin_text()[1] if options.text is None else read_text(options.text)
        model, tokenizer = load(options, decoder=True)
        ids = token_windows(tokenizer, text, window_tokens(options, model), 1)[0][None]
        say(f"the prompt has {ids.shape[1]} tokens")
        check_prompt(ids.shape[1], world_size)
        codebook, folder = ensure_codebook(options, model, tokenizer)
        torch.set_num_threads(options.threads)
        new_tokens = min(CONTINUED, model.config.max_position_embeddings - ids.shape[1] + 1)
        with others.ranks(model, codebook, folder) as ranks:
            with working("measuring"):
                result = traced(options, ranks, lambda: _measure(options, model, ranks, ids))
                try:
                    result |= _continuation(ranks, tokenizer, ids, new_tokens)
                finally:  # what was measured is shown, whatever ends the rest
                    result["seconds"] = time.perf_counter() - begun
                    (show_json if options.json else show)(result)
            write_trace(options, ranks)
    return 0


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        samples: of each run.
        baseline: the single device's of the same rounds.
    """

    name: str
    samples: list[Sample]
    baseline: list[Sample]
    bits_per_token_block: float
    perplexity: float

    def row(self) -> dict[str, Any]:
        """As JSON shows it."""
        speedups = ratios(self.baseline, self.samples)
        return {
            "method": self.name,
            "seconds_to_first_token": statistics.median(s.seconds for s in self.samples),
            "speedup": statistics.median(speedups),
            "speedup_range": [min(speedups), max(speedups)],
            "processor_speedup": statistics.median(s.processor for s in self.baseline)
            / statistics.median(s.processor for s in self.samples),
            "bits_per_token_block": self.bits_per_token_block,
            "perplexity": self.perplexity,
            "seconds": [s.seconds for s in self.samples],
            "processor_seconds": [s.processor for s in self.samples],
        }


def _measure(options: argparse.Namespace, model: Any, ranks: Any, ids: Any) -> dict[str, Any]:
    """Times and perplexities of the three methods, and of the local-only control."""
    prompt, workers = ids.tolist(), 0.0

    def job(space: str) -> Any:
        return ranks.submit(do="prefill", input_ids=prompt, space=space, repeats=1)

    def codes() -> Sample:
        nonlocal workers
        found = job("codes")
        workers += sum(found["processor_seconds"][0][1:])
        return sample_of(found)

    say("one device and ASTRA, in turns")
    astra, logits = job("codes"), _logits(model, ids)  # which warm everything up
    watch, workers = Watch(), 0.0
    rounds = in_turns(
        {"single": lambda: _alone(model, ids), "astra": codes}, options.repeats, ("single", "astra")
    )
    contention = watch.contention(workers)
    single = rounds["single"]
    say("dense sequence parallel: keys and values in fp32 on the same link, once (be patient)")
    dense = job("none")
    say("perplexity of the prompt after the first shard, link not limited")
    first = astra["sizes"][0] if ranks.mesh.world_size > 1 else 0
    perplexity = {"single": _perplexity(logits, ids, first)}
    for space in ("codes", "none", "drop"):
        total, count = ranks.submit(do="loss", input_ids=prompt, space=space)
        perplexity[space] = math.exp(total / count)
    typical = [Sample(*map(statistics.median, zip(*single, strict=True)))]
    bits = {"codes": astra["bits_per_token_block"], "none": dense["bits_per_token_block"]}
    methods = (
        Method("single", single, single, 0.0, perplexity["single"]),
        Method("dense", [sample_of(dense)], typical, bits["none"], perplexity["none"]),
        Method("astra", rounds["astra"], single, bits["codes"], perplexity["codes"]),
    )
    return {
        **_setting(options, ranks, tokens=ids.shape[1], shards=astra["sizes"]),
        "runs": [method.row() for method in methods],
        "contention": disturbance(contention, single, options.threads),
        "local_only_perplexity": perplexity["drop"],
    }


def _continuation(ranks: Any, tokenizer: Any, ids: Any, new_tokens: int) -> dict[str, Any]:
    """The text that the ranks add to the prompt, and their pace."""
    answer = ranks.submit(
        do="generate", input_ids=ids.tolist(), space="codes", max_new_tokens=new_tokens
    )
    times = answer["times"]
    return {
        "continuation": tokenizer.decode(answer["ids"][0], skip_special_tokens=True),
        "devices": answer["devices"],
        "seconds_per_token": (times[-1] - times[0]) / max(1, len(times) - 1),
    }


def _logits(model: Any, ids: Any) -> Any:
    """All logits of the single device."""
    import torch

    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def _alone(model: Any, ids: Any) -> Sample:
    """The single device, to the last token's logits."""
    import torch

    with torch.inference_mode():
        start, used = time.perf_counter(), time.process_time()
        model(input_ids=ids, logits_to_keep=1, use_cache=False)
        return Sample(time.perf_counter() - start, time.process_time() - used)


def _perplexity(logits: Any, ids: Any, first: int) -> float:
    """Of the tokens after position `first`; logits [1, T, V], ids [1, T]."""
    import torch.nn.functional as F

    return math.exp(float(F.cross_entropy(logits[0, first:-1].float(), ids[0, first + 1 :])))


def _setting(
    options: argparse.Namespace, ranks: Any, *, tokens: int, shards: list[int]
) -> dict[str, Any]:
    """What was measured with what."""
    codebook = ranks.codebook
    return {
        "model": options.model,
        "world_size": ranks.mesh.world_size,
        "tokens": tokens,
        "shards": shards,
        "threads": options.threads,
        "dtype": options.dtype,
        "codebook": {name: getattr(codebook, name) for name in ("space", "groups", "codewords")},
        "link": {
            "mbit_per_s": options.mbit or None,
            "delay_ms": options.delay_ms,
            "emulator": "in-process pacing of each sender, no burst credit",
        },
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
    print(
        f"{'':32}{'first token':>12}{'speedup':>9}{'range':>12}{'processor':>11}"
        f"{'bits/token/block':>18}{'perplexity':>12}"
    )
    for row in result["runs"]:
        low, high = row["speedup_range"]
        runs = "timed once" if len(row["seconds"]) == 1 else f"{low:.2f}–{high:.2f}"
        print(
            f"{names[row['method']]:32}{row['seconds_to_first_token']:10.2f} s"
            f"{row['speedup']:8.2f}×{runs:>12}{row['processor_speedup']:10.2f}×"
            f"{row['bits_per_token_block']:18.1f}{row['perplexity']:12.2f}"
        )
    print(f"{'local only (remote dropped)':32}{'':62}{result['local_only_perplexity']:12.2f}")
    rounds = len(result["runs"][0]["seconds"])
    print(
        f"medians of {rounds} round{'s' if rounds > 1 else ''}, one device and ASTRA in turns; "
        "processor: the ratio of processor time, one device's to the busiest rank's"
    )
    if result["contention"]["disturbed"]:
        print(f"DISTURBED: {result['contention']['why']}; the processor column is steadier")
    if "continuation" in result:
        print(f"\ncontinued at {result['seconds_per_token']:.3f} s a token:")
        print(result["continuation"])
    say(f"\nthe demo took {result['seconds']:.0f} s")
