"""What lost datagrams cost: perplexity of SmolLM2 on four simulated ranks."""

from __future__ import annotations

import argparse
import json
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from astra_runtime import Codebook
from astra_runtime.codes.base import arrived
from astra_runtime.codes.spaces import make_space
from astra_runtime.console import say
from astra_runtime.missing import Missing
from astra_runtime.models import adapt
from astra_runtime.plan import Plan
from astra_runtime.store import load_model, load_tokenizer, token_windows
from astra_runtime.train.simulate import Simulation
from astra_runtime.transport.fragments import FEC_GROUP, fragment_layout, num_fec_fragments
from bench.accuracy import calibrate
from bench.accuracy import lm as accuracy
from bench.accuracy.corpora import corpus
from bench.report import quiet_transformers


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
        self.space = make_space(book, self.adapter)
        self.trailer = Missing(plan.world_size, 0).width

    def _came(self, block: int) -> Tensor | None:
        ranks = range(self.plan.world_size)
        if not self.losing or not self.space.payload_bytes(block, 1, 1):
            return None
        return torch.stack([torch.cat([self._whole(block, n, m) for m in ranks]) for n in ranks])

    def _whole(self, block: int, receiver: int, sender: int) -> Tensor:
        """Which of a rank's tokens another one hears of whole, bool [tokens]."""
        whole = torch.ones(self.plan.size(sender), dtype=torch.bool)
        num_sent = self.plan.num_sent(sender)
        if num_sent:
            size = self.space.payload_bytes(block, 1, num_sent)
            count, step = fragment_layout(size + self.trailer)
            missing = self.missing(block, receiver, sender, count)
            gaps = [(n * step, (n + 1) * step) for n in missing]
            strips = self.space.strips(block, 1, num_sent)
            whole[:num_sent] = arrived(strips, 1, num_sent, gaps)[0]
        return whole

    def missing(self, block: int, receiver: int, sender: int, count: int) -> list[int]:
        """Which of a frame's parts are lost, and not made good by parity."""
        groups = num_fec_fragments(count, self.parity)
        lost = (torch.rand(count + groups, generator=self.generator) < self.lost).tolist()
        of_group = [sum(lost[j:count:groups]) + lost[count + j] for j in range(groups)]
        return [n for n in range(count) if lost[n] and not (groups and of_group[n % groups] == 1)]


def perplexity(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows: codes, loss of datagrams, perplexity beside both controls."""
    quiet_transformers()
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    windows = token_windows(tokenizer, corpus(options.domain)[1], accuracy.TOKENS, options.windows)
    world, rows = 4, []
    with adapt(model).installed():
        place = {"world_size": world, "halo": 0, "lost": 0.0, "seed": 0}
        base = {
            name: accuracy.losses(model, book, windows, place)
            for name, book in accuracy.CONTROLS.items()
        }
        for name in options.codes:
            book = codebook_of(name, model, tokenizer)
            copies = {"copies": book.prefix, "halo": options.halo}
            plan = Plan.make(accuracy.TOKENS - book.prefix, world, causal=True, **copies)
            for loss, parity in product(options.losses, (0, FEC_GROUP)):
                if parity and not loss:
                    continue  # the same
                found = [
                    one_loss(model, book, plan, ids, loss, parity, n)
                    for n, ids in enumerate(windows)
                ]
                row = {"codes": name, "domain": options.domain, "datagrams_lost": loss}
                row |= {"parity": parity}
                row |= {"world_size": world, "halo": options.halo, "windows": len(windows)}
                rows.append(row | accuracy.row_of(model, book, found, base))
                say(json.dumps(rows[-1]))
    return rows


@torch.inference_mode()
def one_loss(
    model: Any, book: Codebook, plan: Plan, ids: Tensor, loss: float, parity: int, seed: int
) -> float:
    """Nats a token after the first shard."""
    generator, inputs = torch.Generator().manual_seed(seed), {"input_ids": ids[None]}
    run = LossyDatagrams(model, book, plan, inputs, parity, lost=loss, generator=generator).run()
    first = accuracy.TOKENS // plan.world_size
    return float(F.cross_entropy(run.logits[0, first:-1], ids[first + 1 :]))


def codebook_of(name: str, model: Any, tokenizer: Any) -> Codebook:
    """As `bench.accuracy` has it; what has to be fitted is kept."""
    kept = calibrate.FOLDER / f"{name.replace(':', '-')}-0"
    if name.startswith("transform") or not kept.is_dir():
        book = accuracy.codebook_of(name, 0, model, tokenizer)
        if name.startswith("transform"):
            return book
        book.save_pretrained(kept)
    return Codebook.from_pretrained(kept)
