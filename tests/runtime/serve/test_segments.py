"""Where ranks pause in a prompt that they read together, and who reads how much of it."""

from __future__ import annotations

from itertools import combinations, pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from astra_runtime import costs
from astra_runtime.costs import engine_plan, rank_flops
from astra_runtime.models import adapt
from astra_runtime.serve import segments
from astra_runtime.serve.admission import Admission
from astra_runtime.serve.costs import AnswerCosts
from astra_runtime.serve.placement import Placement
from astra_runtime.serve.segments import Course, Segments
from astra_runtime.sessions.cut import cut
from bench import codebooks

from ..models import tiny
from .service import alone, ask, led, prompt
from .test_costs import costs_of

BLOCKS = 30


def waits(
    blocks: int,
    seconds: float,
    steps: tuple[float, ...],
    pauses: list[int],
    beside: list[float],
    ends: tuple[float, float] = (0.0, 0.0),
) -> list[float]:
    """What each segment takes with the step behind it, of a prompt that takes `seconds`."""
    inner = seconds * (1 - sum(ends)) + sum(beside) / len(beside)
    of_ranks = [(inner - less) / blocks for less in beside]
    cuts = [0, *pauses, blocks]
    found = [
        max((stop - start) * one + step for one, step in zip(of_ranks, steps, strict=True))
        for start, stop in pairwise(cuts)
    ]
    found[-1] = (cuts[-1] - cuts[-2]) * max(of_ranks) + ends[1] * seconds + max(steps)
    found[0] += ends[0] * seconds
    return found


@pytest.mark.parametrize("ends", [(0.0, 0.0), (0.05, 0.12)])
@pytest.mark.parametrize("steps", [(0.1, 0.1), (0.1, 0.0), (0.2, 0.1, 0.0), (0.1,)])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_segments_take_equally_long(
    ends: tuple[float, float], steps: tuple[float, ...], count: int
) -> None:
    """Within a block: a first one that begins late and a last one that ends late have fewer."""
    some = Segments(BLOCKS, 1.5, steps, *ends)
    pauses, longest = some.cut(count)
    assert len(pauses) == count - 1
    assert pauses == sorted({*pauses} - {0, BLOCKS})
    beside = some.beside(count - 1)
    found = waits(BLOCKS, 1.5, steps, pauses, beside, ends)
    assert max(found) <= longest + 1e-4
    block = (1.5 + max(beside)) / BLOCKS
    assert max(found[:-1], default=0.0) - min(found[:-1], default=0.0) <= 2 * block
    equal = [BLOCKS * n // count for n in range(1, count)]
    assert longest <= max(waits(BLOCKS, 1.5, steps, equal, beside, ends)) + 1e-4


@pytest.mark.parametrize("ends", [(0.0, 0.0), (0.2, 0.1)])
@pytest.mark.parametrize("steps", [(0.1, 0.1), (0.3, 0.0)])
def test_no_cut_has_a_shorter_longest_segment(
    ends: tuple[float, float], steps: tuple[float, ...]
) -> None:
    some = Segments(9, 1.5, steps, *ends)
    beside = some.beside(3)
    tried = [
        max(waits(9, 1.5, steps, list(pauses), beside, ends))
        for pauses in combinations(range(1, 9), 3)
    ]
    pauses, longest = some.cut(4)
    assert longest == pytest.approx(min(tried), abs=1e-4)
    assert max(waits(9, 1.5, steps, pauses, beside, ends)) == pytest.approx(longest, abs=1e-4)


def test_a_segment_a_block_at_most() -> None:
    assert Segments(5, 1.0, (0.1, 0.1), 0.2, 0.2).cut(5)[0] == [1, 2, 3, 4]
    assert Segments(1, 1.0, (0.1,)).cut(1) == ([], pytest.approx(1.1, abs=1e-4))


@pytest.mark.parametrize(
    ("steps", "beside"),
    [
        ((0.1, 0.0), [0.4, 0.0]),
        ((0.1, 0.1), [0.0, 0.0]),
        ((0.3, 0.1), [0.8, 0.0]),
        ((0.0, 0.1), [0.0, 0.0]),  # it waits for what the first one sends
        ((0.2, 0.0, 0.1), [0.8, 0.0, 0.0]),
        ((0.2, 0.1, 0.3), [0.4, 0.0, 0.0]),
        ((9.0, 0.0), [1.5, 0.0]),  # never more than a prompt
    ],
)
def test_who_decodes_more_reads_less(steps: tuple[float, ...], beside: list[float]) -> None:
    assert Segments(BLOCKS, 1.5, steps).beside(4) == pytest.approx(beside)


def test_the_time_of_a_course(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(segments, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    course = Course(4, [2], [3, 0])
    assert not course.is_even
    course.begin()
    now[0] += 0.5
    for block in range(4):
        with course.pausing(block):
            now[0] += 10.0 if block == 2 else 0.0
        now[0] += 1.0
    now[0] += 0.7
    course.stop()
    assert (course.seconds, course.paused) == (pytest.approx(5.2), pytest.approx(10.0))
    assert course.ends() == pytest.approx((0.5 / 5.2, 0.7 / 5.2))


@pytest.mark.parametrize("owner", [0, 1, 2])
def test_a_cut_beside_other_work_gives_equal_work(
    owner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank that does something else reads so much less, wherever it stands in the sequence."""
    monkeypatch.setattr(costs, "CODING_PACE", 1.0)  # FLOPs are counted below
    model = tiny("llama")
    adapter = adapt(model)
    book = codebooks.random_codebook("kv:1", adapter)
    engine: Any = SimpleNamespace(
        adapter=adapter,
        codebook=book,
        mesh=SimpleNamespace(world_size=3),
        shard_weights=None,
        halo=0,
        paces=costs.Paces(),
    )
    tokens, busy = 3000, (owner + 1) % 3
    beside = [300.0 * (rank == busy) for rank in range(3)]
    found = cut(engine, 0, tokens, owner, beside)
    assert found.members[0] == busy
    linear, attention = adapter.block_flops()
    other = len(adapter.blocks) * 300 * (linear + attention * tokens / 2)
    flops = rank_flops(adapter, book, found.plan)
    flops[0] += other
    assert max(flops) / min(flops) == pytest.approx(1, abs=0.02)
    engine.shard_weights = (1.0, 1.0, 1.0)  # what the user says counts
    assert cut(engine, 0, tokens, owner, beside).plan.bounds == (0, 1000, 2000, 3000)
    assert engine_plan(adapter, book, tokens, 3).size(0) > found.plan.size(0)


@pytest.mark.parametrize("may", [False, True])
def test_shares_that_cannot_be_chosen_have_more_pauses(may: bool) -> None:
    """Every rank waits for the one that decodes, in each."""
    costs = costs_of(2)
    costs.token, costs.exchange = 2.7e-3, 0.1
    answers = AnswerCosts(costs)
    answers.record_step(1, 0.2)
    place = Placement(Admission(2, 1), costs, answers, True, uneven=may)
    decoder: Any = SimpleNamespace(rank=1)
    work: Any = SimpleNamespace(new_tokens=1024, owner=0, base=None)
    course = place.course(work, [decoder], 5.0)
    assert course.pauses == costs.pauses(1024, (0.2, 0.0) if may else (0.2, 0.2))
    assert course.is_even != may
    if may:
        assert course.beside == [0, costs.beside(1024, (0.2, 0.0), len(course.pauses))[0]]
    assert place.course(work, [], 5.0).pauses == costs.checks(1024, 5.0)


def test_answers_of_unequal_shares_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    llama, first, second = tiny("llama"), prompt(8), prompt(160)
    with led(llama, 2) as leader:
        monkeypatch.setattr(leader.costs, "pauses", lambda *_: [1, 2])
        monkeypatch.setattr(leader.costs, "beside", lambda *_: [60, 0])
        monkeypatch.setattr(leader.answer_costs, "step", lambda answers: 0.1 * answers)
        plans = []
        real = leader._sequences.read_together

        def read_together(*given: Any) -> Any:
            plans.append(given[-1])
            return real(*given)

        monkeypatch.setattr(leader._sequences, "read_together", read_together)
        stream = ask(leader, first, 60, held=True)
        assert stream.first.wait(60)
        heard = ask(leader, second)
        stream.resume.set()
        assert heard.wait().ids() == alone(llama, second, 5)
        assert stream.wait().ids() == alone(llama, first, 60)
        decoder = stream.done().rank
        assert plans == [[60 * (rank == decoder) for rank in range(2)]]
        assert heard.done().rank != decoder
        assert leader._sequences.kept._sessions  # on both ranks, and so cut alike
        again = ask(leader, [*second, 5]).wait()
        assert again.ids() == alone(llama, [*second, 5], 5)
        assert leader.status().lost == 0
