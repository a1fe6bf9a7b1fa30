"""What is learned of prompts' costs, and what is decided by it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from astra_runtime.plan import Plan
from astra_runtime.serve.costs import LEAST_SEGMENT, ROUND_SECONDS, PromptCosts
from astra_runtime.serve.segments import Segments

BLOCKS = 30


def costs_of(ranks: int, blocks: int = BLOCKS) -> PromptCosts:
    engine: Any = SimpleNamespace(
        adapter=SimpleNamespace(blocks=[None] * blocks),
        mesh=SimpleNamespace(world_size=ranks),
        plan=lambda tokens: Plan.make(tokens, ranks, causal=True),
    )
    return PromptCosts(engine)


def test_as_few_pauses_as_keep_a_round() -> None:
    costs = costs_of(2)
    assert costs.pauses(1024) == list(range(1, BLOCKS))  # nothing is known
    assert costs.beside(1024, (0.1, 0.0), 4) == [0, 0]
    costs.token, costs.exchange = 2.7e-3, 0.1
    seconds = costs.together(1024)
    for steps in ((0.1, 0.1), (0.1, 0.0), (0.2, 0.0)):
        pauses = costs.pauses(1024, steps)
        some = Segments(BLOCKS, seconds, steps)
        assert some.cut(len(pauses) + 1)[1] <= ROUND_SECONDS < some.cut(len(pauses))[1]
    assert len(costs.pauses(1024, (0.2, 0.0))) < len(costs.pauses(1024, (0.2, 0.2)))
    assert costs.beside(1024, (0.1, 0.0), 4) == [round(0.4 / 2.7e-3), 0]
    # steps that alone take longer than a round: a prompt comes forward all the same
    assert len(costs.pauses(1024, (9.0, 9.0))) == int(seconds / LEAST_SEGMENT)
    costs.record_ends(0.0, 0.2)  # a late end: the last segment is shorter
    pauses = costs.pauses(1024, (0.1, 0.1))
    assert BLOCKS - pauses[-1] < pauses[0]


def test_costs_of_unequal_shares() -> None:
    costs = costs_of(2)
    costs.record_together(1000, 1.6, 1.5)
    assert (costs.token, costs.exchange) == (pytest.approx(3e-3), pytest.approx(0.1))
    costs.record_uneven(1000, 2.4, [200, 0])  # the busiest rank has read 600
    assert (costs.token, costs.exchange) == (pytest.approx(3.3e-3), pytest.approx(0.1))
    costs.record_ends(-1.0, 9.0)
    assert (costs.begin, costs.end) == (0.0, 0.25)


def test_prompts_are_read_apart_where_that_is_sooner() -> None:
    costs = costs_of(2, blocks=3)
    assert not costs.apart_is_faster(1000, 8)  # nothing is known
    costs.record_by_one(10, 0.2)  # a short prompt, whose tokens cost more
    assert (costs.token, costs.by_one) == (0.02, None)
    costs.token, costs.exchange = 3e-3, 0.1  # 1.6 s together, 3 s apart
    apart = {waiting: costs.apart_is_faster(1000, waiting) for waiting in (1, 2, 3, 16)}
    assert apart == {1: False, 2: False, 3: True, 16: True}
    assert [costs.apart_is_faster(1000, 2, False, rest) for rest in (1.0, 2.0)] == [False, True]
    costs.exchange = 1.0  # 2.5 s together
    assert [costs.apart_is_faster(1000, waiting) for waiting in (1, 2)] == [False, True]
    costs.exchange = 0.1
    costs.record_by_one(1000, 4.0)
    assert not costs.apart_is_faster(1000, 3)  # 4 s, and 1.6 s together
    costs.record_pause(0.25)
    assert len(costs.pauses(1000)) == 2  # of three blocks
    assert costs.alone(1000, True) == pytest.approx(4.0 + 26 * 0.25)  # every 0.4 s
    assert not costs.apart_is_faster(1000, 3, True)  # 2.1 s together
    costs.record_together(1000, 1.6)
    assert costs.alone(1000) == pytest.approx(3.97)  # it would be tried again some day
