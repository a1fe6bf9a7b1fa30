"""Answers without the ranks that come too late: exact as far as they go, flagged, and over."""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from astra_runtime import Codebook, Engine, errors
from astra_runtime.cli.run import without
from astra_runtime.codes.base import TokenBits, received_mask
from astra_runtime.control import is_control
from astra_runtime.deploy.jobs import Ranks
from astra_runtime.missing import Missing
from astra_runtime.models import adapt
from astra_runtime.plan import Plan
from astra_runtime.train.simulate import Simulation
from astra_runtime.transport import Mesh, local_mesh
from astra_runtime.wire import HEADER_SIZE

from .models import inputs_for, tiny
from .ranks import MAKERS, PLAN, as_ranks
from .test_engine import fitted, logits_of
from .transport.test_tcp import frame_bytes, raw_peer

DEADLINE = 300.0  # milliseconds
Late = Mapping[tuple[int, int], Sequence[int]]  # (sender, block) -> receivers
SPACES = {
    "kv": {"space": "kv", "groups": 6},
    "hidden-1": {"space": "hidden", "groups": 1},
    "hidden-4": {"space": "hidden", "groups": 4},
    "differential": {"space": "differential", "groups": 4},
    # a seed with which no vector lies between two codewords: rounding would choose
    "transform": {"space": "transform", "bits": 60, "seed": 1},
    "dense": None,
}


class Clock:
    """Which rank has done with the frames of which block, in the order of its calls, and how many
    it has sent."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.past: set[tuple[int, int]] = set()
        self.sent: Counter[tuple[int, int]] = Counter()

    def count(self, rank: int, block: int) -> None:
        with self.changed:
            self.sent[rank, block] += 1
            self.changed.notify_all()

    def wait_for(self, rank: int, block: int, count: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.sent[rank, block] >= count, 60)

    def mark(self, rank: int, block: int) -> None:
        with self.changed:
            self.past.add((rank, block))
            self.changed.notify_all()

    def wait(self, ranks: Sequence[int], block: int) -> None:
        with self.changed:
            assert self.changed.wait_for(
                lambda: all((rank, block) in self.past for rank in ranks), 60
            )


@Mesh.register
class SlowMesh:
    """A rank that reaches some receivers only when they have given up waiting for that block; once,
    and from then on in time.

    Deadlines run once everybody else has sent, so that a busy machine makes nobody late.
    """

    def __init__(self, mesh: Mesh, late: Late, clock: Clock) -> None:
        self.mesh, self.late, self.clock = mesh, late, clock
        self.calls: Counter[tuple[int, int]] = Counter()  # of receive, by sender and block
        self.reached: set[tuple[int, int]] = set()  # receivers of this rank's blocks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mesh, name)

    def send(self, payload: Any, *, block: int, to: Sequence[int], **place: Any) -> None:
        late = [n for n in self.late.get((self.mesh.rank, block), ()) if n in to]
        late = [n for n in late if (block, n) not in self.reached]
        self.reached.update((block, n) for n in to)
        self.mesh.send(payload, block=block, to=[n for n in to if n not in late], **place)
        self.clock.count(self.mesh.rank, block)
        if late:
            self.clock.wait(late, block)
            self.mesh.send(payload, block=block, to=late, **place)

    def receive(self, sizes: Any, *, block: int, **place: Any) -> Any:
        for sender in sizes if place.get("partial") or not is_control(block) else ():
            self.calls[sender, block] += 1
            late = self.mesh.rank in self.late.get((sender, block), ())
            if self.calls[sender, block] > 1 or not late:
                self.clock.wait_for(sender, block, self.calls[sender, block])
        try:
            return self.mesh.receive(sizes, block=block, **place)
        finally:
            if sizes:
                self.clock.mark(self.mesh.rank, block)


def degraded_ranks(
    model: Any,
    book: Codebook | None,
    world_size: int,
    late: Late,
    work: Callable[[Engine], Any],
    *,
    weights: Sequence[float],
    maker: str = "tcp",
    **options: Any,
) -> list[Any]:
    """What `work` gives on every rank whose engine leaves out who is late."""
    clock = Clock()

    def run(mesh: Mesh) -> Any:
        slow: Any = SlowMesh(mesh, late, clock)
        deadline = DEADLINE if late else 60_000.0  # where nobody is late, it ends no wait
        given: dict[str, Any] = {"on_missing": "degrade", "deadline_ms": deadline, "halo": 0}
        given |= options
        with Engine(model, book, slow, weights=weights, **given) as engine:
            return work(engine)

    return as_ranks(MAKERS[maker](world_size), run)


def simulated(
    model: Any, book: Codebook, inputs: dict[str, Tensor], late: Late, **given: Any
) -> Tensor:
    adapter = adapt(model)
    copies = max(book.prefix, adapter.class_tokens)
    tokens = adapter.count(inputs)[1] - book.prefix
    weights = given.pop("weights")
    plan = Plan.make(tokens, len(weights), causal=adapter.causal, copies=copies, weights=weights)
    missed = [(to, sender, block) for (sender, block), found in late.items() for to in found]
    with torch.no_grad():
        run = Simulation(model, book, plan, inputs, missed=missed, **given)
        return logits_of(run.run())


def book_for(kind: str, name: str, model: Any) -> Codebook:
    options = SPACES[name]
    return Codebook.none() if options is None else fitted(kind, model, **options)


@functools.cache
def clear_inputs(name: str, weights: tuple[int, ...]) -> dict[str, Tensor]:
    """Inputs of which no vector lies at the border of two codewords, where rounding decides: the
    ranks and the simulation code them alike while nothing is late."""
    model = tiny("llama")
    book = book_for("llama", name, model)
    for seed in range(1, 9):
        inputs = inputs_for("llama", 23, batch=2, seed=seed)
        whole = simulated(model, book, inputs, {}, weights=weights)[:, -1]

        def work(mesh: Mesh, inputs: dict[str, Tensor] = inputs) -> Tensor:
            with Engine(model, book, mesh, weights=weights) as engine:
                return engine(**inputs).logits[:, -1]

        if torch.allclose(as_ranks(MAKERS["tcp"](3), work)[0], whole, rtol=2e-4, atol=2e-4):
            return inputs
    raise AssertionError("the ranks never agree with the simulation")


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


# --- the mesh


def test_owed_frames_are_read_checked_and_dropped() -> None:
    with raw_peer() as (mesh, peer):
        first = frame_bytes(b"12345678", 0, 0)
        peer.sendall(first[:20])  # in the middle of its payload
        found = mesh.receive({0: 8}, block=0, plan=PLAN, timeout=0.05, partial=True)
        assert found == {}
        assert mesh.receive({0: 3}, block=1, plan=PLAN, timeout=0.05, partial=True) == {}
        peer.sendall(first[20:] + frame_bytes(b"abc", 1, 1) + frame_bytes(b"now", 2, 2))
        views = mesh.receive({0: 3}, block=2, plan=PLAN, timeout=30, partial=True)
        assert bytes(views[0]) == b"now"
        peer.sendall(frame_bytes(b"next", 3, 3))
        assert bytes(mesh.receive({0: 4}, block=3, plan=PLAN)[0]) == b"next"


def test_an_owed_frame_that_is_wrong_is_an_error() -> None:
    with raw_peer() as (mesh, peer):
        mesh.receive({0: 8}, block=0, plan=PLAN, timeout=0.01, partial=True)
        peer.sendall(frame_bytes(b"123456789", 0, 0))
        with pytest.raises(errors.WireError, match="length: expected 8, got 9"):
            mesh.receive({0: 8}, block=1, plan=PLAN, timeout=30, partial=True)


def test_who_came_is_given_and_who_was_late_is_back() -> None:
    with raw_peer(world_size=3, timeout=60) as (mesh, (zero, two)):
        zero.sendall(frame_bytes(b"a", 0, 0))
        sizes, start = {0: 1, 2: 1}, time.monotonic()
        assert set(mesh.receive(sizes, block=0, plan=PLAN, timeout=0.1, partial=True)) == {0}
        assert 0.09 < time.monotonic() - start < 30
        zero.sendall(frame_bytes(b"b", 1, 1))
        both = frame_bytes(b"c", 0, 0, 2) + frame_bytes(b"d", 1, 1, 2)
        threading.Timer(0.05, two.sendall, [both]).start()
        views = mesh.receive(sizes, block=1, plan=PLAN, timeout=30, partial=True)
        assert {n: bytes(view) for n, view in views.items()} == {0: b"b", 2: b"d"}


def test_a_peer_that_left_is_found_when_its_frames_are_used_up() -> None:
    with raw_peer(world_size=3, timeout=60) as (mesh, (zero, two)):
        two.sendall(frame_bytes(b"kept", 0, 0, 2))
        two.close()
        zero.sendall(frame_bytes(b"x", 0, 0))
        assert set(mesh.receive({0: 1}, block=0, plan=PLAN, partial=True)) == {0}
        assert bytes(mesh.receive({2: 4}, block=0, plan=PLAN, partial=True)[2]) == b"kept"
        start = time.monotonic()
        assert mesh.receive({2: 4}, block=1, plan=PLAN, partial=True) == {}
        assert time.monotonic() - start < 30
        assert set(mesh.lost) == {2}
        for block in range(5):
            mesh.send(b"to nobody", block=block, plan=PLAN, to=[0, 2], partial=True)
        assert len(zero.recv(1000)) == 5 * (HEADER_SIZE + len(b"to nobody"))
        with pytest.raises(errors.PeerLost, match="rank 2"):
            mesh.receive({2: 4}, block=2, plan=PLAN)


def test_a_peer_far_behind_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astra_runtime.transport.tcp.MAX_OUTSTANDING", 3)
    with raw_peer() as (mesh, _peer):
        for block in range(4):
            assert not mesh.lost
            mesh.receive({0: 1}, block=block, plan=PLAN, timeout=0.001, partial=True)
        assert isinstance(mesh.lost[0], errors.DeadlineExceeded)


def test_a_peer_that_never_reads_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astra_runtime.transport.tcp.MAX_UNSENT", 1 << 20)
    with raw_peer(timeout=120) as (mesh, _peer):
        start = time.monotonic()
        for block in range(20):
            mesh.send(bytes(4 << 20), block=block, plan=PLAN, to=[0], partial=True)
        assert time.monotonic() - start < 60


# --- which tokens came


def test_tokens_with_a_bit_in_a_gap_are_missing() -> None:
    """20 tokens of 10 bits, 25 bytes a row: by hand, bit by bit."""
    strips = [TokenBits(0, 10, 0), TokenBits(25, 10, 1)]
    for start in range(50):
        for stop in range(start, 50):
            found = received_mask(strips, 2, 20, [(start, stop)])
            for row in range(2):
                bits = torch.zeros(400, dtype=torch.bool)
                bits[8 * start : 8 * stop] = True
                lost = bits[200 * row : 200 * (row + 1)].view(20, 10).any(1)
                assert torch.equal(found[row], ~lost), (start, stop, row)


@pytest.mark.parametrize("name", ["kv", "hidden-4", "dense", "int8"])
def test_a_token_depends_on_its_own_bits_only(name: str) -> None:
    """Zeros in the strips of other tokens change nothing of what is read of a token."""
    model, batch, tokens = tiny("llama"), 2, 7
    book = Codebook.none("int8") if name == "int8" else book_for("llama", name, model)
    space = book.make_codec(adapt(model))
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, batch, 3, tokens, 16, generator=generator)
    what = torch.randn(batch, tokens, 48, generator=generator) if space.early else (key, value)
    size = space.payload_bytes(1, batch, tokens)
    data = bytearray(size)
    space.encode(1, what, None, memoryview(data))
    from astra_runtime.codes.base import Payload

    def read(content: bytearray) -> Tensor:
        kept = space.decode(1, [Payload(memoryview(content), tokens, tokens)], batch, None)
        return (
            kept
            if isinstance(kept, Tensor)
            else torch.cat([kept.key, kept.value], 1).transpose(1, 2)
        )

    whole, strips = read(data), space.token_layout(1, batch, tokens)
    for start, stop in [(0, 1), (3, 9), (size // 2, size // 2 + 5), (size - 2, size)]:
        broken = bytearray(data)
        broken[start:stop] = bytes(stop - start)
        came = received_mask(strips, batch, tokens, [(start, stop)])
        assert not bool(came.all())
        assert bool(came.any())
        assert torch.equal(read(broken)[came], whole[came])


@Mesh.register
class Gappy:
    """A mesh like one of datagrams: some bytes of some frames did not come, and are garbage."""

    def __init__(self, mesh: Mesh, lost: Mapping[tuple[int, int], tuple[int, int]]) -> None:
        self.mesh, self.of = mesh, lost
        self.missing_ranges: dict[int, list[tuple[int, int]]] = {}
        self.lossy = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mesh, name)

    def receive(self, sizes: Any, *, block: int, **place: Any) -> Any:
        views = self.mesh.receive(sizes, block=block, **place)
        self.missing_ranges = {n: [self.of[n, block]] for n in views if (n, block) in self.of}
        for n, ((start, stop),) in self.missing_ranges.items():
            views[n][start:stop] = bytes([0xA5]) * (stop - start)
        return views


@pytest.mark.parametrize("name", ["kv", "hidden-1", "dense", "transform"])
def test_gaps_leave_out_tokens_and_no_more(name: str) -> None:
    """Rank 1 hears half of rank 0's tokens in block 1: as if the others' were masked, or, with
    codes that predict, as predicted."""
    model, inputs = tiny("llama"), inputs_for("llama", 24)
    book = book_for("llama", name, model)
    space = book.make_codec(adapt(model))
    weights = (1, 1)

    def work(mesh: Mesh) -> Any:
        plan = None
        with Engine(model, book, mesh, weights=weights, halo=0) as engine:
            plan = engine.plan(24)
        told = plan.num_sent(0)
        half = space.payload_bytes(1, 1, told) // 2
        gappy: Any = Gappy(mesh, {(0, 1): (half, half + 3)} if mesh.rank else {})
        masks = []
        options: dict[str, Any] = {"on_missing": "degrade", "deadline_ms": 60_000.0}
        with Engine(model, book, gappy, weights=weights, halo=0, **options) as engine:
            attend = engine.codec.attend if name != "transform" else None
            if attend is not None:

                def watched(
                    block: int, q: Any, kept: Any, rope: Any, mask: Any, scale: float
                ) -> Any:
                    masks.append((block, mask))
                    return attend(block, q, kept, rope, mask, scale)

                engine.codec.attend = watched  # type: ignore[method-assign]
            output = engine(**inputs)
        return output.logits, output.missing, masks, told, half

    (_, told_0, *_), (logits, missing, masks, told, half) = as_ranks(local_mesh(2), work)
    assert missing == told_0 == {0: [1]}
    assert bool(logits.isfinite().all())
    if masks:
        by_block = dict(masks)
        assert by_block[0] is None
        assert by_block[2] is None
        expected = received_mask(space.token_layout(1, 1, told), 1, told, [(half, half + 3)])
        assert torch.equal(by_block[1], expected)
        assert 0 < int(expected.sum()) < told


def test_a_lossy_mesh_wants_degraded_answers() -> None:
    (mesh,) = local_mesh(1)
    gappy: Any = Gappy(mesh, {})
    with pytest.raises(ValueError, match="on_missing: expected 'degrade' with this transport"):
        Engine(tiny("llama"), None, gappy)


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


def test_what_is_missing_crosses_the_wire() -> None:
    ours, theirs = Missing(11, 3), Missing(11, 3)
    ours.leave_out(1, [2, 9])
    trailer = memoryview(bytearray(ours.width))
    ours.write_recent(trailer)
    assert bytes(trailer) == bytes([0b100, 0b10])
    theirs.read_recent(2, trailer, 0)
    assert theirs.by_rank() == {2: [1], 9: [1]}
    ours.write_recent(trailer)
    assert bytes(trailer) == bytes(2)
    theirs.leave_out(theirs.answer, [4])
    whole = memoryview(bytearray(theirs.all_width))
    theirs.write_all(whole)
    ours.read_all(whole, 1)
    assert ours.by_rank() == {2: [1], 4: [3], 9: [1]}
    with pytest.raises(errors.WireError, match="missing rank: expected below 11, got 15"):
        ours.read_recent(1, memoryview(bytearray([0, 0x80])), 0)


# --- jobs and the command


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
