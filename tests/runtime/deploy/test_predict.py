"""Predictions against what can be worked out by hand, and their directions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from astra_runtime import Codebook
from astra_runtime.codes.base import geometry
from astra_runtime.codes.transform import TransformCodes
from astra_runtime.costs import engine_plan, flops_over_ideal, single_flops
from astra_runtime.deploy.predict import closed_form, first_token, one_device, quickest_plan
from astra_runtime.deploy.rates import Rates, measure_rates, rates_of_flops
from astra_runtime.models import adapt
from astra_runtime.models.shapes import SHAPES, shaped
from astra_runtime.plan import Plan
from astra_runtime.transport import Link

from ..models import book_of, fitted, tiny

FREE = Link()
_kept: list[Any] = []  # adapters do not keep their models alive


def adapter_of(model: Any) -> Any:
    _kept.append(model)
    return adapt(model)


def kv(adapter: Any, groups: int = 1) -> Codebook:
    return Codebook("kv", groups, 1024, groups == 1, geometry=geometry(adapter))


@pytest.mark.parametrize("name", SHAPES)
def test_one_device_is_its_flops(name: str) -> None:
    adapter = adapter_of(shaped(name))
    rates = rates_of_flops(adapter, Codebook.drop(), 1e9)
    assert one_device(adapter, rates, 256) == pytest.approx(single_flops(adapter, 256) / 1e9)


@pytest.mark.parametrize("name", ["vit-base", "gpt2"])
@pytest.mark.parametrize("world", [2, 4, 7])
def test_without_a_link_the_slowest_ranks_flops_are_all(name: str, world: int) -> None:
    adapter = adapter_of(shaped(name))
    book = kv(adapter)
    plan = engine_plan(adapter, book, 512, world)
    rates = rates_of_flops(adapter, book, 1e9)
    found = first_token(adapter, book, plan, [rates] * world, FREE)
    ideal = single_flops(adapter, 512) / 1e9 / world
    expected = flops_over_ideal(adapter, book, 512, world) * ideal
    assert max(found.busy) == pytest.approx(expected, rel=1e-6)
    # hardly anybody waits, and nobody for a rank before the last one that has a little more to do
    assert 0.99 * expected <= found.seconds <= 1.1 * expected


def test_the_link_by_hand() -> None:
    """Two ranks of an encoder, two blocks of work that takes no time: only frames do."""
    adapter = adapter_of(tiny("vit"))
    blocks = len(adapter.blocks)
    book = Codebook.none()
    plan = Plan((0, 12, 25), causal=False, copies=1)
    link = Link(8.0, 3.0)  # 1 MB/s
    nothing = Rates(0, 0, 0, 0, 0, 0)
    found = first_token(
        adapter, book, plan, [nothing] * 2, link, payload=lambda block, tokens: 1000.0 * tokens
    )
    answer = link.seconds(4 * adapter.hidden_size) + 0.003
    # each block ends when the larger frame has come; both ranks wait for each other's
    larger, smaller = link.seconds(13000) + 0.003, link.seconds(12000) + 0.003
    assert found.seconds == pytest.approx(_alternating(blocks, larger, smaller) + answer)


def _alternating(blocks: int, larger: float, smaller: float) -> float:
    """When rank 1 is ready: rank 0 receives 13 tokens, rank 1 receives 12, block after block."""
    ready = [0.0, 0.0]
    link = [0.0, 0.0]
    for _ in range(blocks):
        sent = [max(ready[0], link[0]) + smaller - 0.003, max(ready[1], link[1]) + larger - 0.003]
        link = sent
        ready = [sent[1] + 0.003, sent[0] + 0.003]
    return ready[1]


def test_frames_to_more_peers_cross_the_uplink_one_after_another() -> None:
    adapter = adapter_of(tiny("vit"))
    nothing = Rates(0, 0, 0, 0, 0, 0)

    def seconds(world: int) -> float:
        plan = Plan.make(24, world, causal=False, copies=1)
        found = first_token(
            adapter,
            Codebook.none(),
            plan,
            [nothing] * world,
            Link(1.0),
            payload=lambda block, tokens: 1000.0,
        )
        return found.seconds

    assert seconds(4) == pytest.approx(3 * seconds(2), rel=0.2)


def test_class_tokens_of_many_ranks_take_a_step_for_each_doubling() -> None:
    adapter, link = adapter_of(tiny("vit")), Link(1.0, 3.0)
    nothing = Rates(0, 0, 0, 0, 0, 0)
    plan = Plan.make(24, 8, causal=False, copies=1)
    found = first_token(adapter, Codebook.local_only(), plan, [nothing] * 8, link)
    assert found.seconds == pytest.approx(3 * (link.seconds(4 * adapter.hidden_size) + 0.003))


def test_fine_codes_lengthen_the_next_ranks_frame() -> None:
    options = {"bits": 12, "codewords": 16, "iterations": 2, "held_back": 0}
    model = tiny("llama")
    book = book_of(model, "llama", space="transform", fine_bits=60, fine_tokens=4, **options)
    coarse = replace(book, fine=(), fine_tokens=0, fine_codewords=0)
    plan = Plan.make(30, 2, causal=True, copies=1)
    idle, link = Rates(0, 0, 0, 0, 0, 0), Link(mbit_per_s=1)
    with_fine, without = (
        first_token(adapt(model), b, plan, [idle] * 2, link).seconds for b in (book, coarse)
    )
    more = sum(4 * part.codes * 6 for part in book.fine)  # bits of the last 4 of 15 tokens
    assert with_fine - without == pytest.approx(more / 1e6, rel=0.1)  # up to whole bytes


def test_slow_links_and_more_bits_cost_time() -> None:
    adapter = adapter_of(shaped("vit-base"))

    def seconds(book: Codebook, mbit: float) -> float:
        rates = rates_of_flops(adapter, book, 50e9)
        plan = engine_plan(adapter, book, 512, 4)
        return first_token(adapter, book, plan, [rates] * 4, Link(mbit, 1.0)).seconds

    slow = [seconds(kv(adapter), mbit) for mbit in (1, 10, 100)]
    assert slow == sorted(slow, reverse=True)
    wide = [seconds(b, 10) for b in (kv(adapter), kv(adapter, 12), Codebook.none("int8"))]
    assert wide == sorted(wide)


def test_a_slow_rank_is_waited_for() -> None:
    adapter = adapter_of(shaped("vit-base"))
    book = kv(adapter)
    rates = rates_of_flops(adapter, book, 50e9)
    plan = engine_plan(adapter, book, 512, 3)
    even = first_token(adapter, book, plan, [rates] * 3, FREE)
    uneven = first_token(adapter, book, plan, [rates, rates.slower(2), rates], FREE)
    assert uneven.seconds == pytest.approx(2 * even.seconds, rel=0.05)
    assert uneven.waiting[0] > 0.3 * uneven.seconds
    with pytest.raises(ValueError, match="rates: expected those of 3 ranks, got 2"):
        first_token(adapter, book, plan, [rates] * 2, FREE)


@pytest.mark.parametrize("mbit", [None, 1.0])
def test_a_slow_link_takes_tokens_from_the_rank_that_sends_to_all(mbit: float | None) -> None:
    adapter = adapter_of(shaped("gpt2"))
    book = kv(adapter, 12)
    rates = [rates_of_flops(adapter, book, 50e9)] * 16
    usual = engine_plan(adapter, book, 512, 16)
    plan, found = quickest_plan(adapter, book, rates, Link(mbit, 1.0), 512)
    assert (plan == usual) == (mbit is None)
    assert plan.size(0) <= usual.size(0)
    assert found == first_token(adapter, book, plan, rates, Link(mbit, 1.0))
    if mbit:
        assert found.seconds < first_token(adapter, book, usual, rates, Link(mbit, 1.0)).seconds


@pytest.mark.parametrize(
    ("space", "kind"),
    [
        *(("transform", kind) for kind in ("llama", "gpt2", "bert", "vit")),
        *((space, kind) for space in ("kv", "none", "drop") for kind in ("llama", "vit")),
    ],
)
def test_every_space_is_measured(kind: str, space: str) -> None:
    model = tiny(kind)
    if space == "kv":
        book = fitted(kind, model, space="kv", groups=1)
    elif space == "transform":
        options = {"bits": 24, "codewords": 16, "held_back": 0}
        book = book_of(model, kind, space="transform", **options)
    else:
        book = Codebook(space)
    tokens = 25 if kind == "vit" else 32
    if kind == "vit":
        with pytest.raises(ValueError, match="tokens: expected the 25 patches"):
            measure_rates(model, book, 24)
    rates = measure_rates(model, book, tokens)
    assert min(vars(rates).values()) >= 0
    assert (rates.remote_pair > 0) == (space != "drop")
    assert (rates.code > 0) == (space != "drop")


def test_a_sender_is_measured_as_it_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With block 0's keys and values from the block, as in a call, not computed once more."""
    model = tiny("llama")
    book = book_of(model, "llama", space="transform", bits=24, codewords=16, held_back=0)
    started: list[object] = []
    start = TransformCodes._started

    def counted(codec: TransformCodes, *given: Any) -> Any:
        started.append(codec)
        return start(codec, *given)

    monkeypatch.setattr(TransformCodes, "_started", counted)
    measure_rates(model, book, 32)
    assert len(started) == 2  # what each of two ranks is to receive


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_bits_are_those_of_the_engine(dtype: str) -> None:
    adapter = adapter_of(tiny("llama"))  # three KV heads of 16 channels
    each = {"float32": 32, "float16": 16, "int8": 9}[dtype]
    assert Codebook.none(dtype).token_bits(adapter, 1) == 2 * 3 * 16 * each
    assert Codebook.drop().token_bits(adapter, 0) == 0
    differential = replace(kv(adapter), space="differential")
    assert [differential.token_bits(adapter, block) for block in (0, 1)] == [0, 10]


def test_flops_that_cannot_be_are_refused() -> None:
    adapter = adapter_of(tiny("llama"))
    with pytest.raises(ValueError, match="flops: expected a positive rate, got 0"):
        rates_of_flops(adapter, Codebook.none(), 0)
    with pytest.raises(ValueError, match="name: expected one of vit-base"):
        shaped("alexnet")


@pytest.mark.parametrize("world", [2, 8])
def test_the_closed_form_is_near_the_followed_ranks(world: int) -> None:
    adapter = adapter_of(shaped("vit-base"))
    book, link = kv(adapter), Link(10.0, 1.0)
    rates = rates_of_flops(adapter, book, 50e9)
    plan = engine_plan(adapter, book, 1024, world)
    followed = first_token(adapter, book, plan, [rates] * world, link).seconds
    assert closed_form(adapter, book, rates, link, 1024, world) == pytest.approx(followed, rel=0.05)
    alone = closed_form(adapter, book, rates, link, 1024, 1)
    assert alone == pytest.approx(one_device(adapter, rates, 1024))


def test_rows_and_columns_pay_when_frames_are_all_headers() -> None:
    adapter = adapter_of(shaped("vit-base"))
    book, link = kv(adapter), Link(10.0, 1.0)
    rates = rates_of_flops(adapter, book, 50e9)

    def seconds(world: int, two_level: bool) -> float:
        return closed_form(adapter, book, rates, link, 1024, world, two_level=two_level)

    assert seconds(4, False) <= seconds(4, True)
    far = Link(10.0, 100.0)
    direct, in_two = (
        closed_form(adapter, book, rates, far, 1024, 4, two_level=two) for two in (False, True)
    )
    assert in_two > direct + 1  # one more latency in each of 12 blocks, for nothing
    assert seconds(512, True) < 0.5 * seconds(512, False)
    with pytest.raises(ValueError, match="world: expected 1 to 1024 ranks"):
        seconds(1025, False)
