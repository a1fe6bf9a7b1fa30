"""What lost datagrams cost: perplexity of SmolLM2 on four simulated ranks."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from astra_runtime import Codebook
from astra_runtime.codes.base import received_mask
from astra_runtime.console import say
from astra_runtime.missing import Missing
from astra_runtime.plan import Plan
from astra_runtime.store import load_model, load_tokenizer
from astra_runtime.texts import token_windows
from astra_runtime.train.simulate import Simulation, engines_after_loss
from astra_runtime.transport.fragments import FEC_GROUP, fragment_layout, num_fec_fragments
from bench.accuracy.corpora import corpus
from bench.accuracy.simulated import (
    TOKENS,
    Losses,
    control_losses,
    equal_shards,
    figures,
    kept_codebook_of,
    window_losses,
)
from bench.report import Rows, quiet_transformers

RESULT = "lossy_perplexity"
RANKS = 4


class LossyDatagrams(Simulation):
    """A simulation, of one sequence, in which datagrams are lost, not frames: so tokens are
    missing, not shards."""

    def __init__(
        self,
        model: Any,
        book: Codebook,
        plan: Plan,
        inputs: dict[str, Tensor],
        parity: int,
        **losses: Any,
    ) -> None:
        super().__init__(model, book, plan, inputs, **losses)
        self.parity = parity
        self.channel = book.make_codec(self.adapter)
        self.trailer = Missing(plan.world_size, 0).width

    def _received(self, block: int) -> Tensor | None:
        ranks = range(self.plan.world_size)
        if not self.losing or not self.channel.payload_bytes(block, 1, 1):
            return None
        return torch.stack([torch.cat([self._whole(block, n, m) for m in ranks]) for n in ranks])

    def _whole(self, block: int, receiver: int, sender: int) -> Tensor:
        """Which of a rank's tokens another one receives whole, bool [tokens]."""
        whole = torch.ones(self.plan.size(sender), dtype=torch.bool)
        num_sent = self.plan.num_sent(sender)
        if num_sent:
            size = self.channel.payload_bytes(block, 1, num_sent)
            count, step = fragment_layout(size + self.trailer)
            missing = self.missing(block, receiver, sender, count)
            gaps = [(n * step, (n + 1) * step) for n in missing]
            layout = self.channel.token_layout(block, 1, num_sent)
            whole[:num_sent] = received_mask(layout, 1, num_sent, gaps)[0]
        return whole

    def missing(self, block: int, receiver: int, sender: int, count: int) -> list[int]:
        """Which of a frame's fragments are lost, and not recovered by FEC."""
        groups = num_fec_fragments(count, self.parity)
        lost = (torch.rand(count + groups, generator=self.generator) < self.lost).tolist()
        of_group = [sum(lost[j:count:groups]) + lost[count + j] for j in range(groups)]
        return [n for n in range(count) if lost[n] and not (groups and of_group[n % groups] == 1)]


def perplexity(options: argparse.Namespace, command: str) -> None:
    """Adds rows that are not there yet: codes, loss of datagrams, what a receiver does then, and
    perplexity beside both controls."""
    quiet_transformers()
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    windows = token_windows(tokenizer, corpus(options.domain)[1], TOKENS, options.windows)
    controls = control_losses(model, windows, RANKS)
    rows = Rows(RESULT, command=command, say=say)
    for name in options.codes:
        book = kept_codebook_of(name, model, tokenizer)
        afterwards = options.after_loss or engines_after_loss(book)
        for halo, lost, parity in product(options.halo, options.losses, (0, FEC_GROUP)):
            if parity and not lost:
                continue  # the same
            place = {
                "codes": name,
                "domain": options.domain,
                "datagrams_lost": lost,
                "parity": parity,
                "afterwards": afterwards if lost else None,
                "world_size": RANKS,
                "halo": halo,
                "windows": len(windows),
            }
            rows.measured(place, partial(measured, model, book, windows, place, controls))


def measured(
    model: Any,
    book: Codebook,
    windows: list[Tensor],
    place: Mapping[str, Any],
    controls: dict[str, Losses],
) -> dict[str, Any]:
    """`figures` of the row at `place`; the same draws for all codes."""
    plan = equal_shards(book, RANKS, place["halo"])
    losing = {"lost": place["datagrams_lost"], "after_loss": place["afterwards"]}

    def simulate(number: int, inputs: dict[str, Tensor]) -> LossyDatagrams:
        generator = torch.Generator().manual_seed(number)
        return LossyDatagrams(
            model, book, plan, inputs, place["parity"], generator=generator, **losing
        )

    return figures(model, book, window_losses(model, windows, RANKS, simulate), controls)
