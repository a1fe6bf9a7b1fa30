"""Sessions in files, kept sessions, and what is refused."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from astra_runtime import Codebook, Engine, SessionRefused
from astra_runtime.errors import CallEnded, WireError
from astra_runtime.evaluate import run_ranks
from astra_runtime.files import write_private
from astra_runtime.sessions.kept import KeptSessions, common_prefix
from astra_runtime.sessions.session import generate_together
from astra_runtime.transport import Mesh

from ..models import inputs_for, tiny, windows_for

MODEL = tiny("llama")
IDS = inputs_for("llama", 40)["input_ids"]


def ranks(work: Callable[[Engine], Any], book: Codebook | None = None, count: int = 2) -> list[Any]:
    def rank(mesh: Mesh) -> Any:
        with Engine(MODEL, book, mesh) as engine:
            return work(engine)

    return run_ranks(count, rank, timeout=30)


def test_a_dense_session_is_loaded_by_any_number_of_ranks(tmp_path: Path) -> None:
    def save(engine: Engine) -> Any:
        session = engine.session()
        session.append(IDS[:, :20])
        session.generate(2)
        session.save(tmp_path / "session")
        session.append(IDS[:, 20:25])
        return session.generate(3)

    def load(engine: Engine) -> Any:
        session = engine.load_session(tmp_path / "session")
        session.append(IDS[:, 20:25])
        return session.generate(3)

    expected = ranks(save)[0]
    for count in (1, 3):
        assert all(torch.equal(got, expected) for got in ranks(load, count=count))


def damaged(data: bytes, kind: str) -> bytes:
    size = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + size])
    facts = header["__metadata__"]
    if kind == "a byte":
        return data[:-1] + bytes([data[-1] ^ 1])
    if kind == "cut short":
        return data[:-9]
    if kind == "empty":
        return b""
    facts[kind] = "0123456789abcdef"
    new = json.dumps(header).encode()
    new += b" " * (-len(new) % 8)
    return struct.pack("<Q", len(new)) + new + data[8 + size :]


def test_what_is_no_session_of_this_engine_is_refused_on_every_rank(tmp_path: Path) -> None:
    path = tmp_path / "session"
    kinds = ("a byte", "cut short", "empty", "model", "codebook", "format", "missing")

    def work(engine: Engine) -> None:
        session = engine.session()
        session.append(IDS[:, :9])
        session.save(path)
        engine(input_ids=IDS)  # nobody reads before rank 0 has written
        data = path.read_bytes()
        for kind in kinds:
            if engine.rank == 0 and kind != "missing":
                (tmp_path / kind).write_bytes(damaged(data, kind))
            with pytest.raises(SessionRefused, match=f"(?s)in .*{kind} cannot be used") as refusal:
                engine.load_session(tmp_path / kind)
            assert isinstance(refusal.value, ValueError)
        assert torch.equal(engine.load_session(path).ids, IDS[:, :9])

    ranks(work)


def test_codes_out_of_range_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from astra_runtime.sessions.files import _digest

    book = Codebook.fit(
        MODEL, windows_for("llama"), space="kv", groups=3, codewords=10, iterations=2, held_back=0
    )
    path = tmp_path / "session"

    def work(engine: Engine) -> None:
        session = engine.session()
        session.append(IDS[:, :12])
        session.save(path)
        if engine.rank == 0:
            tensors, data = load_file(path), path.read_bytes()
            facts = json.loads(data[8 : 8 + struct.unpack_from("<Q", data)[0]])["__metadata__"]
            tensors["codes.001"] = torch.full_like(tensors["codes.001"], 0xFF)
            save_file(tensors, path, facts | {"digest": _digest(tensors)})
        with pytest.raises(SessionRefused, match="block 1: codes: expected 0 to 9, got 15"):
            engine.load_session(path)

    ranks(work, book)


def test_kept_sessions_are_found_by_their_longest_prefix() -> None:
    def work(engine: Engine) -> None:
        kept = KeptSessions(1 << 30)
        first, second = engine.session(), engine.session()
        first.append(IDS[:, :12])
        kept.keep(first)
        first.append(IDS[:, 12:20])
        expected = first.generate(3)
        kept.keep(first)
        assert len(kept) == 1  # the shorter one is a part of it
        second.append(torch.flip(IDS, [1])[:, :8])
        kept.keep(second)
        assert kept.find(inputs_for("llama", 5, seed=9)["input_ids"], least=4) is None
        found = kept.find(torch.cat([IDS[:, :20], IDS[:, 30:33]], 1))
        assert found is not None
        assert len(found) == 20
        found = kept.find(IDS[:, :20])
        assert found is not None
        assert len(found) == 19
        found.append(IDS[:, 19:20])
        assert torch.equal(found.generate(3), expected)
        kept.max_bytes = second.nbytes + 1
        kept.keep(second)
        assert len(kept) == 1
        assert torch.equal(first.ids, expected)

    ranks(work)
    assert common_prefix(IDS, IDS[:, :7]) == 7
    assert common_prefix(IDS[:, 1:], IDS + 1) == 0


def test_arguments_that_no_rank_can_use_are_refused_before_anything_is_sent() -> None:
    def work(engine: Engine) -> None:
        session = engine.session()
        with pytest.raises(ValueError, match="expected at least one token to go on behind"):
            session.generate(1)
        for ids, message in (
            (IDS.repeat(2, 1), r"ids: expected shape \[1, T\], got \[2, 40\]"),
            (IDS + 90, "input_ids: expected values from 0 to 96"),
            (IDS.repeat(1, 7), "input_ids: expected at most 256 tokens"),
        ):
            with pytest.raises(ValueError, match=message):
                session.append(ids)
        session.append(IDS[:, :9])
        with pytest.raises(ValueError, match="ids: expected at most 247 tokens behind 9"):
            session.append(IDS.repeat(1, 7)[:, :248])
        with pytest.raises(ValueError, match="rank: expected 0 to 1, got 2"):
            session.append(IDS, rank=2)
        with pytest.raises(ValueError, match="length: expected 0 to 9, got 10"):
            session.truncate(10)
        with pytest.raises(ValueError, match="max_new_tokens: expected at most 248 after 9"):
            session.generate(249)
        with pytest.raises(ValueError, match="keep: expected one of exact, codes"):
            session.release("nothing")  # type: ignore[arg-type]
        kept = KeptSessions(1 << 20)
        for call, message in (
            (lambda: generate_together(3), "sessions: expected a list"),
            (lambda: generate_together([session, None]), "sessions: expected sessions"),  # type: ignore[list-item]
            (lambda: generate_together([session], ranks=0), "ranks: expected a list"),
            (lambda: generate_together([session], choose=max), "choose: expected a list"),
            (lambda: session.finish(5), "tokens: expected a list"),
            (lambda: engine.share_session("a", 0), "session: expected Session"),
            (lambda: engine.decoder().add(None), "session: expected a session"),
            (lambda: kept.keep(None), "session: expected a session"),
            (lambda: kept.find([1]), "ids: expected a tensor"),
            (lambda: kept.find(IDS[0]), r"ids: expected shape \[1, T\]"),
        ):
            with pytest.raises((TypeError, ValueError), match=message):
                call()  # type: ignore[no-untyped-call]
        assert session.generate(1).shape == (1, 10)
        if engine.rank == 0:
            with pytest.raises(ValueError, match="expected one of rank 0, got 1's"):
                engine.decoder().add(session)

    ranks(work)


def test_a_choice_writes_to_logits_of_its_own() -> None:
    """Forks share what is known behind their last token; a choice that hid a token there hid it
    from all of them, and from the session."""

    def work(engine: Engine) -> None:
        session = engine.session()
        session.append(IDS[:, :20])
        plain = session.fork().generate(1)
        likeliest = int(plain[0, -1])

        def other(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            logits[:, likeliest] = -torch.inf
            return logits.argmax(-1)

        forks = [session.fork(), session.fork()]
        first, second = generate_together(forks, 1, choose=[other, None])
        assert int(first[0, -1]) != likeliest
        assert torch.equal(second, plain)
        if session.logits is not None:
            session.logits.zero_()
        assert torch.equal(session.generate(1), plain)

    ranks(work)


def test_paths_of_no_file(tmp_path: Path) -> None:
    """A path that is none ended the mesh; a device in the file's place was replaced."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def work(engine: Engine) -> None:
        session = engine.session()
        session.append(IDS[:, :9])
        for call in (session.save, engine.load_session):
            with pytest.raises(TypeError, match="path: expected a path, got int"):
                call(5)
        with pytest.raises(SessionRefused, match="expected a file"):
            engine.load_session(pipe)
        if engine.rank == 0:
            for path, words in ((pipe, "expected a file"), (tmp_path / "no" / "x", "no/x'")):
                with pytest.raises(OSError, match=words):
                    write_private(path, b"data")
        assert session.generate(1).shape == (1, 10)

    ranks(work)
    assert pipe.is_fifo()


def test_what_keeps_no_sessions_is_refused_by_name() -> None:
    def work(engine: Engine) -> None:
        with pytest.raises(ValueError, match="expected a codebook of space none, kv or transform"):
            engine.session()

    ranks(work, Codebook.local_only())
    with (
        Engine(tiny("bert")) as engine,
        pytest.raises(ValueError, match="expected a decoder with a language-model head"),
    ):
        engine.session()


def test_a_call_that_is_ended_leaves_the_session_as_it_was() -> None:
    def work(engine: Engine) -> None:
        session, other = engine.session(), engine.session()
        for each in (session, other):
            each.append(IDS[:, :20])
        with pytest.raises(CallEnded):
            session.generate(5, choose=lambda ids, logits: torch.tensor([97]))
        with pytest.raises(CallEnded, match="between raised ZeroDivisionError"):
            session.append(IDS[:, 20:22], between=lambda block: 1 // 0)
        assert len(session) == 20
        assert torch.equal(session.generate(3), other.generate(3))
        # ranks that are given different tokens find out, also one that only sends and is long done
        # when the other begins; and the sessions stay
        time.sleep(0.2 * engine.rank)
        with pytest.raises(WireError, match="another plan"):
            session.append(IDS[:, 20 + engine.rank : 38 + engine.rank])
        assert len(session) == 23
        session.append(IDS[:, 20:22], rank=0)
        other.append(IDS[:, 20:22])
        assert torch.equal(session.generate(3), other.generate(3))

    ranks(work)


@pytest.mark.parametrize("coded", [False, True])
def test_a_rank_that_lost_a_session_gets_it_from_another(coded: bool) -> None:
    book = None
    if coded:
        book = Codebook.fit(
            MODEL, windows_for("llama"), space="transform", bits=40, codewords=16, held_back=0
        )

    def work(engine: Engine) -> None:
        session = engine.session()
        session.append(IDS[:, :20], rank=2)
        session.generate(3)
        before = session.fork().generate(4, rank=1)
        shared = engine.share_session(None if engine.rank == 2 else session, 0)
        assert torch.equal(shared.ids, session.ids)
        assert shared.owner == 0
        # rank 1 has lost nothing, rank 2 reads codes
        assert torch.equal(shared.fork().generate(4, rank=1), before)
        fork = shared.fork()
        fork.append(IDS[:, 20:30], rank=2)
        got = fork.generate(4)
        assert fork.answered is not None
        assert fork.answered.rank == 2
        if not coded:
            assert fork.answered.coded_tokens == 0
            session.append(IDS[:, 20:30])
            assert torch.equal(got, session.generate(4))
        shared.append(IDS[:, 20:25])  # whose codes nobody has heard of
        assert len(engine.share_session(shared, 1)) == 22
        with pytest.raises(SessionRefused, match="rank 2 has no session"):
            engine.share_session(None if engine.rank == 2 else shared, 2)
        with pytest.raises(SessionRefused, match="another one than that of rank 0"):
            engine.share_session(fork if engine.rank else shared, 0)

    ranks(work, book, count=3)


def test_a_rank_that_lost_a_session_gets_its_fine_codes_too() -> None:
    book = Codebook.fit(
        MODEL,
        windows_for("llama"),
        space="transform",
        bits=40,
        codewords=16,
        rank=8,
        iterations=3,
        held_back=0,
        fine_bits=60,
    )
    known: dict[int, list[Tensor]] = {}

    def work(engine: Engine) -> Any:
        session = engine.session()
        session.append(IDS[:, :20], rank=1)
        session.generate(13)
        shared = engine.share_session(None if engine.rank == 2 else session, 0)
        shared.generate(2, rank=2)
        caches = [shared._state.cache.tensors(block, 29, 31) for block in range(3)]
        known[engine.rank] = [tensor for pair in caches for tensor in pair]
        return shared.answered

    answered = ranks(work, book, count=3)
    assert answered[0] == answered[1] == answered[2]
    assert answered[0].fine_tokens == 3  # a quarter of the 12 that were read
    for of_codes, of_lost in zip(known[0], known[2], strict=True):
        torch.testing.assert_close(of_lost, of_codes, rtol=1e-4, atol=1e-4)
