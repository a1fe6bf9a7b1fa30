"""What codes cost in accuracy: perplexity of SmolLM2 beside its controls, domain by domain.

    python -m bench.accuracy [--codes transform:100 kv:3 …] [--domains documentation handbook …]

Transform codes are those of `bench.accuracy.calibrate`, fitted on documentation, manual pages,
quotations and source code; the other spaces' codebooks are fitted here on as many windows of the
same text. They are evaluated on other topics of that documentation and on a domain that they never
saw. N ranks with equal shards are simulated in one pass (`astra_runtime.train.simulate`, which
equals the engine). Adds to accuracy_lm.json after each row, so that an interrupted run keeps what
it has; rows that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from astra_runtime import Codebook
from astra_runtime.console import say
from astra_runtime.costs import engine_plan, flops_over_ideal
from astra_runtime.models import adapt
from astra_runtime.store import load_model, load_tokenizer
from bench import codebooks
from bench.accuracy.corpora import held_out
from bench.accuracy.simulated import TOKENS, Losses, codebook_of, figures, losses, rounded
from bench.report import Rows, command_line, quiet_transformers

RESULT = "accuracy_lm"


@dataclass(frozen=True)
class Place:
    """What a row is found by."""

    codes: str
    domain: str
    world_size: int
    seed: int = 0
    halo: int = 0
    lost: float = 0.0
    windows: int = 0


class Study:
    """The model, its windows by text, and the rows measured so far."""

    def __init__(self, model: Any, windows: dict[str, list[Tensor]], rows: Rows) -> None:
        self.model, self.windows, self.rows = model, windows, rows

    def losses(self, book: Codebook, place: Place) -> Losses:
        """Of the row at `place`, which is measured where it is not there yet."""
        place = replace(place, windows=len(self.windows[place.domain]))
        losses: Losses = self.rows.measured(asdict(place), lambda: self._row(book, place))["losses"]
        return losses

    def _row(self, book: Codebook, place: Place) -> dict[str, Any]:
        controls = {}
        if place.codes not in codebooks.CONTROLS:
            controls = {
                name: self.losses(control, Place(name, place.domain, place.world_size))
                for name, control in codebooks.CONTROLS.items()
            }
        ours = losses(
            self.model,
            book,
            self.windows[place.domain],
            world_size=place.world_size,
            halo=place.halo,
            lost=place.lost,
            seed=place.seed,
        )
        if not controls:
            return {"perplexity": math.exp(statistics.fmean(ours)), "losses": rounded(ours)}
        adapter = adapt(self.model)
        plan = engine_plan(adapter, book, TOKENS, place.world_size, halo=place.halo)
        return {
            **figures(self.model, book, ours, controls),
            "calibration_vectors": book.notes.get("calibration_vectors"),
            "text": book.notes.get("text"),
            "flops_over_ideal": flops_over_ideal(adapter, book, TOKENS, place.world_size, plan),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.accuracy", description=__doc__.splitlines()[0])
    codes = [f"transform:{bits}" for bits in (10, 30, 100, 300, 600, 1500)]
    parser.add_argument("--codes", nargs="+", default=codes, help="SPACE:GROUPS, transform:BITS")
    parser.add_argument("--halos", nargs="+", type=int, default=[32], help="tokens; controls: 0")
    parser.add_argument("--lost", type=float, default=0.0, help="share of frames lost")
    parser.add_argument("--seed", type=int, default=0, help="of the fit")
    parser.add_argument("--windows", type=int, default=16, help="of 1024 tokens, a domain")
    parser.add_argument("--domains", nargs="+", default=["documentation", "handbook"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4], help="world sizes")
    options = parser.parse_args(arguments)
    quiet_transformers()
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    windows = held_out(tokenizer, options.domains, TOKENS, options.windows)
    rows = Rows(
        RESULT,
        command=command_line("bench.accuracy", arguments),
        extra={"threads": torch.get_num_threads()},
        say=say,
    )
    study = Study(model, windows, rows)
    for name in options.codes:
        book = codebook_of(name, options.seed, model, tokenizer)
        for domain, ranks, halo in product(options.domains, options.ranks, options.halos):
            study.losses(book, Place(name, domain, ranks, options.seed, halo, options.lost))
            if book.prefix or halo:  # what the ranks compute themselves, without any codes
                alone = replace(Codebook.local_only(), prefix=book.prefix)
                place = Place(f"local_prefix_{book.prefix}", domain, ranks, halo=halo)
                study.losses(alone, place)


if __name__ == "__main__":
    main()
