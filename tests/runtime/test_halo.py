"""The halo: tokens before its shard that a rank computes, too, and knows no codes of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from astra_runtime import Codebook, Engine
from astra_runtime.costs import HALO, default_halo, engine_plan, flops_over_ideal
from astra_runtime.errors import HandshakeRefused
from astra_runtime.evaluate import measure, run_ranks
from astra_runtime.models import adapt
from astra_runtime.plan import Plan
from astra_runtime.train.calibration import as_windows
from astra_runtime.train.simulate import Simulation as Package
from astra_runtime.transport import Mesh

from .models import book_of, fitted, inputs_for, options_for, tiny, windows_for
from .outputs import logits_of, ranks_output, rounding
from .simulation import Simulation

TOKENS = 23
HALOS = (1, 3, 9, 40)  # within a shard of (5, 1, 3), over one, over two, over all


@given(st.integers(1, 6), st.integers(0, 40), st.integers(0, 50), st.integers(0, 3), st.randoms())
def test_a_rank_knows_every_earlier_token_once(
    world_size: int, extra: int, halo: int, copies: int, random: Any
) -> None:
    weights = [random.uniform(0.1, 5) for _ in range(world_size)]
    tokens = world_size + extra
    plan = Plan.make(tokens, world_size, causal=True, copies=copies, halo=halo, weights=weights)
    sequence = torch.arange(copies + tokens)[None]
    for rank in range(world_size):
        local = plan.local_tokens(sequence, rank)[0].tolist()
        far = plan.remote_tokens(sequence, rank)[0].tolist()
        assert sorted(local + far) == list(range(plan.shard(rank).stop))
        assert far == sorted(far)
        own = plan.without_halo(plan.local_tokens(sequence, rank), rank)[0].tolist()
        assert own == [*range(copies), *range(*plan.shard(rank).indices(10**9))]
        assert plan.num_leading(rank) == len(local) - plan.size(rank)
        heard = {n: plan.num_received(rank, n) for n in plan.sources(rank)}
        assert sum(heard.values()) == len(far)
        assert all(0 < count <= plan.num_sent(n) for n, count in heard.items())
        assert all(rank in plan.receivers(n) for n in heard)
        assert plan.num_sent(rank) <= plan.size(rank)


@pytest.mark.parametrize("halo", HALOS)
@pytest.mark.parametrize("weights", [(1, 1), (5, 1, 3)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dense_exchange_is_exact(kind: str, weights: tuple[int, ...], halo: int) -> None:
    model, inputs = tiny(kind), inputs_for(kind, TOKENS, batch=2)
    single, tolerance = rounding(model, inputs)
    for prefix in (0, 2):
        outputs = ranks_output(
            model,
            Codebook("none", prefix=prefix),
            inputs,
            len(weights),
            logits="all",
            weights=weights,
            halo=halo,
        )
        for output in outputs:
            torch.testing.assert_close(output, single, rtol=0, atol=5 * tolerance)


@pytest.mark.parametrize(
    ("kind", "name", "halo"),
    [
        *(("llama", name, halo) for name in ("kv-per-head", "differential-4") for halo in HALOS),
        *(("llama", name, halo) for name in ("hidden-1", "hidden-4") for halo in (3, 9)),
        *(("gpt2", name, 9) for name in ("kv-per-head", "hidden-1", "hidden-4", "differential-4")),
    ],
)
def test_codes_equal_the_formulas(kind: str, name: str, halo: int) -> None:
    model, inputs = tiny(kind), inputs_for(kind, TOKENS, batch=2)
    check(kind, model, fitted(kind, model, **options_for(kind, name)), inputs, halo)


@pytest.mark.parametrize("halo", HALOS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transform_codes_equal_the_formulas(kind: str, halo: int) -> None:
    model, inputs = tiny(kind), inputs_for(kind, TOKENS, batch=2)
    book = book_of(model, kind, space="transform", bits=24, codewords=16, held_back=0)
    check(kind, model, book, inputs, halo)


def check(kind: str, model: Any, book: Codebook, inputs: dict[str, Any], halo: int) -> None:
    weights = (5, 1, 3)
    plan = Plan.make(
        TOKENS - book.prefix, 3, causal=True, copies=book.prefix, halo=halo, weights=weights
    )
    expected = logits_of(Simulation(model, book, plan, inputs).run())
    package = logits_of(Package(model, book, plan, inputs).run())
    torch.testing.assert_close(package, expected, rtol=2e-4, atol=2e-4)
    without = logits_of(Simulation(model, book, replace(plan, halo=0), inputs).run())
    assert float((without - expected).abs().max()) > 1e-3
    options = {"logits": "all", "weights": weights, "halo": halo}
    for output in ranks_output(model, book, inputs, 3, **options):
        torch.testing.assert_close(output, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dense_generation_equals_the_models_own(kind: str, padded: bool) -> None:
    model, inputs = tiny(kind), inputs_for(kind, TOKENS, batch=2)
    if padded:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, :4] = 0
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)

    def work(mesh: Mesh) -> torch.Tensor:
        with Engine(model, Codebook.none(), mesh, halo=5) as engine:
            return engine.generate(**inputs, max_new_tokens=5, eos_token_id=[])

    for ids in run_ranks(3, work, timeout=30):
        assert ids.tolist() == expected.tolist()


def test_what_nobody_hears_of_is_not_sent() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 32)
    book = fitted("llama", model, space="kv", groups=3)  # 15 bits

    def work(mesh: Mesh) -> tuple[float, int]:
        with Engine(model, book, mesh, weights=(1, 1), halo=8) as engine:
            engine(**inputs, logits="local")
            return engine.bits_per_token_block, mesh.stats.bytes_sent_payload

    told, payload = run_ranks(2, work)[0]
    assert (told, payload) == (15, 15 * (16 - 8) * 3 / 8)


def test_local_logits_are_the_shards_own() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", TOKENS)
    single, tolerance = rounding(model, inputs)
    options = {"logits": "local", "weights": (5, 1, 3), "halo": 4}
    outputs = ranks_output(model, Codebook.none(), inputs, 3, **options)
    found = torch.cat(outputs, 1)
    torch.testing.assert_close(found, single, rtol=0, atol=5 * tolerance)


def test_a_halo_is_worth_something_without_any_codes() -> None:
    """Of language models dropping is worst right behind a cut; a random model shows that it is
    another thing to drop all, and the control beside codes counts what the halo gives."""
    model, windows = tiny("llama"), as_windows(windows_for("llama"))
    book = fitted("llama", model, space="kv", groups=3)
    found = measure(model, book, windows, world_size=2, halo=6)
    assert found.local_overlap is not None
    assert found.local_overlap != found.local_only
    assert measure(model, book, windows, world_size=2, halo=0).local_overlap is None
    without = measure(model, book, windows, world_size=2, halo=6, overlap=False)
    assert without == replace(found, local_overlap=None)


def test_ranks_with_other_halos_refuse_each_other() -> None:
    model = tiny("llama")

    def work(mesh: Mesh) -> str:
        with pytest.raises(HandshakeRefused) as caught:
            Engine(model, None, mesh, halo=mesh.rank)
        return str(caught.value)

    assert all("halo" in said for said in run_ranks(2, work))


@pytest.mark.parametrize(("kind", "halo"), [("bert", 1), ("vit", 4), ("llama", -1)])
def test_what_cannot_be_is_refused(kind: str, halo: int) -> None:
    with pytest.raises(
        ValueError, match="halo: expected (at least 0|0 or more, and 0 for an encoder)"
    ):
        Engine(tiny(kind), None, halo=halo)


def test_the_default_is_small_beside_a_shard() -> None:
    model = tiny("llama")
    adapter, book = adapt(model), fitted("llama", model, space="kv", groups=3)
    found = [default_halo(adapter, book, tokens, 4) for tokens in (8, 64, 1024, 4096)]
    assert found == [0, 2, HALO, HALO]
    assert default_halo(adapter, book, 1024, 1) == 0
    assert default_halo(adapter, Codebook.none(), 1024, 4) == 0
    assert default_halo(adapter, Codebook.drop(), 1024, 4) == 0
    assert default_halo(adapt(tiny("bert")), book, 1024, 4) == 0
    assert engine_plan(adapter, book, 1024, 4).halo == HALO


def test_its_cost_is_counted() -> None:
    model = tiny("llama")
    adapter, drop = adapt(model), Codebook.drop()
    ideal = flops_over_ideal(adapter, drop, 512, 4, engine_plan(adapter, drop, 512, 4))
    plan = engine_plan(adapter, drop, 512, 4, halo=16)
    # three halos of 16 in 512 tokens, spread over four ranks by their shares
    assert flops_over_ideal(adapter, drop, 512, 4, plan) - ideal == pytest.approx(
        3 * 16 / 512, rel=0.3
    )
