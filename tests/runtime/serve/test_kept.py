"""Prompts that stay with their answers: what begins like them costs the rest alone."""

from __future__ import annotations

from typing import Any

import pytest

from astra_runtime import Codebook
from astra_runtime.serve.kept import Prompts

from ..models import windows_for
from .service import alone, ask, led, prompt


def test_a_second_question_costs_its_own_tokens_alone(llama: Any) -> None:
    document = prompt(150)
    with led(llama, 2) as leader:
        first = ask(leader, [*document, 1, 2, 3]).wait()
        assert first.done().cached_tokens == 0
        for question in ([4, 5], [6], [1, 2, 9]):
            second = ask(leader, [*document, *question]).wait()
            assert second.ids() == alone(llama, [*document, *question], 5)
            assert second.done().cached_tokens >= 150
        again = ask(leader, [*document, 1, 2, 3]).wait()
        assert again.ids() == first.ids()
        assert again.done().cached_tokens == 152  # what follows the last token is not kept
        fresh = ask(leader, [*document, 1, 2, 3], fresh=True).wait()
        assert (fresh.ids(), fresh.done().cached_tokens) == (first.ids(), 0)


@pytest.mark.parametrize("coded", [False, True])
def test_prompts_that_wait_are_read_by_a_rank_each_and_kept(
    llama: Any, coded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("astra_runtime.serve.costs.PromptCosts.apart_is_faster", _if_two_wait)
    documents = [prompt(80 + n, seed=n) for n in range(5)]
    book = Codebook.fit(llama, windows_for("llama"), groups=3, codewords=16, held_back=0)
    with led(llama, 2, book if coded else None) as leader:
        with leader._changed:  # no round begins
            heard = [ask(leader, ids) for ids in documents]
        for ids, one in zip(documents, heard, strict=True):
            done = one.wait().done()
            if not done.coded_tokens:  # the last one may have been read by all
                assert one.ids() == alone(llama, ids, 5)
        assert {one.done().rank for one in heard} == {0, 1}
        assert sum(one.done().coded_tokens == 0 for one in heard) >= 3
        by_one = [n for n, one in enumerate(heard) if n and not one.done().coded_tokens]
        for ids in [documents[n] for n in by_one[:3]]:
            second = ask(leader, [*ids, 7, 8]).wait()
            assert second.done().cached_tokens == len(ids)
            if not second.done().coded_tokens:  # the rank that has the document, by itself
                assert second.ids() == alone(llama, [*ids, 7, 8], 5)
        # the other rank goes on from codes, or with dense exchange from keys and values
        ids, other = documents[by_one[0]], 1 - heard[by_one[0]].done().rank
        monkeypatch.setattr(leader._requests, "next", _owned_by(leader, other))
        third = ask(leader, [*ids, 9]).wait()
        assert (third.done().rank, third.done().cached_tokens) == (other, len(ids))
        if not coded:
            assert third.ids() == alone(llama, [*ids, 9], 5)


def _if_two_wait(costs: Any, tokens: int, waiting: int, *_: Any) -> bool:
    return waiting >= 2


def _owned_by(leader: Any, rank: int) -> Any:
    real = leader._requests.next

    def following() -> Any:
        work = real()
        if work is not None:
            work.owner = rank
        return work

    return following


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_next_turn_knows_the_answer(llama: Any, world_size: int) -> None:
    """Whoever has read the prompt: all ranks or one, and whatever has ended the answer."""
    with led(llama, world_size) as leader:
        for tokens, new, stop in ((120, 10, ()), (40, 30, ()), (100, 30, (9,))):
            first, given = prompt(tokens, seed=new + tokens), []
            expected = alone(llama, first, new)
            given = [f" {expected[n]} " for n in stop]
            answer = ask(leader, first, new, stop=given).wait().ids()
            assert answer == expected[: len(answer)]
            turn = [*first, *answer, 5, 6]
            second = ask(leader, turn, 6).wait()
            assert second.ids() == alone(llama, turn, 6)
            assert second.done().cached_tokens == len(first) + len(answer) - 1
            turn += [*second.ids(), 7]
            third = ask(leader, turn).wait()
            assert third.ids() == alone(llama, turn, 5)
            assert third.done().cached_tokens == len(turn) - 2
            other = [*turn[: tokens + 5], 9]  # goes on from the middle of the first answer
            again = ask(leader, other).wait()
            assert again.ids() == alone(llama, other, 5)
            assert again.done().cached_tokens == tokens + 5
        assert leader.status().lost == 0


def test_what_was_answered_with_codes_is_known_to_all_ranks(llama: Any) -> None:
    book = Codebook.fit(llama, windows_for("llama"), groups=3, codewords=16, held_back=0)
    with led(llama, 2, book) as leader:
        turn = prompt(120)
        for _ in range(3):
            heard = [ask(leader, turn, 12), ask(leader, turn, 12)]
            answers = [one.wait() for one in heard]
            assert all(one.error() is None for one in answers)
            turn = [*turn, *answers[0].ids(), 3, 4]
        assert answers[0].done().cached_tokens >= 120 + 11
        long = [*turn, *prompt(70, seed=4)]  # all ranks read it, and need the codes
        assert ask(leader, long).wait().done().cached_tokens >= len(turn) - 3
        assert leader.status().lost == 0


def test_a_prompt_that_is_forgotten_is_not_kept_first() -> None:
    """Where both would be said in one job."""
    prompts = Prompts(150)
    assert prompts.add_alone(1000, [1] * 100, 0) == []
    assert prompts.changes() == {"keep": [(1000, 0, [1] * 100)], "grow": [], "forget": []}
    prompts.forget(1001)  # its owner has read it, and then answered: it is kept after all
    assert prompts.add_alone(1001, [2] * 100, 0) == [1000]
    assert prompts.changes() == {"keep": [(1001, 0, [2] * 100)], "grow": [], "forget": [1000]}
    assert prompts.add_alone(1002, [3] * 150, 1) == [1001]
    assert prompts.add(1003, [4] * 150, 1) == [1002]
    assert prompts.changes() == {"keep": [], "grow": [], "forget": [1001, 1002]}
    assert prompts.changes() == {"keep": [], "grow": [], "forget": []}


def test_a_kept_prompt_that_outgrows_the_room_is_forgotten() -> None:
    prompts = Prompts(100)
    prompts.add(1, [1] * 40, 0)
    prompts.add(2, [2] * 40, 1)
    assert prompts.extend(1, [3] * 10) == []
    assert prompts.find([*[1] * 40, *[3] * 20]) == (1, 50, 0)
    assert prompts.extend(1, [3] * 30) == [2]
    assert prompts.extend(2, [3]) is None
    assert prompts.extend(1, [3] * 30) == [1]
    assert prompts.find([1] * 40) is None


def test_kept_prompts_are_forgotten_in_turn() -> None:
    prompts = Prompts(100)
    assert prompts.add(1, [1] * 40, 0) == []
    assert prompts.add(2, [2] * 40, 1) == []
    assert prompts.find([1] * 30) == (1, 29, 0)
    assert prompts.add(3, [3] * 40, 0) == [2]  # the longest unused
    assert prompts.find([2] * 40) is None
    assert prompts.find([1] * 10 + [5] * 40) is None  # too little in common
    assert prompts.add(4, [4] * 101, 0) == [1, 3, 4]


def test_a_broken_prompt_is_kept_by_nobody(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank ends the call at a block that the other may have behind it."""
    ids = prompt(160)
    with led(llama, 2) as leader:
        monkeypatch.setattr(leader.costs, "pauses", lambda *_: [])
        real = leader._read_prompt

        def read(work: Any, *rest: Any) -> Any:
            work.cancelled = True
            return real(work, *rest)

        monkeypatch.setattr(leader, "_read_prompt", read)
        assert ask(leader, ids).wait().ids() == []
        monkeypatch.setattr(leader, "_read_prompt", real)
        heard = ask(leader, [*ids, 5]).wait()
        assert heard.ids() == alone(llama, [*ids, 5], 5)
        assert heard.done().cached_tokens == 0
        assert ask(leader, [*ids, 7]).wait().done().cached_tokens == 160
        assert leader.status().rejoined == 0
