"""Bits, work and accuracy side by side: SmolLM2 on 2 to 16 ranks, on texts seen and unseen.

    python -m bench.accuracy ranks [--codes transform:100+400 …] [--ranks 2 4 8 16] [--every 4]

Codes are those of `bench.accuracy.calibrate`. Texts of which that calibrates on another part are
*seen*; handbook and devref are kinds of text that no codebook ever saw. Ranks with equal shards are
simulated in one pass, as in `bench.accuracy lm`; bits and FLOPs are those of the plan that the
engine would make for 1,024 tokens, fine codes counted. The context overlap is the engine's
default, unless --halo says another. Losses of the same codes, text, ranks and windows in
accuracy_lm.json are taken from there, but of codes within a budget, whose fit has changed since.
Adds to accuracy_ranks.json after each row; rows that are there stay. `--plans` computes bits and
FLOPs of such rows again, by the plans that the engine makes now; the codebooks have to be those
that the rows were measured with.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from astra_runtime import Codebook
from astra_runtime.console import say
from astra_runtime.costs import default_halo, engine_plan, flops_over_ideal
from astra_runtime.models import adapt
from astra_runtime.parallel import map_cores
from astra_runtime.store import load_model, load_tokenizer
from bench import codebooks
from bench.accuracy import lm
from bench.accuracy.corpora import DOMAINS, held_out
from bench.accuracy.simulated import TOKENS, Losses, codebook_of, figures, losses, rounded
from bench.report import Rows, command_line, cores, quiet_transformers
from bench.report.markdown import load

RESULT = "accuracy_ranks"


def exact_losses(model: Any, windows: Sequence[Tensor]) -> list[Tensor]:
    """Nats of every token after a window's first, [T - 1], on one device."""

    @torch.inference_mode()
    def of_window(ids: Tensor) -> Tensor:
        logits = model(ids[None], use_cache=False).logits[0]
        return F.cross_entropy(logits[:-1], ids[1:], reduction="none")

    return list(map_cores(of_window, list(windows)))


class Study:
    """The model, its windows by text, and the rows measured so far."""

    def __init__(
        self, model: Any, windows: dict[str, list[Tensor]], rows: Rows, every: int = 1
    ) -> None:
        self.model, self.rows, self.every = model, rows, every
        self.drawn = {domain: len(of_domain) for domain, of_domain in windows.items()}
        self.windows = {domain: of_domain[::every] for domain, of_domain in windows.items()}
        self.exact: dict[str, list[Tensor]] = {}
        self.before = (load(f"cpu-{cores()}core/{lm.RESULT}") or {"rows": []})["rows"]

    def _losses(self, place: Mapping[str, Any], book: Codebook | None) -> Losses:
        """Of codes, or, None, of one device; those measured before where there are any."""
        measured = {**place, "windows": self.drawn[place["domain"]], "lost": 0.0}
        for row in self.before:
            if measured.items() <= row.items() and not (book and book.codec.allots_bits):
                return list(row["losses"][:: self.every])
        domain, ranks = place["domain"], place["world_size"]
        if book is not None:
            halo = place["halo"]
            return losses(self.model, book, self.windows[domain], world_size=ranks, halo=halo)
        if domain not in self.exact:
            self.exact[domain] = exact_losses(self.model, self.windows[domain])
        return [float(nats[TOKENS // ranks :].mean()) for nats in self.exact[domain]]

    def control(self, name: str, domain: str, ranks: int) -> Losses:
        place = self._place(name, domain, ranks)
        book = None if name == "exact" else codebooks.CONTROLS[name]

        def row() -> dict[str, Any]:
            of_control = self._losses(place, book)
            perplexity = math.exp(statistics.fmean(of_control))
            return {"perplexity": perplexity, "losses": rounded(of_control)}

        measured: Losses = self.rows.measured(place, row)["losses"]
        return measured

    def measure(
        self, name: str, book: Codebook, domain: str, ranks: int, seed: int, halo: int | None
    ) -> None:
        """A row of codes; `halo` None: the engine's default."""
        halo = self._halo(book, ranks, halo)
        place = self._place(name, domain, ranks, seed, halo)
        controls = {n: self.control(n, domain, ranks) for n in codebooks.CONTROLS}

        def row() -> dict[str, Any]:
            kept = figures(self.model, book, self._losses(place, book), controls)
            return kept | self._of_plan(book, ranks, halo)

        self.rows.measured(place, row)

    def plan_again(
        self, name: str, book: Codebook, domain: str, ranks: int, seed: int, halo: int | None
    ) -> None:
        """Bits and FLOPs of the row that `measure` made with this codebook, if it is there."""
        halo = self._halo(book, ranks, halo)
        row = self.rows.find(self._place(name, domain, ranks, seed, halo))
        if row is not None:
            self.rows.change(row, self._of_plan(book, ranks, halo))

    def _halo(self, book: Codebook, ranks: int, halo: int | None) -> int:
        if halo is not None:
            return halo
        return default_halo(adapt(self.model), book, TOKENS - book.prefix, ranks)

    def _of_plan(self, book: Codebook, ranks: int, halo: int) -> dict[str, float]:
        """Of the plan that the engine makes: bits of a payload, those of a receiver, and FLOPs."""
        adapter = adapt(self.model)
        plan = engine_plan(adapter, book, TOKENS, ranks, halo=halo)
        block, receiver = codebooks.payload_bits(book, adapter, plan)
        return {
            "bits_per_token_block": block,
            "bits_per_receiver": receiver,
            "flops_over_ideal": flops_over_ideal(adapter, book, TOKENS, ranks, plan),
        }

    def _place(
        self, name: str, domain: str, ranks: int, seed: int = 0, halo: int = 0
    ) -> dict[str, Any]:
        return {
            "codes": name,
            "domain": domain,
            "world_size": ranks,
            "seed": seed,
            "halo": halo,
            "windows": len(self.windows[domain]),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="bench.accuracy ranks", description=__doc__.splitlines()[0]
    )
    codes = ["transform:100+400", "transform:100", "kv:3"]
    parser.add_argument("--codes", nargs="+", default=codes, help="names, see bench/codebooks.py")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8, 16], help="world sizes")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the fits")
    parser.add_argument("--windows", type=int, default=16, help="of 1024 tokens, a domain")
    parser.add_argument("--every", type=int, default=1, help="of these, one in so many")
    parser.add_argument("--halo", type=int, help="tokens (the engine's default)")
    parser.add_argument("--plans", action="store_true", help="bits and FLOPs of rows anew, no more")
    options = parser.parse_args(arguments)
    quiet_transformers()
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    windows = held_out(tokenizer, options.domains, TOKENS, options.windows)
    rows = Rows(RESULT, command=command_line("bench.accuracy ranks", arguments), say=say)
    study = Study(model, windows, rows, options.every)
    for seed, name in product(options.seeds, options.codes):
        book = codebook_of(name, seed, model, tokenizer)
        for domain, ranks in product(options.domains, options.ranks):
            look = study.plan_again if options.plans else study.measure
            look(name, book, domain, ranks, seed, options.halo)


if __name__ == "__main__":
    main()
