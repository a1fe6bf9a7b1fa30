"""Small codebooks of space "transform", and the package's simulation of what ranks do with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from astra_runtime import Codebook
from astra_runtime.plan import Plan
from astra_runtime.train.simulate import Simulation

from .models import book_of
from .outputs import logits_of


def fitted(kind: str, model: Any, **options: Any) -> Codebook:
    options = {"bits": 24, "codewords": 16, "rank": 8, "iterations": 3, "held_back": 0} | options
    return book_of(model, kind, space="transform", **options)


def plan_of(kind: str, book: Codebook, tokens: int, weights: tuple[int, ...]) -> Plan:
    copies = book.prefix if kind in ("llama", "gpt2") else 1
    body = 25 if kind == "vit" else tokens - copies
    causal = kind in ("llama", "gpt2")
    return Plan.make(body, len(weights), causal=causal, copies=copies, weights=weights)


@torch.no_grad()
def simulated(model: Any, book: Codebook, plan: Plan, inputs: dict[str, Tensor]) -> Tensor:
    return logits_of(Simulation(model, book, plan, inputs).run())
