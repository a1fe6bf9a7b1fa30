"""FLOPs against torch's own counter, against the paper's figures, and against the engine's cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from astra_kernels import _direct as direct
from astra_runtime import Codebook, Engine
from astra_runtime.codes.base import geometry
from astra_runtime.costs import costs_of, engine_plan, flops_over_ideal, rank_flops, single_flops
from astra_runtime.evaluate import run_ranks
from astra_runtime.models import Adapter, adapt
from astra_runtime.plan import Plan

from .models import inputs_for, tiny, windows_for

FAMILIES = ("llama", "gpt2", "bert", "vit")


def described(adapter: Adapter, space: str, groups: int, codewords: int) -> Codebook:
    """A codebook without tables: enough to count."""
    return Codebook(space, groups, codewords, geometry=geometry(adapter))


def base_vit() -> Any:
    """ViT-Base, without weights."""
    with torch.device("meta"):
        return transformers.ViTModel(transformers.ViTConfig()).eval()


@pytest.mark.parametrize(
    ("space", "groups", "bound"), [("hidden", 1, 3.94), ("kv", 1, 3.92), ("hidden", 32, 2.66)]
)
def test_bounds_of_vit_base_with_1024_tokens_on_four_devices(
    space: str, groups: int, bound: float
) -> None:
    model = base_vit()
    adapter = adapt(model)
    found = flops_over_ideal(adapter, described(adapter, space, groups, 1024), 1024, 4)
    assert 4 / found == pytest.approx(bound, abs=0.02)  # class tokens: 0.3 % of work


def counted(call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_single_encoder_is_what_torch_counts(kind: str) -> None:
    model, inputs = tiny(kind, attn_implementation="eager"), inputs_for(kind)
    adapter = adapt(model)
    with torch.no_grad():
        blocks = counted(lambda: model(**inputs)) - extras(model, inputs)
    assert single_flops(adapter, adapter.count(inputs)[1]) == blocks


def extras(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """FLOPs outside of the blocks: what is left of the model without any."""
    holder = getattr(model, "vit", None) or model.encoder
    name = "layers" if hasattr(holder, "layers") else "layer"
    kept = getattr(holder, name)
    setattr(holder, name, torch.nn.ModuleList())
    try:
        return counted(lambda: model(**inputs))
    finally:
        setattr(holder, name, kept)


def test_a_single_decoder_counts_half_the_square() -> None:
    model = tiny("gpt2", attn_implementation="eager")
    inputs, tokens, adapter = inputs_for("gpt2", 23), 23, adapt(model)
    with torch.no_grad():
        whole = counted(lambda: model.transformer(**inputs))
    _, attention = adapter.block_flops()
    unseen = 3 * attention * tokens * (tokens - 1) / 2  # 3 blocks
    assert single_flops(adapter, tokens) == whole - unseen


@pytest.mark.parametrize(("space", "groups"), [("kv", 6), ("hidden", 1), ("hidden", 4)])
def test_products_outside_attention_and_search_are_what_torch_counts(
    space: str, groups: int
) -> None:
    """Attention and search are ops of their own, whose FLOPs torch's counter does not know."""
    model, inputs = tiny("gpt2"), inputs_for("gpt2", 23)
    adapter = adapt(model)
    book = Codebook.fit(
        model, windows_for("gpt2"), space=space, groups=groups, codewords=16, held_back=0
    )

    def work(mesh: Any) -> int:
        with Engine(model.transformer, relabelled(book, model), mesh, weights=(5, 3, 2)) as engine:
            engine(**inputs, logits="local")  # a first call also checks how codes are projected
            return counted(lambda: engine(**inputs, logits="local"))

    plan = Plan.make(23, 3, causal=True, weights=(5, 3, 2))
    whole = rank_flops(adapter, book, plan)
    _, attention = adapter.block_flops()
    for rank, found in enumerate(run_ranks(3, work)):
        own, heard = plan.size(rank), plan.bounds[rank]
        pairs = own * (own + 1) / 2 + own * heard
        width = 2 * 48 if space == "kv" else 48
        search = 2 * 16 * width * own if rank < 2 else 0
        assert found == whole[rank] - 3 * (attention * pairs + search)


@pytest.mark.parametrize("sums", [False, True])
def test_transform_codes_are_counted(sums: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sums of table rows, which torch's counter does not know, and with the products that a
    GPU has in their place."""
    monkeypatch.setattr(direct, "MAY_ROUND", sums)
    model, inputs = tiny("gpt2"), inputs_for("gpt2", 23)
    adapter = adapt(model)
    options: dict[str, Any] = {"space": "transform", "bits": 24, "codewords": 16, "rank": 8}
    book = Codebook.fit(model, windows_for("gpt2"), held_back=0, **options)

    def work(mesh: Any) -> int:
        with Engine(model.transformer, relabelled(book, model), mesh, weights=(5, 3, 2)) as engine:
            return counted(lambda: engine(**inputs, logits="local"))

    plan = engine_plan(adapter, book, 23, 3, shard_weights=(5, 3, 2))
    whole = rank_flops(adapter, book, plan)
    _, attention = adapter.block_flops()
    search = 2 * sum(t.tables.numel() for t in book.transforms)  # `encode` is not counted there
    added = sum(t.codes * len(t.offset) for t in book.transforms)
    products = 0 if sums else 2 * sum(t.synthesis.numel() for t in book.transforms)
    assert costs_of(adapter, book).sums == added / len(book.transforms) > 0
    assert book.basis is not None
    once = 2 * book.basis.numel()  # of the prefix, too: what the basis makes of embeddings
    for rank, found in enumerate(run_ranks(3, work)):
        own, heard = plan.size(rank), plan.bounds[rank]
        queries = own + plan.copies
        pairs = queries * (queries + 1) / 2 + own * heard
        not_counted = 3 * attention * pairs + (search * own if rank < 2 else 0)
        not_counted += (added - products) * heard
        assert found == whole[rank] - not_counted + once * plan.copies


def relabelled(book: Codebook, model: Any) -> Codebook:
    """The codebook for the model without its head, whose digest is another."""
    return replace(book, model=adapt(model.transformer).digest())


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(("space", "groups"), [("kv", 1), ("hidden", 4), ("none", 0)])
def test_the_plan_is_the_engine_s(kind: str, space: str, groups: int) -> None:
    model = tiny(kind)
    if space == "none":
        book = Codebook.none()
    else:
        windows = windows_for(kind)
        book = Codebook.fit(
            model, windows, space=space, groups=groups, codewords=16, held_back=0, shared=True
        )

    def work(mesh: Any) -> Plan:
        with Engine(model, book, mesh) as engine:
            return engine.plan(25)

    assert run_ranks(3, work) == [engine_plan(adapt(model), book, 25, 3)] * 3


def test_controls_and_differential_codes() -> None:
    model = tiny("gpt2")
    adapter = adapt(model)
    linear, attention = adapter.block_flops()
    plan = Plan((0, 8, 16), causal=True)
    local = linear * 8 + attention * 36
    assert rank_flops(adapter, Codebook.drop(), plan) == [3 * local] * 2
    dense = [3 * local, 3 * (local + attention * 64)]
    assert rank_flops(adapter, Codebook.none("int8"), plan) == dense
    search = 2 * (2 * 32 * 48) * 8  # in two of the three blocks
    projection = 3 * (2 * 48 * 96) * 8
    found = rank_flops(adapter, described(adapter, "differential", 4, 32), plan)
    assert found == pytest.approx([dense[0] + search, dense[1] + projection])


def test_one_rank_is_ideal_and_a_given_plan_is_taken() -> None:
    model = tiny("gpt2")  # the adapter does not keep it alive
    adapter = adapt(model)
    assert flops_over_ideal(adapter, Codebook.none(), 20, 1) == 1
    uneven = Plan((0, 19, 20), causal=True)
    worst = flops_over_ideal(adapter, Codebook.none(), 20, 2, uneven)
    assert worst > 1.8 > flops_over_ideal(adapter, Codebook.none(), 20, 2)
    with pytest.raises(ValueError, match="plan: expected 20 tokens and 4 ranks, got 20 and 2"):
        flops_over_ideal(adapter, Codebook.none(), 20, 4, uneven)
