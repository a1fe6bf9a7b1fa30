"""Engines opened and closed, copies made, the models' own calls and bad requests, in any order:
every good answer is the one of before, bit for bit, and nothing is left in the models."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from astra_runtime import Codebook, Engine
from astra_runtime.errors import CallEnded
from astra_runtime.evaluate import run_ranks
from astra_runtime.transport import Mesh

from .models import book_of, inputs_for, tiny
from .outputs import logits_of

FIRST = tiny("llama")
SECOND = transformers.LlamaForCausalLM(FIRST.config).eval()  # of one configuration
MODELS = (FIRST, SECOND, FIRST.model)  # and a model inside the first
BOOKS = (Codebook.dense(), book_of(FIRST, "llama", space="kv", groups=3, codewords=16, held_back=0))
INPUTS = inputs_for("llama", 17)
BAD: tuple[dict[str, Any], ...] = (
    {"input_ids": INPUTS["input_ids"] + 97},
    {"input_ids": INPUTS["input_ids"].float()},
    {"input_ids": INPUTS["input_ids"], "attention_mask": torch.zeros(1, 17)},
    {"input_ids": INPUTS["input_ids"], "logits": "first"},
)

number = st.integers(0, len(MODELS) - 1)
STEPS = st.one_of(
    st.tuples(st.just("open"), number, st.integers(0, len(BOOKS) - 1)),
    st.tuples(st.just("close"), number, st.just(0)),
    st.tuples(st.just("call"), number, st.just(0)),
    st.tuples(st.just("bad"), number, st.integers(0, len(BAD) - 1)),
    st.tuples(st.just("requests differ"), number, st.just(0)),
    st.tuples(st.just("own"), number, st.just(0)),
    st.tuples(st.just("copy"), number, st.just(0)),
)


@torch.no_grad()
def own(model: Any) -> Tensor:
    return logits_of(model(**INPUTS))


def first_answers(mesh: Mesh) -> dict[tuple[int, int], Tensor]:
    found = {}
    for which, code in ((0, 0), (0, 1), (1, 0), (2, 0)):
        with Engine(MODELS[which], BOOKS[code], mesh) as engine:
            found[which, code] = logits_of(engine(**INPUTS))
    return found


class Rank:
    """One rank that does as it is told, and compares."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.first = mesh, first_answers(mesh)
        self.open: dict[int, list[tuple[Engine, int]]] = {n: [] for n in range(len(MODELS))}
        self.alone = [own(model) for model in MODELS]

    def do(self, step: str, which: int, code: int) -> None:
        engines = self.open[which]
        if step == "open":
            code = code if which == 0 else 0  # the codebook is made for the first
            engines.append((Engine(MODELS[which], BOOKS[code], self.mesh), code))
        elif step == "own":
            assert torch.equal(own(MODELS[which]), self.alone[which])
        elif step == "copy":
            assert torch.equal(own(copy.deepcopy(MODELS[which])), self.alone[which])
        elif engines:
            self._use(step, which, code)

    def _use(self, step: str, which: int, code: int) -> None:
        engine, book = self.open[which][0]
        if step == "close":
            self.open[which].pop(0)[0].close()
        elif step == "call":
            assert torch.equal(logits_of(engine(**INPUTS)), self.first[which, book])
        elif step == "bad":
            with contextlib.suppress(ValueError, TypeError):
                engine(**BAD[code])
                raise AssertionError("a bad request was answered")
        else:
            with contextlib.suppress(CallEnded):
                engine(**INPUTS, request=self.mesh.rank)
                raise AssertionError("ranks at different requests have an answer")


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(STEPS, min_size=4, max_size=14))
def test_engines_in_any_order(steps: list[tuple[str, int, int]]) -> None:
    def work(mesh: Mesh) -> None:
        rank = Rank(mesh)
        for step in steps:
            rank.do(*step)
        for which in range(len(MODELS)):
            rank.do("own", which, 0)
            rank.do("open", which, 0)
            rank.do("call", which, 0)

    run_ranks(2, work, timeout=30)
    for model in MODELS:
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
