"""What missing frames cost in accuracy: perplexity of SmolLM2 against the share that is missing.

    python -m bench.lossy degraded [--codes kv:3 transform:100] [--shares 0 .02 .05 .1 .2]

Of each block, from each rank to each other, a frame misses its deadline with the given probability,
independently. With codes that predict, the engine then attends to the shard as predicted; else it
leaves it out of that block's softmax. Ranks are simulated in one pass
(`astra_runtime.train.simulate`, which the tests hold to the engine). Codes that build on earlier
blocks have rows for what else a receiver could do: "stale" leaves the shard out of that block,
"out" of the rest of the call.
Adds to degraded.json after each row; rows that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from astra_runtime import Codebook
from astra_runtime.console import say
from astra_runtime.store import load_model, load_tokenizer
from astra_runtime.texts import token_windows
from astra_runtime.train.simulate import AfterLoss
from bench import codebooks
from bench.accuracy.corpora import corpus
from bench.accuracy.simulated import TOKENS, Losses, codebook_of, figures, losses, rounded
from bench.report import Rows, command_line, quiet_transformers

RESULT = "degraded"


class Study:
    """The model, its windows, and the rows measured so far."""

    def __init__(
        self, model: Any, windows: list[Tensor], options: argparse.Namespace, rows: Rows
    ) -> None:
        self.model, self.windows, self.options, self.rows = model, windows, options, rows

    def losses(
        self,
        name: str,
        book: Codebook,
        missing: float = 0.0,
        afterwards: AfterLoss = "stale",
        controls: dict[str, Losses] | None = None,
    ) -> Losses:
        """Of a row, which is measured where it is not there yet."""
        options = self.options
        place = {
            "codes": name,
            "missing": missing,
            "afterwards": afterwards,
            "halo": 0 if controls is None else options.halo,
            "domain": options.domain,
            "world_size": options.ranks,
            "windows": options.windows,
            "seed": options.seed,
        }

        def row() -> dict[str, Any]:
            ours = losses(
                self.model,
                book,
                self.windows,
                world_size=options.ranks,
                halo=int(place["halo"]),
                lost=missing,
                seed=options.seed,
                after_loss=afterwards,
            )
            measured = {"losses": rounded(ours), "mean_loss": statistics.fmean(ours)}
            return measured | (figures(self.model, book, ours, controls) if controls else {})

        of_row: Losses = self.rows.measured(place, row)["losses"]
        return of_row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="bench.lossy degraded", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--codes", nargs="+", default=["kv:3", "transform:100"])
    shares = [0.0, 0.02, 0.05, 0.1, 0.2]
    parser.add_argument("--shares", nargs="+", type=float, default=shares)
    parser.add_argument("--windows", type=int, default=4, help="of 1024 tokens")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--halo", type=int, default=32)
    parser.add_argument("--domain", default="documentation")
    parser.add_argument("--seed", type=int, default=0, help="of what is missing")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    quiet_transformers()
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    windows = token_windows(tokenizer, corpus(options.domain)[1], TOKENS, options.windows)
    rows = Rows(
        RESULT,
        command=command_line("bench.lossy degraded", arguments),
        extra={"threads": torch.get_num_threads()},
        say=say,
    )
    study = Study(model, windows, options, rows)
    controls = {name: study.losses(name, book) for name, book in codebooks.CONTROLS.items()}
    for name in options.codes:
        book = codebook_of(name, 0, model, tokenizer)
        for share in options.shares:
            choices = codebooks.after_loss(book)
            for afterwards in choices if share else choices[:1]:
                study.losses(name, book, share, afterwards, controls)


if __name__ == "__main__":
    main()
