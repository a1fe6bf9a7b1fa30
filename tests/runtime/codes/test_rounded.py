"""What is read from codes, by products of rounded numbers: what that costs an answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import astra_kernels as ak
from astra_kernels import _direct as direct
from astra_kernels.attention.native import HAS_ROUNDED
from astra_runtime import Codebook
from astra_runtime.codes.latent import FEW_NUMBERS, DecoderState, sums_rows
from astra_runtime.codes.transform import TransformCodes
from astra_runtime.models import adapt

from ..models import fitted as codewords_of
from ..models import inputs_for, tiny, windows_for
from ..outputs import ranks_output
from ..transforms import fitted


@torch.no_grad()
def test_an_answer_changes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what sender and receiver have to know alike not at all."""
    fit = {"bits": 12, "codewords": 16, "rank": 8, "iterations": 3, "held_back": 0, "seed": 1}
    windows = windows_for("llama")
    book = Codebook.fit(
        tiny("llama"), windows, space="transform", fine_bits=60, fine_tokens=4, **fit
    )
    latents: dict[bool, list[Tensor]] = {False: [], True: []}
    update = DecoderState.update

    def noted(state: DecoderState, block: int, codewords: Tensor | None) -> None:
        update(state, block, codewords)
        latents[direct.MAY_ROUND].append(state.latent.clone())

    monkeypatch.setattr(DecoderState, "update", noted)
    answers = {}
    for may in (False, True):
        monkeypatch.setattr(direct, "MAY_ROUND", may)
        inputs, equal = inputs_for("llama", 40, batch=1), {"halo": 0, "weights": (1, 1)}
        answers[may] = ranks_output(tiny("llama"), book, inputs, 2, logits="all", **equal)[1]
    exact, rounded = answers[False], answers[True]
    error = float((rounded - exact).norm() / exact.norm())
    assert error < 0.03
    assert (error > 0) == (HAS_ROUNDED or direct.adds_rows(torch.device("cpu")))
    # the first rank sees no codes: it codes the same tokens alike, and so the second reads them
    assert len(latents[False]) == len(latents[True]) > 0
    for one in latents[False]:
        assert any(torch.equal(one, other) for other in latents[True] if other.shape == one.shape)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_sums_of_table_rows_are_the_product(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where some tokens' codes did not come, and for a part of the tokens."""
    monkeypatch.setattr(direct, "MAY_ROUND", True)
    model = tiny(kind)
    book = fitted(kind, model, bits=20)
    codec = TransformCodes(book, adapt(model))
    assert codec.rows is not None
    block, tokens = 1, 21
    transform = book.transforms[block]
    assert transform.codes
    codes = torch.randint(-1, book.codewords, (2, tokens, transform.codes), dtype=torch.int32)
    codes[:, 3] = -1
    codewords = ak.decode(codes.clamp(min=0), transform.tables) * (codes >= 0)[..., None]
    first = None if kind == "vit" else torch.randn(2, tokens, len(transform.offset))
    features = book.basis.shape[1] if book.basis is not None else 0
    embedding = torch.randn(2, tokens, features) if features else None
    state = DecoderState(codec.codes, first, embedding, 2, tokens)
    state.advance(block)
    for part in (slice(None), slice(4, 17)):
        want = state.estimate(block, codewords, part)
        found = codec._restored(state, block, codes, codewords, part)
        assert float((found - want).norm() / want.norm()) < 0.004
    if first is not None:  # what every rank computes itself stays as it is
        start = DecoderState(codec.codes, first, embedding, 2, tokens)
        before, codec.rows[0] = first.clone(), codec.rows[block]
        assert torch.equal(codec._restored(start, 0, codes, codewords), before)
        assert torch.equal(first, before)
    monkeypatch.setattr(direct, "MAY_ROUND", False)
    assert TransformCodes(book, adapt(model)).rows is None


def test_tables_larger_than_the_model_are_not_made() -> None:
    book = fitted("llama", tiny("llama"))
    numbers = sum(t.tables.shape[:2].numel() * len(t.offset) for t in book.transforms)
    assert sums_rows(book.transforms, 0)  # so few
    large = book.transforms * (1 + FEW_NUMBERS // numbers)
    numbers *= len(large) // len(book.transforms)
    assert sums_rows(large, numbers)
    assert not sums_rows(large, numbers - 1)


@torch.no_grad()
def test_what_every_rank_computes_itself_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "MAY_ROUND", True)
    model, inputs = tiny("llama", num_hidden_layers=1), inputs_for("llama", 40, batch=1)
    windows = windows_for("llama")
    book = Codebook.fit(model, windows, space="transform", codewords=16, held_back=0)
    assert book.bits == 0
    output = ranks_output(model, book, inputs, 2, logits="all", halo=0)[1]
    torch.testing.assert_close(output, model(**inputs).logits, rtol=1e-4, atol=1e-5)


CODEWORDS = {"kv": ("llama", 3), "hidden-1": ("vit", 1), "hidden-4": ("bert", 4)}


@pytest.mark.parametrize("name", CODEWORDS)
@torch.no_grad()
def test_codewords_are_rounded_where_they_leave_out_much(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, groups = CODEWORDS[name]
    model, space = tiny(kind), name.partition("-")[0]
    inputs = inputs_for(kind, 40)
    book = codewords_of(kind, model, space=space, groups=groups)
    assert book.rough_blocks == (True,) * 3
    assert book.codec.rounds(book)

    def answer(book: Codebook, may: bool) -> Tensor:
        monkeypatch.setattr(direct, "MAY_ROUND", may)
        return ranks_output(model, book, inputs, 2, logits="all")[1]

    exact, rounded = answer(book, False), answer(book, True)
    assert (float((rounded - exact).norm()) > 0) == HAS_ROUNDED
    assert float((rounded - exact).norm() / exact.norm()) < 0.03

    # of other codewords, and where nobody has said it, nothing is known
    others = book.with_tables([1.5 * table for table in book.block_tables])
    for unknown in (others, replace(book, notes={})):
        assert unknown.rough_blocks == (False,) * 3
        assert torch.equal(answer(unknown, False), answer(unknown, True))


def test_codewords_that_leave_out_little_are_not_rounded(tmp_path: Path) -> None:
    model = tiny("llama")
    few = windows_for("llama", 1, 32)  # a codeword for every token
    exact = Codebook.fit(model, few, groups=3, codewords=32, iterations=2, held_back=0, prefix=0)
    assert exact.rough_blocks == (False,) * 3
    book = codewords_of("llama", model, space="differential", groups=4)
    assert not book.rough_blocks[0]  # every rank embeds the token ids itself
    book.save_pretrained(tmp_path / "book")
    assert Codebook.from_pretrained(tmp_path / "book").rough_blocks == book.rough_blocks
    for note in ({}, {"digest": book.digest}, {"digest": book.digest, "shares": ["1", None, True]}):
        assert not any(replace(book, notes={"left_out": note}).rough_blocks)
