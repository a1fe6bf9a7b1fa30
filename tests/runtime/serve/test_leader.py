"""Many requests on one mesh: exact, fair, cancelled in time, and none harms another."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from astra_runtime import Codebook, Engine
from astra_runtime.evaluate import run_ranks
from astra_runtime.serve import activity
from astra_runtime.serve.service import (
    GenerationRequest,
    NotReady,
    QueueFull,
    RequestRefused,
    Sampling,
    ServiceFailed,
    TimeIsUp,
)

from ..models import tiny, windows_for
from ..ranks import wait_for
from .service import GREEDY, Heard, alone, ask, led, prompt


@pytest.mark.parametrize(("kind", "world_size"), [("llama", 1), ("llama", 3), ("gpt2", 2)])
def test_answers_equal_one_device(kind: str, world_size: int) -> None:
    """Short prompts are read by one rank, long ones by all; they are decoded together."""
    model = tiny(kind)
    prompts = [prompt(tokens, seed) for seed, tokens in enumerate((1, 3, 40, 150, 170, 9))]
    with led(model, world_size) as leader:
        with leader._changed:  # they are all there when the first round begins
            heard = [ask(leader, ids, 6) for ids in prompts]
        for ids, answer in zip(prompts, heard, strict=True):
            assert answer.wait().ids() == alone(model, ids, 6)
        done = [answer.done() for answer in heard]
    assert {one.rank for one in done} == set(range(world_size))
    assert all(one.finish_reason == "length" and one.completion_tokens == 6 for one in done)
    assert [one.prompt_tokens for one in done] == [1, 3, 40, 150, 170, 9]


def test_every_owner_gives_what_generate_gives(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With codes: the shards are the same, whichever rank holds the last one."""
    book = Codebook.fit(llama, windows_for("llama"), groups=3, codewords=16, held_back=0)
    ids = prompt(150)

    def rank(mesh: Any) -> list[int]:
        with Engine(llama, book, mesh) as engine:
            return engine.generate(torch.tensor([ids]), max_new_tokens=6)[0, 150:].tolist()

    expected = run_ranks(2, rank)[0]
    assert expected != alone(llama, ids, 6)  # the codes matter
    with led(llama, 2, book) as leader:
        monkeypatch.setattr(leader.costs, "apart_is_faster", lambda *_: False)
        monkeypatch.setattr(leader.costs, "together_is_faster", lambda *_: True)
        monkeypatch.setattr(leader._placement, "_uneven", False)  # though others decode
        with leader._changed:  # no round begins
            answers = [ask(leader, ids, 6, fresh=True) for _ in range(3)]
        assert [answer.wait().ids() for answer in answers] == [expected] * 3
        assert {answer.done().rank for answer in answers} == {0, 1}


def test_others_get_tokens_while_a_prompt_is_read(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = prompt(8), prompt(160)
    with led(llama, 2) as leader:
        monkeypatch.setattr(leader.costs, "pauses", lambda *_: [0, 1, 2])
        with leader._changed:  # no round begins
            streams = [ask(leader, first, 30), ask(leader, first[::-1], 30, held=True)]
        for stream in streams:
            assert stream.first.wait(60)
        steps: list[int] = []
        real = leader._pause

        def pause() -> float:
            before = len(streams[0].events) + len(streams[1].events)
            busiest = real()
            steps.append(len(streams[0].events) + len(streams[1].events) - before)
            return busiest

        monkeypatch.setattr(leader, "_pause", pause)
        third = ask(leader, second)
        streams[1].resume.set()
        assert third.wait().ids() == alone(llama, second, 5)
        assert steps == [2, 2, 2]  # one token each, from another rank each
        assert streams[0].wait().ids() == alone(llama, first, 30)
        assert {stream.wait().done().rank for stream in streams} == {0, 1}


def test_the_same_seed_gives_the_same_tokens_on_every_rank(llama: Any) -> None:
    sampling = Sampling(temperature=1.5, top_p=0.9, top_k=50, seed=7)
    with led(llama, 2) as leader:
        with leader._changed:  # no round begins
            answers = [ask(leader, prompt(12), 12, sampling=sampling) for _ in range(2)]
        assert answers[0].wait().ids() == answers[1].wait().ids()
        assert {answer.done().rank for answer in answers} == {0, 1}
        two = ask(leader, prompt(12), 12, sampling=sampling, n=2).wait()
    assert two.ids(0) == answers[0].ids()
    assert two.ids(1) != two.ids(0)


def test_logprobs_stop_texts_and_end_tokens(llama: Any) -> None:
    ids = prompt(20)
    expected = alone(llama, ids, 8)
    with led(llama, 1) as leader:
        heard = ask(leader, ids, 8, stop=[f" {expected[3]} "], top_logprobs=3).wait()
        text = "".join(event.text for event in heard.events)
        assert text == " ".join(map(str, expected[:3]))
        assert heard.done().finish_reason == "stop"
        token = heard.events[0]
        logits = llama(torch.tensor([ids])).logits[0, -1].detach().log_softmax(-1)
        assert token.logprob == pytest.approx(float(logits.max()), abs=1e-5)
        assert [id for id, _ in token.top] == logits.topk(3).indices.tolist()
    with led(llama, 2, ends=[expected[2]]) as leader:
        heard = ask(leader, ids, 8).wait()
        assert heard.ids() == expected[:2]
        assert (heard.done().finish_reason, heard.done().completion_tokens) == ("stop", 3)


def test_a_cancelled_request_ends_and_others_go_on(llama: Any) -> None:
    with led(llama, 2) as leader:
        one, other = ask(leader, prompt(8), 200, held=True), ask(leader, prompt(9), 40)
        assert one.first.wait(60)
        one.ticket.cancel()
        one.resume.set()
        assert len(one.wait().ids()) < 200
        assert one.error() is None
        assert other.wait().ids() == alone(llama, prompt(9), 40)
        assert leader.status().running == 0


def test_a_prompt_that_all_ranks_read_is_cancelled_at_a_block(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with led(llama, 2) as leader:
        heard = Heard()
        request = GenerationRequest("x", prompt(160), 5, GREEDY)
        begun = leader._requests.begin

        def begin(work: Any, *rest: Any) -> None:
            begun(work, *rest)
            work.cancelled = True

        monkeypatch.setattr(leader._requests, "begin", begin)
        leader.submit(request, heard)
        assert heard.wait().events == []  # no error either
        monkeypatch.setattr(leader._requests, "begin", begun)
        assert ask(leader, prompt(160)).wait().ids() == alone(llama, prompt(160), 5)
        assert leader.status().rejoined == 0


@pytest.mark.parametrize("tokens", [8, 160])
def test_no_time_is_an_error_of_one_request(llama: Any, tokens: int) -> None:
    with led(llama, 2) as leader:
        late = ask(leader, prompt(tokens), 90, within_s=1e-6)
        assert isinstance(late.wait().error(), TimeIsUp)
        assert ask(leader, prompt(160)).wait().ids() == alone(llama, prompt(160), 5)


def test_a_receiver_that_fails_ends_its_own_request(llama: Any) -> None:
    calls = []

    def deliver(event: Any) -> None:
        calls.append(event)
        raise RuntimeError("of the host's own")

    with led(llama, 2) as leader:
        leader.submit(GenerationRequest("x", prompt(8), 200, GREEDY), deliver)
        assert ask(leader, prompt(9), 20).wait().ids() == alone(llama, prompt(9), 20)
        assert leader.status().ready
    assert 1 <= len(calls) < 100


def test_the_queue_is_bounded_and_memory_accounted_for(llama: Any) -> None:
    token_bytes = 2 * 3 * 3 * 16 * 4  # blocks, heads, channels, fp32
    with led(llama, 1, max_queue=2, memory=token_bytes * 80) as leader:
        with leader._changed:  # no round begins
            waiting = [ask(leader, prompt(10), 50), ask(leader, prompt(10), 45)]
            with pytest.raises(QueueFull, match="2 requests wait") as full:
                ask(leader, prompt(10), 50)
            assert full.value.retry_after >= 1
            with pytest.raises(RequestRefused, match="room for"):
                ask(leader, prompt(10), 100)
        for one in waiting:
            assert one.wait().error() is None
        starts = [one.done().seconds_queued for one in waiting]
        assert starts == sorted(starts)
        # who names no length gets as many tokens as there is room for
        assert len(ask(leader, prompt(10), None).wait().ids()) == 50


@pytest.mark.parametrize("owner", [0, 1])
def test_answers_that_lack_a_device_are_given_where_asked_for(
    llama: Any, owner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank that answers knows best what it had to leave out."""
    report = Engine._report

    def report_lack(engine: Engine, call: Any) -> None:
        report(engine, call)
        engine.degraded = engine.rank == owner

    monkeypatch.setattr(Engine, "_report", report_lack)
    with led(llama, 2) as leader:
        monkeypatch.setattr(leader.costs, "apart_is_faster", lambda *_: False)
        monkeypatch.setattr(leader.costs, "together_is_faster", lambda *_: True)
        # ranks answer in turn
        taken, refused = (
            [ask(leader, prompt(150), 1, fresh=True, degrade=d).wait() for _ in range(2)]
            for d in (True, False)
        )
        assert all(one.done().degraded for one in taken if one.done().rank == owner)
        assert {one.done().rank for one in taken} == {0, 1}
        problems = [str(one.error()) for one in refused if one.error() and not one.ids()]
        assert any("late or lost" in problem for problem in problems)
        assert ask(leader, prompt(9), 3, degrade=True).wait().ids() == alone(llama, prompt(9), 3)


def test_a_closed_leader_takes_nothing(llama: Any) -> None:
    with led(llama, 2) as leader:
        running = ask(leader, prompt(8), 200)
        assert running.first.wait(60)
        leader.close()
        assert isinstance(running.wait().error(), NotReady | None)
        with pytest.raises(NotReady, match="shutting down"):
            ask(leader, prompt(8))


def test_draining_lets_answers_end(llama: Any) -> None:
    with led(llama, 2) as leader:
        running = ask(leader, prompt(8), 30)
        assert running.first.wait(60)
        leader.close(drain_s=30)
        assert running.wait().ids() == alone(llama, prompt(8), 30)


def test_logits_that_are_not_finite_end_one_answer() -> None:
    model = tiny("llama", seed=5)
    with torch.no_grad():
        model.model.embed_tokens.weight[96] = float("nan")
    with led(model, 1) as leader:
        broken, sound = ask(leader, [1, 96], 5), ask(leader, [1, 2], 5)
        assert isinstance(broken.wait().error(), ServiceFailed)
        assert "not finite" in str(broken.error())
        assert len(sound.wait().ids()) == 5


def test_tokens_that_the_model_cannot_read_end_one_answer() -> None:
    """Of a head that knows more tokens than there are embeddings; and one that knows fewer."""
    model = tiny("llama", seed=5)
    model.lm_head = torch.nn.Linear(48, 120)
    with torch.no_grad():
        model.lm_head.bias[110] += 1e3
    with led(model, 1) as leader:
        five = Sampling(temperature=0, logit_bias={5: 1e5})
        broken, sound = ask(leader, [1, 9], 5), ask(leader, [1, 2], 5, sampling=five)
        assert "token 110 was drawn, and the model has embeddings of 0 to 96" in str(
            broken.wait().error()
        )
        assert sound.wait().ids() == [5] * 5
    model.lm_head = torch.nn.Linear(48, 60)
    with led(model, 1) as leader:
        asked = Sampling(temperature=0, logit_bias={80: 1.0})
        broken, sound = ask(leader, [1, 9], 5, sampling=asked), ask(leader, [1, 2], 5)
        assert "logit_bias: expected tokens that the model's head knows" in str(
            broken.wait().error()
        )
        assert len(sound.wait().ids()) == 5


def test_the_status_knows_what_the_ranks_do(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity, "WINDOW_SECONDS", 1e6)  # however long ago they answered
    with led(llama, 2, beat_seconds=0.0) as leader:
        answers = [ask(leader, prompt(150)), ask(leader, prompt(8)), ask(leader, prompt(9))]
        for answer in answers:
            answer.wait()
        wait_for(lambda: leader.status().peers[1].rtt_ms is not None)
        for peer in leader.status().peers:
            assert peer.busy is not None
            assert 0 < peer.busy <= 1
            assert peer.decode_tokens_per_s is not None
            assert peer.decode_tokens_per_s > 0
        other = leader.status().peers[1]
        assert other.bytes_sent_per_s is None or other.bytes_sent_per_s >= 0
        assert other.rtt_ms is not None
        assert other.rtt_ms > 0


def test_the_last_request_leaves_a_timeline(llama: Any) -> None:
    with led(llama, 2) as leader:
        done = ask(leader, prompt(150)).wait().done()
        spans = leader.status().timeline
    assert {span.rank for span in spans if span.name == "compute"} == {0, 1}
    assert [span.rank for span in spans if span.name == "decode"] == [done.rank]
    assert all(0 <= span.start <= span.stop <= done.seconds + 1 for span in spans)


def test_a_rank_that_is_late_is_named_as_it_is(llama: Any) -> None:
    """Where rank 0 owns a prompt, the shards are dealt from rank 1 on; ranks keep their names."""
    ids, given_up = torch.tensor([prompt(60)]), threading.Event()

    def rank(mesh: Any) -> Any:
        with Engine(llama, None, mesh, on_missing="degrade", deadline_ms=50) as engine:
            send, receive = mesh.send, mesh.receive

            def late(*frame: Any, block: int, **to: Any) -> None:
                if block == 1:
                    assert given_up.wait(60)
                send(*frame, block=block, **to)

            def impatient(*sizes: Any, block: int, **place: Any) -> Any:
                views = receive(*sizes, block=block, **place)
                if block == 1:
                    given_up.set()
                return views

            if mesh.rank == 1:
                mesh.send = late
            else:
                mesh.receive = impatient
            engine.prefill(ids, owner=0)
            return engine.missing

    missing = run_ranks(2, rank)[0]
    assert set(missing) == {1}
    assert 1 in missing[1]
