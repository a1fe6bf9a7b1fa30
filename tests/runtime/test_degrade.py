"""Answers without the ranks that come too late: exact as far as they go, flagged, and over."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from astra_runtime import Codebook, Engine, errors
from astra_runtime.cli.report import without
from astra_runtime.deploy.jobs import Ranks
from astra_runtime.transport import Mesh, local_mesh

from .degraded import (
    DEADLINE,
    Clock,
    Late,
    SlowMesh,
    book_for,
    clear_inputs,
    degraded_ranks,
    simulated,
)
from .models import fitted, inputs_for, tiny
from .outputs import logits_of
from .ranks import as_ranks

DECODER_CASES: list[Late] = [
    {(1, 1): (2,)},
    {(0, 1): (1, 2)},
    {(0, 1): (1, 2), (1, 2): (2,)},
    {(1, 1): (2,), (1, 2): (2,)},
]


@pytest.mark.parametrize(
    ("name", "late"),
    [
        *((name, late) for name in ("kv", "differential", "transform") for late in DECODER_CASES),
        *((name, DECODER_CASES[2]) for name in ("hidden-1", "hidden-4", "dense")),
    ],
)
def test_a_decoder_equals_the_simulation_of_what_came(name: str, late: Late) -> None:
    model = tiny("llama")
    book = book_for("llama", name, model)
    inputs = clear_inputs(name, (5, 1, 3))

    def work(engine: Engine) -> Any:
        output = engine(**inputs)
        return output.logits[:, -1], output.degraded, output.missing, engine.missing

    missing: dict[int, list[int]] = {}
    for sender, block in late:
        missing.setdefault(sender, []).append(block)
    wanted = simulated(model, book, inputs, late, weights=(5, 1, 3))[:, -1]
    whole = simulated(model, book, inputs, {}, weights=(5, 1, 3))[:, -1]
    assert float((wanted - whole).abs().max()) > 1e-3
    for logits, flagged, told, kept in degraded_ranks(
        model, book, 3, late, work, weights=(5, 1, 3)
    ):
        torch.testing.assert_close(logits, wanted, rtol=2e-4, atol=2e-4)
        assert flagged
        assert told == kept == missing


@pytest.mark.parametrize(
    ("kind", "late"),
    [
        ("llama", {(0, 1): (1, 2)}),
        ("llama", {(0, block): (1, 2) for block in (1, 2)}),
        ("bert", {(2, block): (0, 1) for block in (1, 2)}),
    ],
)
def test_predictive_codes_that_are_late_are_attended_to_as_predicted(kind: str, late: Late) -> None:
    """Also where nobody's came in a block, as on rank 1 of the decoder; padding stays unseen."""
    model, inputs = tiny(kind), inputs_for(kind, 23, batch=2)
    book, weights = book_for(kind, "transform", model), (5, 1, 3)
    if kind == "llama":
        inputs = clear_inputs("transform", weights)
    else:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, 18:] = 0
    answer = 0 if kind == "bert" else -1

    def work(engine: Engine) -> Any:
        return logits_of(engine(**inputs))[:, answer], engine.missing

    wanted, left_out = (
        simulated(model, book, inputs, late, weights=weights, after_loss=after_loss)[:, answer]
        for after_loss in ("predicted", "stale")
    )
    assert float((wanted - left_out).abs().max()) > 1e-3
    ((sender, _), *_) = late
    for logits, missing in degraded_ranks(model, book, 3, late, work, weights=weights):
        torch.testing.assert_close(logits, wanted, rtol=2e-4, atol=2e-4)
        assert missing == {sender: [1, 2][: len(late)]}


@pytest.mark.parametrize("late", [{(2, 1): (0, 1)}, {(1, 0): (0, 2), (2, 2): (0, 1)}])
@pytest.mark.parametrize(
    ("kind", "name"), [("vit", "kv"), ("bert", "kv"), ("bert", "differential")]
)
def test_an_encoder_equals_the_simulation_of_what_came(kind: str, name: str, late: Late) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 23)
    book = book_for(kind, name, model)
    if name == "differential" and (1, 0) in late:
        pytest.skip("block 0 sends nothing")

    def work(engine: Engine) -> Any:
        output = engine(**inputs)
        return logits_of(output)[:, 0] if kind == "bert" else logits_of(output), engine.missing

    whole = simulated(model, book, inputs, late, weights=(1, 1, 1))
    wanted = whole[:, 0] if kind == "bert" else whole
    missing = {sender: [block] for sender, block in late}
    for logits, found in degraded_ranks(model, book, 3, late, work, weights=(1, 1, 1)):
        torch.testing.assert_close(logits, wanted, rtol=2e-4, atol=2e-4)
        assert found == missing


@pytest.mark.parametrize("maker", ["tcp", "tls", "paced"])
def test_nothing_late_changes_no_bit(maker: str) -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 23)
    book = fitted("llama", model, space="kv", groups=6)

    def work(engine: Engine) -> Any:
        output = engine(**inputs)
        return output.logits, output.degraded, output.missing, engine.bits_per_token_block

    plain = degraded_ranks(
        model, book, 3, {}, work, weights=(1, 1, 1), maker=maker, on_missing="raise"
    )
    found = degraded_ranks(model, book, 3, {}, work, weights=(1, 1, 1), maker=maker)
    for (logits, flagged, missing, bits), (wanted, _, _, fewer) in zip(found, plain, strict=True):
        assert torch.equal(logits, wanted)
        assert not flagged
        assert missing == {}
        # 16 of 23 tokens are told of, by two ranks: a byte each, in each block
        assert bits == pytest.approx(fewer + 8 * 2 / 16, rel=0.05)


def test_who_influenced_the_answer_is_told() -> None:
    """Rank 1 leaves rank 0 out; the owner, which has heard both, knows."""
    model, inputs = tiny("llama"), inputs_for("llama", 23)
    book = fitted("llama", model, space="kv", groups=6)

    def work(engine: Engine) -> Any:
        if engine.rank == 2:
            engine.deadline_ms = 20_000  # it would wait
        output = engine(**inputs)
        return output.logits[:, -1], output.missing

    late: Late = {(0, 1): (1,)}
    wanted = simulated(model, book, inputs, late, weights=(1, 1, 1))[:, -1]
    for logits, missing in degraded_ranks(model, book, 3, late, work, weights=(1, 1, 1)):
        torch.testing.assert_close(logits, wanted, rtol=2e-4, atol=2e-4)
        assert missing == {0: [1]}


@pytest.mark.parametrize("name", ["kv", "transform"])
def test_a_late_rank_is_back_and_the_next_call_is_undisturbed(name: str) -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 23)
    book = book_for("llama", name, model)

    def work(engine: Engine) -> Any:
        outputs = []
        for _ in range(3):
            output = engine(**inputs)
            outputs.append((output.logits, output.degraded))
            engine.mesh.late = {}  # type: ignore[attr-defined]
        return outputs

    late: Late = {(0, 2): (1, 2), (1, 1): (2,)}  # rank 1's last frame is owed when the call ends
    clean = degraded_ranks(model, book, 3, {}, work, weights=(1, 1, 1))[2]
    for outputs in degraded_ranks(model, book, 3, late, work, weights=(1, 1, 1)):
        assert [flagged for _, flagged in outputs] == [True, False, False]
        assert not torch.equal(outputs[0][0], clean[0][0])
        assert torch.equal(outputs[1][0], clean[1][0])
        assert torch.equal(outputs[2][0], clean[2][0])


def test_generation_goes_on_without_what_was_missing() -> None:
    """Decoding attends to what the prefill kept, block by block."""
    model, inputs = tiny("llama"), inputs_for("llama", 18)
    book = fitted("llama", model, space="kv", groups=6)
    late: Late = {(0, 1): (1, 2)}

    def work(engine: Engine) -> Any:
        ids = engine.generate(inputs["input_ids"], max_new_tokens=4)
        return ids, engine.degraded, engine.missing

    found = degraded_ranks(model, book, 3, late, work, weights=(6, 6, 6))
    ids = found[2][0]
    for tokens, flagged, missing in found:
        assert torch.equal(tokens, ids)
        assert (flagged, missing) == (True, {0: [1]})
    # what a fresh pass over all but the last token says, with the same frames missing
    again = simulated(model, book, {"input_ids": ids[:, :-1]}, late, weights=(6, 6, 9))
    assert torch.equal(again[:, -1].argmax(-1), ids[:, -1])
    clean = degraded_ranks(model, book, 3, {}, work, weights=(6, 6, 6))[0]
    assert clean[1:] == (False, {})


@pytest.mark.parametrize(("kind", "owner"), [("llama", 1), ("bert", 0)])
def test_the_owner_cannot_be_left_out(kind: str, owner: int) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 12)
    stopped = threading.Event()

    def work(mesh: Mesh) -> Any:
        mesh.timeout = 0.5
        options: dict[str, Any] = {"on_missing": "degrade", "deadline_ms": 100.0}
        with Engine(model, None, mesh, **options) as engine:
            if mesh.rank == owner:
                stopped.wait(60)
                return None
            with pytest.raises(errors.DeadlineExceeded) as caught:
                engine(**inputs)
            ended = not stopped.is_set()  # it was not the owner that came
            stopped.set()
            return caught.value.rank, caught.value.seconds, ended

    rank, seconds, ended = as_ranks(local_mesh(2), work)[1 - owner]
    assert (rank, ended) == (owner, True)
    assert seconds < 1.5


def test_everybody_is_needed_for_all_logits() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 12)
    done = threading.Event()

    def work(mesh: Mesh) -> Any:
        options: dict[str, Any] = {"on_missing": "degrade", "deadline_ms": 100.0}
        with Engine(model, None, mesh, **options) as engine:
            if mesh.rank == 0:
                done.wait(60)
                return None
            try:
                with pytest.raises(errors.DeadlineExceeded, match="rank 0 sent nothing"):
                    engine(**inputs, logits="all")
            finally:
                done.set()

    as_ranks(local_mesh(2), work)


def test_a_lost_rank_is_left_out_for_good() -> None:
    """Its frames that came are used; then it costs no waiting any more."""
    model, inputs = tiny("llama"), inputs_for("llama", 23)
    left = threading.Event()

    def work(mesh: Mesh) -> Any:
        options: dict[str, Any] = {"on_missing": "degrade", "deadline_ms": 60_000.0}
        engine = Engine(model, None, mesh, weights=(1, 1, 1), **options)
        if mesh.rank == 0:
            engine(**inputs)
            mesh.abort(RuntimeError("power"))
            left.set()
            return None
        assert not engine(**inputs).degraded
        left.wait(60)
        start = time.monotonic()
        found = []
        for _ in range(2):
            output = engine(**inputs)
            found.append((output.missing, output.logits))
        assert time.monotonic() - start < 30
        assert "power" in str(mesh.lost[0])
        ids = engine.generate(inputs["input_ids"], max_new_tokens=2)
        assert engine.missing == {0: [0, 1, 2]}
        engine.close()
        return found, ids

    _, (one, ids), (two, others) = as_ranks(local_mesh(3), work)
    late: Late = {(0, block): (1, 2) for block in range(3)}
    wanted = simulated(model, Codebook.none(), inputs, late, weights=(1, 1, 1))[:, -1:]
    for missing, logits in one + two:
        assert missing == {0: [0, 1, 2]}
        torch.testing.assert_close(logits, wanted, rtol=2e-4, atol=2e-4)
    assert torch.equal(ids, others)


def test_a_class_token_that_is_late_is_not_in_the_mean() -> None:
    model, inputs = tiny("vit"), inputs_for("vit")
    clock = Clock()
    head = 0xFF00

    def work(mesh: Mesh) -> Any:
        slow: Any = SlowMesh(mesh, {(2, head): (0,)}, clock)
        options: dict[str, Any] = {"on_missing": "degrade", "deadline_ms": DEADLINE}
        with Engine(model, Codebook.drop(), slow, **options) as engine:
            output, again = (engine(**inputs, outputs="one") for _ in range(2))
            if mesh.rank:
                return None
            assert output.missing == {2: [3]}
            assert not again.degraded
            return output.logits

    def alone(mesh: Mesh) -> Any:
        with Engine(model, Codebook.drop(), mesh) as engine:
            return engine(**inputs, logits="local").logits

    found = as_ranks(local_mesh(3), work)[0]
    own = as_ranks(local_mesh(3), alone)  # the head is linear: of a mean, the mean
    torch.testing.assert_close(found, (own[0] + own[1]) / 2, rtol=1e-4, atol=1e-5)
    assert float((found - (own[0] + own[1] + own[2]) / 3).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_missing": "ignore"}, "on_missing: expected 'raise' or 'degrade', got 'ignore'"),
        ({"on_missing": "degrade"}, "deadline_ms: expected a number with on_missing='degrade'"),
        ({"deadline_ms": 0}, "deadline_ms: expected above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Engine(tiny("llama"), None, **options)


def test_ranks_have_to_agree_on_deadlines() -> None:
    def work(mesh: Mesh) -> str:
        with pytest.raises(errors.HandshakeRefused) as refused:
            Engine(tiny("llama"), None, mesh, deadline_ms=100.0 + mesh.rank)
        return str(refused.value)

    for words in as_ranks(local_mesh(2), work):
        assert "deadline_ms 10" in words


def test_a_job_tells_what_is_missing() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 23)
    clock = Clock()

    def work(mesh: Mesh) -> Any:
        slow: Any = SlowMesh(mesh, {(1, 1): (2,)}, clock)
        ranks = Ranks(
            model, Codebook.none(), slow, None, [1, 1, 1], None, "degrade", deadline_ms=DEADLINE
        )
        if mesh.rank:
            return ranks.worker_loop(20)
        ids = inputs["input_ids"].tolist()
        job = {"do": "generate", "input_ids": ids, "space": "codes", "max_new_tokens": 3}
        found = [ranks.submit(**job), ranks.submit(**job)]
        ranks.submit(do="stop")
        return found

    (first, second), *jobs = as_ranks(local_mesh(3), work)
    assert (first["degraded"], first["missing"]) == (True, {1: [1]})
    assert (second["degraded"], second["missing"]) == (False, {})
    assert jobs == [2, 2]


def test_people_are_told_what_is_missing() -> None:
    assert without({2: [3]}) == "rank 2 in block 3"
    assert (
        without({0: [0, 1, 2, 5], 3: [7, 8]})
        == "rank 0 in blocks 0 to 2, 5; rank 3 in blocks 7 to 8"
    )
