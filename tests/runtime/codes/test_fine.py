"""Fine codes of the tokens right before a cut: the engine, the simulation, files, losses, costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import astra_kernels as ak
from astra_runtime import Codebook, Engine, costs
from astra_runtime.codes.base import received_mask
from astra_runtime.costs import default_halo, engine_plan, rank_flops
from astra_runtime.evaluate import run_ranks
from astra_runtime.models import adapt
from astra_runtime.plan import Plan
from astra_runtime.train.simulate import Simulation

from ..models import inputs_for, tiny, windows_for
from ..outputs import logits_of, ranks_output

FINE: dict[str, Any] = {"fine_bits": 60, "fine_tokens": 4}
KINDS = ("llama", "gpt2")


@pytest.fixture(scope="module")
def books() -> dict[str, Codebook]:
    return {kind: fitted(kind, **FINE) for kind in KINDS}


def fitted(kind: str, **options: Any) -> Codebook:
    small = {"bits": 12, "codewords": 16, "rank": 8, "iterations": 3, "held_back": 0}
    small |= {"seed": 1}  # with which no vector here lies between two codewords, to rounding
    return Codebook.fit(tiny(kind), windows_for(kind), space="transform", **small | options)


@torch.no_grad()
def simulated(kind: str, book: Codebook, weights: tuple[int, ...], inputs: Any, **lost: Any) -> Any:
    body = inputs["input_ids"].shape[1] - book.prefix
    plan = Plan.make(body, len(weights), causal=True, copies=book.prefix, shard_weights=weights)
    model = tiny(kind)
    return logits_of(Simulation(model, book, plan, inputs, **lost).run())


@pytest.mark.parametrize("weights", [(1, 1), (5, 1, 3), (2, 3, 3, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_equal_the_simulation(
    books: dict[str, Codebook], kind: str, weights: tuple[int, ...]
) -> None:
    model, inputs, book = tiny(kind), inputs_for(kind, 23, batch=2), books[kind]
    wanted = simulated(kind, book, weights, inputs)
    outputs = ranks_output(model, book, inputs, len(weights), logits="all", weights=weights, halo=0)
    for output in outputs:
        torch.testing.assert_close(output, wanted, rtol=2e-4, atol=2e-4)


def test_the_next_rank_alone_reads_them(books: dict[str, Codebook]) -> None:
    """What other ranks compute is what coarse codes alone give, bit by bit of what they receive."""
    model, inputs, book = tiny("llama"), inputs_for("llama", 23), books["llama"]
    coarse = replace(book, fine=(), fine_tokens=0, fine_codewords=0)

    def received(book: Codebook) -> list[dict[int, int]]:
        def work(mesh: Any) -> dict[int, int]:
            with Engine(model, book, mesh, weights=(1, 1, 1), halo=0) as engine:
                sizes = engine._sizes(engine.rank, engine.plan(23), 1)
                engine(**inputs)
                return dict(sizes.fine[1])

        return run_ranks(3, work)

    count = book.fine[1].codes
    assert count
    # of 7 and 8 tokens a quarter
    assert received(book)[0] == {n: ak.packed_size(2 * count, 6) for n in (0, 1)}
    assert received(coarse)[0] == {0: 0, 1: 0}
    fine, plain = (
        ranks_output(model, b, inputs, 3, logits="local", weights=(1, 1, 1), halo=0)
        for b in (book, coarse)
    )
    assert torch.equal(fine[0], plain[0])  # receives nothing
    assert not torch.allclose(fine[1], plain[1], atol=1e-4)


def test_they_come_nearer_to_the_exact_answer(books: dict[str, Codebook]) -> None:
    model, inputs, book = tiny("llama"), inputs_for("llama", 23), books["llama"]
    exact = logits_of(model(**inputs)).detach()
    coarse = replace(book, fine=(), fine_tokens=0, fine_codewords=0)
    of_fine, of_coarse = (
        float((simulated("llama", b, (1, 1), inputs) - exact).square().sum())
        for b in (book, coarse)
    )
    assert of_fine < 0.8 * of_coarse


def test_budget_file_and_digest(books: dict[str, Codebook], tmp_path: Path) -> None:
    book = books["llama"]
    assert 30 < book.fine_bits <= FINE["fine_bits"]
    book.save_pretrained(tmp_path)
    back = Codebook.from_pretrained(tmp_path)
    assert back == book
    assert (back.fine_tokens, len(back.fine)) == (4, len(book.transforms))
    coarse = replace(book, fine=(), fine_tokens=0, fine_codewords=0)
    assert coarse.digest != book.digest
    assert "fine_tokens" not in coarse._config()  # as in codebooks of before
    assert replace(book, fine_tokens=5).digest != book.digest


def test_few_calibration_vectors_make_few_codewords() -> None:
    windows = windows_for("llama")[:2, :20]
    book = Codebook.fit(
        tiny("llama"),
        windows,
        space="transform",
        bits=12,
        codewords=16,
        rank=8,
        held_back=0,
        fine_bits=30,
    )
    assert book.fine_codewords == 2 * 19  # without the first token, which is exact
    assert book.fine_bits <= 30
    assert book.fine_tokens == 64


def test_bits_count_each_payload_once(books: dict[str, Codebook]) -> None:
    model, inputs, book = tiny("llama"), inputs_for("llama", 23), books["llama"]
    plan = Plan.make(22, 2, causal=True, copies=1, shard_weights=(1, 1))
    rows = [t.codes * 11 * 4 for t in book.transforms]
    fine = [f.codes * 3 * 6 for f in book.fine]  # of 11 tokens a quarter
    size = sum(-(-bits // 8) for bits in (*rows, *fine))

    def work(mesh: Any) -> tuple[float, float]:
        with Engine(model, book, mesh, weights=(1, 1), halo=0) as engine:
            assert engine.plan(23) == plan
            engine(**inputs)
            return engine.bits_per_token_block, engine.bits_per_receiver

    bits = pytest.approx(8 * size / (11 * len(book.transforms)))
    assert run_ranks(2, work)[0] == (bits, bits)


def test_bits_of_a_receiver(books: dict[str, Codebook]) -> None:
    """Of three ranks, rank 0 sends to two and rank 1 to one; fine codes go to one each."""
    model, inputs, book = tiny("llama"), inputs_for("llama", 23), books["llama"]

    def work(mesh: Any) -> tuple[float, Any, Plan]:
        with Engine(model, book, mesh, weights=(1, 1, 1), halo=0) as engine:
            engine(**inputs)
            return (
                engine.bits_per_receiver,
                engine._sizes(engine.rank, engine.plan(23), 1),
                engine.plan(23),
            )

    bits, sizes, plan = run_ranks(3, work)[0]
    first, second = plan.size(0), plan.size(1)
    whole = sum(2 * coarse[0] + coarse[1] for coarse in sizes.payload)
    whole += sum(fine[0] + fine[1] for fine in sizes.fine)
    assert bits == pytest.approx(8 * whole / ((2 * first + second) * len(book.transforms)))


def test_they_take_the_place_of_the_halo(books: dict[str, Codebook]) -> None:
    model, book = tiny("llama"), books["llama"]
    adapter = adapt(model)
    coarse = replace(book, fine=(), fine_tokens=0, fine_codewords=0)
    assert default_halo(adapter, book, 900, 3) == 0 < default_halo(adapter, coarse, 900, 3)
    plan = engine_plan(adapter, book, 901, 3)
    with_fine, without = (rank_flops(adapter, b, plan) for b in (book, coarse))
    send = sum(f.analysis.numel() + f.tables.numel() for f in book.fine)
    send += sum(t.up.numel() + t.codes * len(t.offset) / 2 for t in book.transforms)
    receive = sum(f.synthesis.numel() for f in book.fine)
    more = [a - b for a, b in zip(with_fine, without, strict=True)]
    tokens = FINE["fine_tokens"]
    assert more == pytest.approx([2 * tokens * n for n in (send, send + receive, receive)])


def test_ranks_in_the_middle_who_do_both_get_fewer_tokens(
    books: dict[str, Codebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "CODING_PACE", 1.0)  # FLOPs are counted below
    monkeypatch.setattr(costs, "SUMS_PACE", 1.0)
    model, book = tiny("llama"), replace(books["llama"], fine_tokens=60)
    flops = rank_flops(adapt(model), book, engine_plan(adapt(model), book, 901, 3))
    assert max(flops) / min(flops) == pytest.approx(1, abs=0.01)


def test_a_halo_moves_them_before_it() -> None:
    plan = Plan.make(90, 3, causal=True, halo=3)
    assert plan.fine_tokens(0, 4) == slice(23, 27)  # rank 1 computes tokens 27 to 29 itself
    assert plan.fine_tokens(2, 4) == slice(0, 0)
    assert Plan.make(90, 3, causal=False).fine_tokens(0, 4) == slice(0, 0)


def test_no_more_of_them_than_a_quarter_of_a_shard() -> None:
    plan = Plan.make(90, 3, causal=True, shard_weights=(3, 1, 5))
    assert plan.fine_tokens(0, 40) == slice(22, 30)
    assert plan.fine_tokens(1, 40) == slice(8, 10)
    assert plan.fine_tokens(1, 1) == slice(9, 10)


def test_a_lost_frame_takes_its_fine_codes_along(books: dict[str, Codebook]) -> None:
    inputs, book = inputs_for("llama", 23), books["llama"]
    missed = [(1, 0, block) for block in range(1, len(book.transforms))]
    coarse = replace(book, fine=(), fine_tokens=0, fine_codewords=0)
    gone, same = (
        simulated("llama", b, (1, 1), inputs, missed=missed, after_loss="predicted")
        for b in (book, coarse)
    )
    torch.testing.assert_close(gone, same)


def test_missing_bytes_name_the_fine_tokens_that_lack_them(books: dict[str, Codebook]) -> None:
    book = books["llama"]
    model = tiny("llama")
    codec = book.make_codec(adapt(model))
    width = book.fine[1].codes * 6
    layout = codec.fine_layout(1, 2, 4)
    assert [place.start for place in layout] == [0, codec.fine_bytes(1, 1, 4)]
    mask = received_mask(layout, 2, 4, [(0, 1)])
    assert mask.tolist() == [[width * i >= 8 for i in range(4)], [True] * 4]
    behind = received_mask(layout, 2, 4, [(-9, 0)])  # of the coarse codes
    assert behind.all()


@pytest.mark.parametrize(
    ("kind", "options", "wanted"),
    [
        ("bert", {"fine_bits": 60}, "fine_bits: expected 0 for an encoder"),
        ("llama", {"fine_bits": -1}, "fine_bits: expected 0 to"),
        ("llama", {"fine_bits": 60, "fine_tokens": 0}, "fine_tokens: expected at least 1"),
        ("llama", {"space": "kv", "bits": None, "fine_bits": 60}, "space 'transform' only"),
    ],
)
def test_refusals(kind: str, options: dict[str, Any], wanted: str) -> None:
    given = {"space": "transform", "bits": 12, "codewords": 16, "held_back": 0} | options
    with pytest.raises(ValueError, match=wanted):
        Codebook.fit(tiny(kind), windows_for(kind), **given)
