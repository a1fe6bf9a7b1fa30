"""Several answers to one prompt: decoded by several ranks, and the same as one device's."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from astra_runtime import Codebook, Engine
from astra_runtime.errors import NotFinite
from astra_runtime.serve import kept
from astra_runtime.serve.admission import Admission
from astra_runtime.serve.costs import AnswerCosts
from astra_runtime.serve.placement import Placement
from astra_runtime.serve.prompt import Prompt
from astra_runtime.serve.sampling import sampling_to_json
from astra_runtime.serve.sequences import Sequences
from astra_runtime.serve.service import GenerationRequest, Sampling, ServiceFailed
from astra_runtime.serve.work import Work

from ..models import windows_for
from .service import Heard, alone, ask, led, prompt
from .test_faults import ask_when_ready, pair

SEEDED = Sampling(temperature=1.3, top_p=0.95, top_k=60, seed=11, presence_penalty=0.5)


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was measured, other ranks take answers."""
    monkeypatch.setattr(AnswerCosts, "sharing", lambda costs, tokens: 0.0)
    monkeypatch.setattr(AnswerCosts, "is_sooner", lambda costs, fewer, *_: fewer > 0)


@pytest.fixture(scope="module")
def one_device(llama: Any) -> dict[int, list[list[int]]]:
    """Three answers to prompts of some lengths."""
    with led(llama, 1) as leader:
        heard = {tokens: three(leader, tokens) for tokens in (12, 150)}
        return {n: [one.wait().ids(index) for index in range(3)] for n, one in heard.items()}


def three(leader: Any, tokens: int, **asked: Any) -> Heard:
    return ask(leader, prompt(tokens), 8, sampling=SEEDED, n=3, **asked)


class Paused(Heard):
    """Asks for answers, and holds up the leader where the last of them has two tokens."""

    def __init__(self, leader: Any, answers: int) -> None:
        super().__init__()
        self.last, self.reached, self.go = answers - 1, threading.Event(), threading.Event()
        request = GenerationRequest("paused", prompt(150), 100, SEEDED, n=answers)
        self.ticket = leader.submit(request, self)
        assert self.reached.wait(60)

    def __call__(self, event: Any) -> None:
        super().__call__(event)
        if not self.reached.is_set() and len(self.ids(self.last)) == 2:
            self.reached.set()
            assert self.go.wait(60)


def ranks_of(heard: Heard) -> list[int]:
    return [heard.done(index).rank for index in range(3)]


@pytest.mark.parametrize("why", ["slower", "too much to send"])
def test_they_stay_together_where_that_is_better(
    llama: Any,
    one_device: dict[int, list[list[int]]],
    spread: None,
    monkeypatch: pytest.MonkeyPatch,
    why: str,
) -> None:
    if why == "slower":
        monkeypatch.setattr(AnswerCosts, "is_sooner", lambda *_: False)
    else:
        monkeypatch.setattr(kept, "MOST_SHARED", 1000)
    with led(llama, 2) as leader:
        heard = three(leader, 150).wait()
        assert [heard.ids(index) for index in range(3)] == one_device[150]
        assert len(set(ranks_of(heard))) == 1
        short = three(leader, 12).wait()  # nothing is sent of it
        assert [short.ids(index) for index in range(3)] == one_device[12]
        assert len(set(ranks_of(short))) == (1 if why == "slower" else 2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_answers_are_those_of_one_device(
    llama: Any, one_device: dict[int, list[list[int]]], world_size: int, spread: None
) -> None:
    with led(llama, world_size) as leader:
        for tokens in (12, 150):  # read by each rank that answers, and by all together
            heard = three(leader, tokens).wait()
            assert [heard.ids(index) for index in range(3)] == one_device[tokens]
            assert len(set(ranks_of(heard))) == world_size
            assert all(heard.done(n).completion_tokens == 8 for n in range(3))
        # the conversation goes on from the first answer, on the rank that has it
        turn = [*prompt(150), *heard.ids(0), 5, 6]
        second = ask(leader, turn).wait()
        assert second.ids() == alone(llama, turn, 5)
        assert second.done().cached_tokens == 150 + 7
        assert leader.status().lost == 0


def test_with_codes_each_says_what_its_rank_knew_as_codes(
    llama: Any, one_device: dict[int, list[list[int]]], spread: None
) -> None:
    book = Codebook.fit(llama, windows_for("llama"), groups=3, codewords=16, held_back=0)
    with led(llama, 2, book) as leader:
        short = three(leader, 12).wait()  # exact on every rank
        assert [short.ids(index) for index in range(3)] == one_device[12]
        assert {short.done(index).coded_tokens for index in range(3)} == {0}
        long = three(leader, 150).wait()
        coded = {long.done(n).rank: long.done(n).coded_tokens for n in range(3)}
        assert set(coded) == {0, 1}
        assert all(40 < tokens < 110 for tokens in coded.values())
        again = three(leader, 150).wait()  # from what is kept: no rank lacks codes any more
        assert again.done().cached_tokens == 149
        assert set(ranks_of(again)) == {0, 1}
        assert leader.status().lost == 0


def test_stop_texts_and_cancelling_end_them_on_every_rank(
    llama: Any, one_device: dict[int, list[list[int]]], spread: None
) -> None:
    whole = one_device[150]
    with led(llama, 3) as leader:
        heard = three(leader, 150, stop=[f" {whole[2][4]} "]).wait()
        for index in range(3):
            expected = whole[index]
            if whole[2][4] in expected[1:]:
                expected = expected[: expected[1:].index(whole[2][4]) + 2]
            assert heard.ids(index) == expected
        long = Paused(leader, 3)
        long.ticket.cancel()
        long.go.set()
        assert len(long.wait().ids(2)) < 100
        assert [peer.running for peer in leader.status().peers] == [0, 0, 0]
        assert ask(leader, prompt(9), 6).wait().ids() == alone(llama, prompt(9), 6)


def test_a_lost_rank_ends_them_all(llama: Any, spread: None) -> None:
    with pair(llama) as (leader, other):
        heard = Paused(leader, 2)
        other.die()
        heard.go.set()
        assert isinstance(heard.wait().error(), ServiceFailed)
        assert "rank 1 was lost" in str(heard.error())
        assert ask_when_ready(leader) == alone(llama, prompt(150), 5)


def test_what_cannot_be_shared_ends_its_request_alone(
    llama: Any, spread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(engine: Any, state: Any) -> None:
        raise NotFinite(engine.rank, "its tokens hold NaN")

    with led(llama, 2) as leader:
        other = ask(leader, prompt(9), 60)
        assert other.first.wait(60)
        with monkeypatch.context() as patched:
            patched.setattr(kept, "complete", broken)
            error = three(leader, 150).wait().error()
        assert isinstance(error, ServiceFailed)
        assert "hold NaN" in str(error)
        assert other.wait().ids() == alone(llama, prompt(9), 60)
        again = ask(leader, prompt(150)).wait()
        assert (again.ids(), again.done().cached_tokens) == (alone(llama, prompt(150), 5), 0)
        assert leader.status().lost == 0


def test_a_rank_reads_a_prompt_as_long_as_an_answer_is_wanted(llama: Any) -> None:
    with Engine(llama) as engine:
        sequences = Sequences(engine)
        sequences.read_alone(Prompt(7, 1, prompt(12), [1, 0, 0], 4, [], sampling_to_json(SEEDED)))
        sequences.drop([7, 8])
        assert len(sequences) == 1
        sequences.step()
        assert [token[0] for token in sequences.report()["tokens"]] == [9]
        sequences.drop([9])
        assert len(sequences) == 0


def test_a_long_prompt_is_read_in_rounds_until_nobody_wants_its_answer(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round that lasts no time has one block of it, and a token of every answer."""
    monkeypatch.setattr("astra_runtime.serve.sequences.ROUND_SECONDS", 0.0)
    for name in ("MOST_ROWS", "MOST_ROWS_BESIDE"):
        monkeypatch.setattr(f"astra_runtime.serve.sequences.{name}", 40)
    ids, greedy = prompt(100), sampling_to_json(Sampling(temperature=0))
    passes = 3 * len(llama.model.layers)

    def rounds(dropped_in: int) -> tuple[list[list[int]], list[Any]]:
        """By round, whose tokens were drawn in it; and those of the last one."""
        drawn: list[list[int]] = []

        def go_on() -> None:
            drawn.append([token[0] for token in sequences.report()["tokens"]])
            sequences.confirm()
            if len(drawn) == dropped_in:
                sequences.drop([7])

        sequences = Sequences(engine)
        sequences.read_alone(Prompt(1, 0, prompt(9), [0], 99, [], greedy))
        sequences.step()
        sequences.read_alone(Prompt(7, 0, ids, [0], 4, [], greedy))
        sequences.run_round(True, go_on)
        return drawn, sequences.report()["tokens"]

    with Engine(llama) as engine:
        drawn, last = rounds(dropped_in=4)
        assert drawn == [[1, 1], [1], [1], [1]]
        assert [token[0] for token in last] == [1]
        drawn, last = rounds(dropped_in=99)
    assert drawn == [[1, 1], *[[1]] * (passes - 2)]
    assert [token[0] for token in last] == [1, 7]
    assert last[1][2] == alone(llama, ids, 1)[0]


def test_answers_that_waited_for_a_prompt_get_a_token_before_others_are_read(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a step with a piece of a prompt takes several times as long."""
    rounds: list[Any] = []

    def noting(real: Any) -> Any:
        def note(given: Any) -> Any:
            rounds.append(len(given) if isinstance(given, list) else "all")
            return real(given)

        return note

    with led(llama, 2) as leader:
        stream = Paused(leader, 1)
        place = lambda work: "all" if work.prompt_tokens == 160 else "one"  # noqa: E731
        monkeypatch.setattr(leader._placement, "of", place)
        for name in ("_read", "_step"):
            monkeypatch.setattr(leader, name, noting(getattr(leader, name)))
        heard = [(n, ask(leader, prompt(n), fresh=True)) for n in (160, 155, 145)]
        stream.go.set()
        for tokens, one in heard:
            assert one.wait().ids() == alone(llama, prompt(tokens), 5)
        stream.ticket.cancel()
        stream.wait()
    assert rounds[:3] == ["all", 0, 2]


def test_they_are_spread_where_steps_save_more_than_sharing_takes(llama: Any) -> None:
    with led(llama, 2) as leader:
        costs = leader.answer_costs
        assert costs.sharing(1000) is None  # nothing is known
        assert costs.is_sooner(1, 2, 10.0)
        assert not costs.is_sooner(1, 1, 0.0)  # the first token is there already
        assert not costs.is_sooner(0, 100, 0.0)
        leader.costs.token, leader.costs.exchange = 2e-3, 0.4
        assert costs.sharing(1000) == 0.4
        assert [costs.is_sooner(1, tokens, 0.4) for tokens in (200, 202)] == [False, True]
        costs.record_step(1, 0.110)
        costs.record_step(4, 0.200)  # 30 ms an answer
        assert costs.added() == pytest.approx(0.030)
        costs.record_shared(1000, 0.3)
        assert costs.sharing(500) == pytest.approx(0.15)
        assert [costs.is_sooner(2, tokens, 0.3) for tokens in (5, 7)] == [False, True]
        costs.record_answer(4)  # as short as that
        assert not costs.is_sooner(2, 100, 0.3)


@pytest.mark.parametrize(
    ("running", "full", "expected"),
    [
        ([0, 0, 0], [], [0, 0, 1, 2]),
        ([1, 0, 0], [], [0, 1, 1, 2]),
        ([0, 9, 0], [], [0, 0, 0, 0]),  # that rank's steps last as long anyway
        ([0, 1, 0], [1], [0, 0, 2, 2]),
    ],
)
def test_answers_go_to_the_ranks_with_fewest(
    running: list[int], full: list[int], expected: list[int], spread: None
) -> None:
    """A byte stands for what an answer takes."""
    admission = Admission(3, 8)
    costs: Any = None
    placement = Placement(admission, costs, AnswerCosts(costs), True)
    admission.budget = {rank: 1 if rank in full else 100 for rank in range(3)}
    for rank, count in enumerate(running):
        work = asked(count)
        work.begin(0, [rank] * count, None, 0.0)
        admission.running.append(work)
    assert placement.spread(asked(4), 1.0) == expected


def asked(answers: int) -> Work:
    request = GenerationRequest("x", [1] * 100, n=answers)
    return Work(request, 5, lambda event: None, 0.0, 1)


@pytest.mark.parametrize(("taken", "place"), [(0.0, "one"), (60.0, "later")])
def test_a_rank_waits_for_another_one_that_has_read_most_of_its_prompt(
    taken: float, place: str
) -> None:
    """Then all ranks read the next prompt together; a rank by itself needs 30 s for it."""
    costs: Any = SimpleNamespace(
        alone=lambda tokens, others: 30.0,
        apart_is_faster=lambda tokens, waiting, others, rest: rest + 16.0 > 30.0,
        together_is_faster=lambda tokens: True,
    )
    admission = Admission(2, 8)
    admission.budget = {0: 100, 1: 100}
    reading = asked(1)
    reading.begin(0, [0], None, time.monotonic() - taken)
    reading.reading = {0}
    admission.running.append(reading)
    admission.add(asked(1))
    work = admission.next()
    assert work is not None
    assert work.owner == 1
    assert Placement(admission, costs, AnswerCosts(costs), True).of(work) == place
