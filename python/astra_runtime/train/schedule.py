"""What is drawn and what changes from step to step of an adaptation: settings, plans, the rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..models import Adapter
from ..plan import Plan


@dataclass(frozen=True)
class Settings:
    """What a run is made of, besides model, codebook and data.

    Attributes:
        steps: optimizer steps.
        lr: AdamW's learning rate at its height: it rises over `warmup` steps, and falls to 0 at the
            end along a cosine.
        batch: windows a step, drawn without repetition within a step.
        noise, commitment, decay: λ, β and γ of `NAVQ`.
        ranks: least and most N, drawn uniformly; (4, 4) trains for four devices.
        shard: the fewest tokens of a shard; boundaries are drawn uniformly from all that have it.
        single_class_token: train as if rank 0 alone had the class token, for comparison.
        seed: makes the run deterministic.
    """

    steps: int
    lr: float = 5e-5
    batch: int = 4
    noise: float = 1.0
    commitment: float = 1e-4
    decay: float = 0.99
    ranks: tuple[int, int] = (2, 8)
    shard: int = 16
    warmup: int = 20
    weight_decay: float = 0.0
    single_class_token: bool = False
    seed: int = 0

    def check(self, tokens: int) -> None:
        """Refuses what windows of `tokens` tokens cannot be trained with."""
        least, most = self.ranks
        for name in ("steps", "batch", "shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr: expected more than 0, got {self.lr}")
        if not 1 <= least <= most:
            raise ValueError(f"ranks: expected 1 <= least <= most, got {least} and {most}")
        if most * self.shard > tokens:
            raise ValueError(
                f"shard: expected at most {tokens // most} tokens, so that {most} ranks of a "
                f"window of {tokens} have them, got {self.shard}; give longer windows or fewer "
                "ranks"
            )


def draw_plan(
    tokens: int,
    adapter: Adapter,
    settings: Settings,
    generator: torch.Generator,
    prefix: int = 0,
) -> Plan:
    """N uniform in `settings.ranks`, the cut uniform among those with no shard too small.

    `prefix` of a decoder's tokens are every rank's own.
    """
    tokens -= prefix
    least, most = settings.ranks
    ranks = int(torch.randint(least, most + 1, (), generator=generator))
    # N − 1 different ones of slack + N − 1 places are a uniform way to share `slack` out to N
    slack = tokens - ranks * settings.shard
    places = torch.randperm(slack + ranks - 1, generator=generator)[: ranks - 1].sort().values
    cuts = [int(place) - i + (i + 1) * settings.shard for i, place in enumerate(places)]
    return Plan((0, *cuts, tokens), adapter.causal, adapter.class_tokens + prefix)


def schedule(step: int, settings: Settings) -> float:
    """The share of the learning rate at a step from 0: linear warm-up, then a cosine to 0."""
    warmup = min(settings.warmup, settings.steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup))
