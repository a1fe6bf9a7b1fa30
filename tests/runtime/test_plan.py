"""The cut: every token once, whatever the world size and weights; visibility by shards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from astra_runtime.plan import Plan, balanced_weights


@given(st.integers(1, 12), st.integers(0, 200), st.data())
def test_every_token_has_one_rank(world_size: int, extra: int, data: st.DataObject) -> None:
    weights = data.draw(
        st.none() | st.lists(st.floats(1e-3, 1e3), min_size=world_size, max_size=world_size)
    )
    tokens = world_size + extra
    plan = Plan.make(tokens, world_size, causal=True, shard_weights=weights)
    held = [i for n in range(world_size) for i in range(tokens)[plan.shard(n)]]
    assert held == list(range(tokens))
    assert all(plan.size(n) >= 1 for n in range(world_size))


def test_equal_shards_differ_by_at_most_one() -> None:
    plan = Plan.make(23, 5, causal=True)
    sizes = [plan.size(n) for n in range(5)]
    assert sum(sizes) == 23
    assert max(sizes) - min(sizes) <= 1


def test_weights_are_followed() -> None:
    plan = Plan.make(100, 3, causal=True, shard_weights=[1, 2, 1])
    assert [plan.size(n) for n in range(3)] == [25, 50, 25]


def test_a_decoder_sees_earlier_shards_only() -> None:
    plan = Plan.make(12, 4, causal=True)
    assert [plan.sources(n) for n in range(4)] == [(), (0,), (0, 1), (0, 1, 2)]
    assert [plan.receivers(n) for n in range(4)] == [(1, 2, 3), (2, 3), (3,), ()]
    assert plan.owner == 3


def test_an_encoder_sees_all_shards() -> None:
    plan = Plan.make(12, 3, causal=False, copies=1)
    assert [plan.sources(n) for n in range(3)] == [(1, 2), (0, 2), (0, 1)]
    assert plan.receivers(1) == (2, 0)  # the next rank first, and so on around
    assert plan.owner == 0


def test_the_older_names_still_work() -> None:
    plan = Plan.make(12, 3, causal=True, copies=1, halo=2, weights=[1, 2, 1])
    sequence = torch.arange(13)[None]
    assert (plan.told(0), plan.heard(2, 1), plan.lead(1)) == (3, 4, 3)
    assert plan.sent(1) == plan.sent_slice(1)
    for old, new in ((plan.far, plan.remote_tokens), (plan.local, plan.local_tokens)):
        assert torch.equal(old(sequence, 1), new(sequence, 1))
    local = plan.local(sequence, 1)
    assert torch.equal(plan.own(local, 1), plan.without_halo(local, 1))


def test_tags_tell_plans_and_inputs_apart() -> None:
    tags = {
        Plan.make(tokens, 3, causal=causal, shard_weights=weights).tag(inputs)
        for tokens in (12, 13)
        for causal in (True, False)
        for weights in (None, [1, 2, 1])
        for inputs in ((), (b"one",), (b"two",))
    }
    assert len(tags) == 24


@pytest.mark.parametrize("weight", [5e-324, 1.0, 1e308])
def test_only_the_proportions_of_weights_count(weight: float) -> None:
    cut = Plan.make(30, 3, causal=True, shard_weights=[weight] * 3)
    assert cut.bounds == (0, 10, 20, 30)


@pytest.mark.parametrize(
    ("tokens", "world_size", "weights", "message"),
    [
        (2, 3, None, "tokens: expected at least one for each of the 3 ranks, got 2"),
        (5, 0, None, "world_size: expected at least 1, got 0"),
        (5, 2, [1.0], "weights: expected 2 positive numbers"),
        (5, 2, [1.0, 0.0], "weights: expected 2 positive numbers"),
        (5, 2, [1.0, float("nan")], "weights: expected 2 positive numbers"),
    ],
)
def test_bad_cuts_are_refused(
    tokens: int, world_size: int, weights: list[float] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.make(tokens, world_size, causal=True, shard_weights=weights)


@pytest.mark.parametrize("halo", [0, 32])
@pytest.mark.parametrize("receive", [0.0, 1e5])
@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
@pytest.mark.parametrize("other", [0.0, 1e8])
@pytest.mark.parametrize("far", [None, 1.3e3])
def test_balanced_weights_give_equal_work(
    world_size: int, receive: float, halo: int, other: float, far: float | None
) -> None:
    beside = [other] + [0.0] * (world_size - 1)
    tokens, linear, attention, code = 4096, 1e6, 2e3, 2e5
    weights = balanced_weights(
        tokens,
        world_size,
        causal=True,
        linear=linear,
        attention=attention,
        code=code,
        far=far,
        receive=receive,
        halo=halo,
        beside=beside,
    )
    far = attention if far is None else far
    assert sum(weights) == pytest.approx(tokens, rel=1e-6)
    work, start = [], 0.0
    for n, size in enumerate(weights):
        coding = code if n < world_size - 1 else 0.0
        overlap = halo if n else 0
        computed, received = size + overlap, start - overlap
        model = computed * (linear + far * received) + attention * computed * computed / 2
        work.append(model + coding * size + receive * received + beside[n])
        start += size
    assert max(work) / min(work) == pytest.approx(1, rel=1e-6)


def test_encoders_share_equally() -> None:
    assert balanced_weights(
        100, 4, causal=False, linear=1.0, attention=1.0, code=1.0
    ) == pytest.approx([1, 1, 1, 1])
