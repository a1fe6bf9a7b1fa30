"""How long answers wait, and how soon requests are served, on a clock that is made up."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from astra_runtime.serve.costs import PromptCosts
from astra_runtime.serve.service import NotReady

from ..models import tiny
from .service import alone, ask, led, prompt
from .simulated import Client, World

MOST_WAIT = 0.5  # seconds


def served(world: World, clients: int = 8) -> tuple[float, float]:
    """Seconds for so many prompts of 1,024 tokens, asked at once, and the longest wait for a token
    of their answers of 16."""
    start = world.now
    some = [Client(world, 1024, 16) for _ in range(clients)]
    world.leader.run(lambda: all(client.is_over for client in some))
    return world.now - start, max(client.longest_wait for client in some)


def test_eight_chats_on_two_ranks_beside_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {}
    for ranks in (1, 2):
        world = World(ranks, monkeypatch)
        served(world, clients=2)  # costs are learned
        seconds[ranks], wait = served(world)
        world.close()
        assert wait <= MOST_WAIT
    assert seconds[1] / seconds[2] > 1.8


@pytest.mark.parametrize("streams", [1, 4])
def test_answers_beside_a_prompt(monkeypatch: pytest.MonkeyPatch, streams: int) -> None:
    """They wait for a token as long as they may, whoever reads the prompt; and it for them."""
    for ranks in (1, 2, 3):
        world = World(ranks, monkeypatch)
        first = []
        for count in (0, streams):
            some = [Client(world, 1024, 60) for _ in range(count)]
            world.leader.run(lambda some=some: all(len(one.times) > 4 for one in some))
            prompt = Client(world, 1024, 1)
            world.leader.run(lambda prompt=prompt: prompt.is_over)
            first.append(prompt.first)
            world.leader.run(lambda some=some: all(one.is_over for one in some))
        assert max(one.longest_wait for one in some) <= MOST_WAIT
        # of several ranks, those that decode nothing read more of the prompt
        most = 2.4 if streams > 1 else 1.4 if ranks > 1 else 1.6
        assert first[1] / first[0] < most
        world.close()


def test_a_short_prompt_is_read_beside_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1, monkeypatch)
    long, short = Client(world, 4096, 1), Client(world, 20, 5)
    world.leader.run(lambda: long.is_over and short.is_over)
    world.close()
    assert short.first < 0.7
    assert short.longest_wait <= MOST_WAIT
    assert long.first > 10
    assert max(map(max, world.rows)) == 1024


@pytest.fixture
def a_block_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the ranks that read prompts by themselves, which they do where two wait."""
    monkeypatch.setattr("astra_runtime.serve.sequences.ROUND_SECONDS", 0.0)
    apart = lambda costs, tokens, waiting, *_: waiting >= 2  # noqa: E731
    monkeypatch.setattr(PromptCosts, "apart_is_faster", apart)


def test_ranks_read_by_themselves_over_many_rounds(
    a_block_a_round: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With answers, short prompts and cancelled requests in between."""
    llama, prompts = tiny("llama"), [prompt(n, seed=n) for n in (140, 150, 9, 155, 12, 145)]
    with led(llama, 2) as leader:
        go_on, rounds = leader._go_on, []

        def counted() -> None:
            rounds.append(len(leader._sequences))
            if len(rounds) == 3:
                cancelled.ticket.cancel()
            go_on()

        monkeypatch.setattr(leader, "_go_on", counted)
        with leader._changed:  # no round begins
            heard = [ask(leader, ids) for ids in prompts[:2]]
            cancelled = ask(leader, prompt(160), 5, fresh=True)
            heard += [ask(leader, ids) for ids in prompts[2:]]
        for ids, one in zip(prompts, heard, strict=True):
            assert one.wait().ids() == alone(llama, ids, 5)
        assert cancelled.wait().error() is None
        assert len(rounds) > 3
        # all ranks read one together, and go on from one that a rank has read by itself
        for ids in (prompt(170), [*prompts[0], 1, 2]):
            assert ask(leader, ids).wait().ids() == alone(llama, ids, 5)
        assert (leader.status().lost, leader.status().running) == (0, 0)


@pytest.mark.parametrize("what", ["cancelled", "closed"])
def test_a_rank_stops_in_the_middle_of_a_prompt(
    a_block_a_round: None, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    llama = tiny("llama")
    with led(llama, 2) as leader:
        real, reached, go = leader._go_on, threading.Event(), threading.Event()

        def go_on() -> None:
            reached.set()
            assert go.wait(60)
            real()

        monkeypatch.setattr(leader, "_go_on", go_on)
        with leader._changed:  # no round begins
            heard: list[Any] = [ask(leader, prompt(n)) for n in (150, 160)]
        assert reached.wait(60)
        if what == "closed":
            closing = threading.Thread(target=leader.close)
            with leader._changed:
                closing.start()
                leader._changed.wait_for(lambda: leader._ended, 60)
            go.set()
            closing.join(60)
            assert not closing.is_alive()
            assert all(isinstance(one.wait().error(), NotReady) for one in heard)
            return
        for one in heard:
            one.ticket.cancel()
        after = ask(leader, prompt(170))  # read by all ranks, one of which is in the middle
        go.set()
        assert [one.wait().ids() for one in heard] == [[], []]
        assert after.wait().ids() == alone(llama, prompt(170), 5)
        assert leader.status().lost == 0
