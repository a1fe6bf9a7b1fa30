"""What codes cost in accuracy: perplexity of SmolLM2 beside its controls, domain by domain.

    python -m bench.accuracy [--codes transform:100 kv:3 …] [--domains documentation handbook …]

Transform codes are those of `bench.accuracy.calibrate`, fitted on documentation, manual pages,
quotations and source code; the other spaces' codebooks are fitted here on as many windows of the
same text. They are evaluated on other topics of that documentation and on a domain that they never
saw. N ranks with equal shards are simulated in one pass (`astra_runtime.train.simulate`, which
equals the engine). Adds to accuracy_lm.json after each row, so that an interrupted run keeps what
it has; rows that are there already are not measured again.
"""

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from astra_runtime import Codebook
from astra_runtime.console import say
from astra_runtime.costs import engine_plan, flops_over_ideal
from astra_runtime.models import adapt
from astra_runtime.parallel import map_cores
from astra_runtime.plan import Plan
from astra_runtime.store import load_model, load_tokenizer, token_windows
from astra_runtime.train.simulate import Simulation
from bench.accuracy import calibrate
from bench.accuracy.corpora import corpus
from bench.report import command_line, load, quiet_transformers, write

TOKENS = 1024
RESULT = "accuracy_lm"
CONTROLS = {"exact": Codebook.none(), "local_only": Codebook.drop()}


def losses(
    model, book: Codebook, windows: Sequence[Tensor], place: Mapping[str, Any], quantizers=None
) -> list[float]:
    """Nats a token after the first shard (of exact equal shards), by window.

    `quantizers`: as for `Simulation`, in place of the codebook's own.
    """
    adapter, world_size = adapt(model), place["world_size"]
    plan = Plan.make(
        TOKENS - book.prefix, world_size, causal=True, copies=book.prefix, halo=place["halo"]
    )

    @torch.inference_mode()
    def one(numbered: tuple[int, Tensor]) -> float:
        number, ids = numbered
        lost = {}
        if place["lost"]:
            generator = torch.Generator().manual_seed(1000 * place["seed"] + number)
            lost = {"lost": place["lost"], "generator": generator}
        inputs = {"input_ids": ids[None]}
        logits = Simulation(model, book, plan, inputs, quantizers, **lost).run().logits[0]
        first = TOKENS // world_size
        return float(F.cross_entropy(logits[first:-1], ids[first + 1 :]))

    with adapter.installed():
        return list(map_cores(one, list(enumerate(windows))))


def codebook_of(name: str, seed: int, model, tokenizer) -> Codebook:
    """ "SPACE:GROUPS", "transform:BITS" or "none:DTYPE"."""
    space, _, choice = name.partition(":")
    if space == "none":
        return Codebook.none(choice)
    if space == "transform":
        return Codebook.from_pretrained(calibrate.folder(float(choice), seed))
    drawn = calibrate.windows(tokenizer, calibrate.TEXT, seed)
    return Codebook.fit(model, drawn, space=space, groups=int(choice), held_back=0, seed=seed)


class Report:
    """The rows of earlier runs, and of this one."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.rows = (load(f"cpu-2core/{RESULT}") or {"rows": []})["rows"]

    def find(self, **wanted) -> dict | None:
        return next((r for r in self.rows if wanted.items() <= r.items()), None)

    def add(self, row: dict) -> None:
        say(json.dumps({k: v for k, v in row.items() if k != "losses"}))
        self.rows.append(row)
        write(
            RESULT,
            [],
            command=self.command,
            packages=("torch", "numpy", "transformers"),
            extra={"rows": self.rows, "threads": torch.get_num_threads()},
        )


def bits_of(book: Codebook, model) -> float:
    if book.coded:
        return book.bits
    adapter = adapt(model)
    each = {"float32": 32, "float16": 16, "int8": 8 + 16 / adapter.head_dim}[book.dtype]
    dense = 2 * adapter.num_key_value_heads * adapter.head_dim * each
    return 0.0 if book.space == "drop" else dense


def row_of(model, book: Codebook, found: list[float], base: dict[str, list[float]]) -> dict:
    """Perplexities and the share of the gap kept, over all windows and between them."""
    mean = {name: statistics.fmean(values) for name, values in base.items()}
    loss = statistics.fmean(found)
    each = [
        (out - got) / (out - best)
        for got, best, out in zip(found, base["exact"], base["local_only"], strict=True)
    ]
    return {
        "perplexity": math.exp(loss),
        "exact": math.exp(mean["exact"]),
        "local_only": math.exp(mean["local_only"]),
        "gap_recovered": (mean["local_only"] - loss) / (mean["local_only"] - mean["exact"]),
        "gap_spread": statistics.stdev(each) if len(each) > 1 else None,
        "bits_per_token_block": bits_of(book, model),
        "losses": [round(x, 5) for x in found],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.accuracy", description=__doc__.splitlines()[0])
    codes = [f"transform:{bits}" for bits in (10, 30, 100, 300, 600, 1500)]
    parser.add_argument("--codes", nargs="+", default=codes, help="SPACE:GROUPS, transform:BITS")
    parser.add_argument("--halos", nargs="+", type=int, default=[32], help="tokens; controls: 0")
    parser.add_argument("--lost", type=float, default=0.0, help="share of frames lost")
    parser.add_argument("--seed", type=int, default=0, help="of the fit")
    parser.add_argument("--windows", type=int, default=16, help="of 1024 tokens, a domain")
    domains = ["documentation", "handbook"]
    parser.add_argument("--domains", nargs="+", default=domains)
    parser.add_argument("--ranks", nargs="+", type=int, default=[4], help="world sizes")
    options = parser.parse_args(arguments)
    quiet_transformers()
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    report = Report(command_line("bench.accuracy", arguments))

    windows = {
        domain: token_windows(tokenizer, corpus(domain)[1], TOKENS, options.windows)
        for domain in options.domains
    }

    def measured(
        name: str,
        book: Codebook,
        domain: str,
        ranks: int,
        seed: int = 0,
        halo: int = 0,
        lost: float = 0.0,
    ) -> list[float]:
        place = {
            "codes": name,
            "domain": domain,
            "world_size": ranks,
            "seed": seed,
            "halo": halo,
            "lost": lost,
            "windows": len(windows[domain]),
        }
        known = report.find(**place)
        if known is not None:
            return known["losses"]
        base = {}
        if name not in CONTROLS:
            base = {n: measured(n, b, domain, ranks) for n, b in CONTROLS.items()}
        found = losses(model, book, windows[domain], place)
        row = {**place, "perplexity": math.exp(statistics.fmean(found))}
        row["losses"] = [round(x, 5) for x in found]
        if base:
            row |= row_of(model, book, found, base)
            row["calibration_vectors"] = book.notes.get("calibration_vectors")
            row["text"] = book.notes.get("text")
            plan = engine_plan(adapt(model), book, TOKENS, ranks, halo=halo)
            row["flops_over_ideal"] = flops_over_ideal(adapt(model), book, TOKENS, ranks, plan)
        report.add(row)
        return found

    for name in options.codes:
        book = CONTROLS.get(name) or codebook_of(name, options.seed, model, tokenizer)
        for domain, ranks, halo in product(options.domains, options.ranks, options.halos):
            measured(name, book, domain, ranks, options.seed, halo, options.lost)
            if book.prefix or halo:  # what the ranks compute themselves, without any codes
                alone = replace(Codebook.drop(), prefix=book.prefix)
                measured(f"local_prefix_{book.prefix}", alone, domain, ranks, halo=halo)


if __name__ == "__main__":
    main()
