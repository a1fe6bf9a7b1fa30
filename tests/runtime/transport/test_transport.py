"""Exchanges over every transport: right, early, late, large, wrong and silent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from astra_runtime import errors
from astra_runtime.transport import Mesh, local_mesh

from ..ranks import (
    MAKERS,
    PLAN,
    all_to_all,
    as_ranks,
    fill,
    pattern,
)


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[..., list[Mesh]]:
    return MAKERS[request.param]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [0, 1, 320, 70_001])
def test_all_to_all(make: Callable[..., list[Mesh]], world_size: int, size: int) -> None:
    as_ranks(make(world_size), lambda mesh: all_to_all(mesh, 6, size))


def test_causal_ranks_receive_from_lower_ranks_only(make: Callable[..., list[Mesh]]) -> None:
    def work(mesh: Mesh) -> None:
        for block in range(5):
            later = list(range(mesh.rank + 1, mesh.world_size))
            payload = pattern(mesh.rank, block, 10 + mesh.rank)
            mesh.send(payload, block=block, plan=PLAN, to=later)
            sizes = {rank: 10 + rank for rank in range(mesh.rank)}
            views = mesh.receive(sizes, block=block, plan=PLAN)
            for rank in range(mesh.rank):
                assert bytes(views[rank]) == pattern(rank, block, 10 + rank)

    as_ranks(make(4), work)


def test_backlog_of_a_rank_that_runs_ahead(make: Callable[..., list[Mesh]]) -> None:
    ahead = threading.Event()

    def work(mesh: Mesh) -> None:
        if mesh.rank == 0:
            for block in range(100):
                mesh.send(pattern(0, block, 500) * 64, block=block, plan=PLAN, to=[1])
            ahead.set()
        else:
            assert ahead.wait(60)
            for block in range(100):
                view = mesh.receive({0: 32_000}, block=block, plan=PLAN)[0]
                assert bytes(view) == pattern(0, block, 500) * 64

    as_ranks(make(2), work)


def test_large_frames_in_both_directions_at_once(make: Callable[..., list[Mesh]]) -> None:
    as_ranks(make(2), lambda mesh: all_to_all(mesh, 3, 16 << 20))


def test_a_view_survives_the_next_block_and_control_messages(
    make: Callable[..., list[Mesh]],
) -> None:
    def work(mesh: Mesh) -> None:
        other = 1 - mesh.rank
        held = {}
        for block in (0, 1, 0xFF00):
            mesh.send(pattern(mesh.rank, block, 99), block=block, plan=PLAN, to=[other])
            held[block] = mesh.receive({other: 99}, block=block, plan=PLAN)[other]
        for block, view in held.items():
            assert bytes(view) == pattern(other, block, 99)

    as_ranks(make(2), work)


def test_send_leaves_the_buffer_free(make: Callable[..., list[Mesh]]) -> None:
    size = 8 << 20

    def work(mesh: Mesh) -> None:
        other = 1 - mesh.rank
        frame = mesh.buffer(size)
        for block in range(2):
            fill(frame, mesh.rank, block)
            frame.payload[-1] = block + 1
            mesh.send(frame, block=block, plan=PLAN, to=[other])
        frame.payload[:] = bytes(size)
        for block in range(2):
            view = mesh.receive({other: size}, block=block, plan=PLAN)[other]
            assert bytes(view[:500]) == pattern(other, block, 500)
            assert view[-1] == block + 1

    as_ranks(make(2), work)


def test_stats_count_payload_and_framing(make: Callable[..., list[Mesh]]) -> None:
    def work(mesh: Mesh) -> None:
        other = 1 - mesh.rank
        before = mesh.stats
        all_to_all(mesh, 10, 320)
        mesh.send(b"token", block=0xFF00, plan=PLAN, to=[other])
        mesh.receive({other: 5}, block=0xFF00, plan=PLAN)
        mesh.flush()  # behind a link, what was sent may not have left yet
        spent = mesh.stats - before
        assert (spent.messages_sent, spent.messages_received) == (11, 11)
        assert (spent.bytes_sent_payload, spent.bytes_received_payload) == (3200, 3200)
        assert (spent.bytes_sent_control, spent.bytes_received_control) == (5, 5)
        tls = 22 if mesh.encrypted else 0  # a record's header and seal
        total = 3205 + 11 * (28 + tls)
        assert spent.bytes_sent_total == total
        # TLS reads what has come, and that may be the BYE of a peer that is done
        assert spent.bytes_received_total in (total, total + (28 + tls if tls else 0))
        assert mesh.peer_stats[other].messages_sent == 11

    as_ranks(make(2), work)


def test_agreement(make: Callable[..., list[Mesh]]) -> None:
    as_ranks(make(3), lambda mesh: mesh.agree({"model": "ab12", "codebook": "cd34"}))


def test_a_difference_is_named_on_every_side(make: Callable[..., list[Mesh]]) -> None:
    def work(mesh: Mesh) -> None:
        mesh.agree({"model": "ab12", "codebook": "cd34" if mesh.rank < 2 else "ef56"})

    results = as_ranks(make(3), work, errors_too=True)
    assert all(isinstance(result, errors.HandshakeRefused) for result in results), results
    assert str(results[0]) == "rank 2 has codebook ef56, rank 0 has cd34"
    assert str(results[1]) == "rank 2 has codebook ef56, rank 1 has cd34"
    assert str(results[2]) == "rank 0 has codebook cd34, rank 2 has ef56"


def test_what_may_differ_is_heard_of_every_rank(make: Callable[..., list[Mesh]]) -> None:
    def work(mesh: Mesh) -> dict[str, list[str]]:
        return mesh.agree({"model": "ab12"}, exchanged={"paces": f"of {mesh.rank}"})

    assert as_ranks(make(3), work) == [{"paces": ["of 0", "of 1", "of 2"]}] * 3


def test_a_rank_that_does_not_tell_is_refused() -> None:
    def work(mesh: Mesh) -> None:
        mesh.agree({}, exchanged={"paces": "1"} if mesh.rank else {})

    results = as_ranks(local_mesh(2), work, errors_too=True)
    assert str(results[0]) == "rank 1 has paces 1, rank 0 has none"
    assert str(results[1]) == "rank 0 has no paces, rank 1 has 1"


def test_a_missing_fact_is_a_difference() -> None:
    def work(mesh: Mesh) -> None:
        mesh.agree({"plan": "1"} if mesh.rank else {})

    results = as_ranks(local_mesh(2), work, errors_too=True)
    assert str(results[0]) == "rank 1 has plan 1, rank 0 has none"
    assert str(results[1]) == "rank 0 has no plan, rank 1 has 1"


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ((b"x" * 320, 4, PLAN), "expected 3, got 4"),
        ((b"x" * 320, 3, 1), "rank 0 runs another plan: its tag is 0x00000001"),
        ((b"x" * 319, 3, PLAN), "wrong length: expected 320, got 319"),
        ((b"x" * 321, 3, PLAN), "wrong length: expected 320, got 321"),
    ],
)
def test_a_wrong_frame_is_refused(
    make: Callable[..., list[Mesh]], sent: tuple[bytes, int, int], words: str
) -> None:
    def work(mesh: Mesh) -> None:
        if mesh.rank == 0:
            payload, block, plan = sent
            mesh.send(payload, block=block, plan=plan, to=[1])
        else:
            mesh.receive({0: 320}, block=3, plan=PLAN)

    _, result = as_ranks(make(2), work, errors_too=True)
    assert isinstance(result, errors.WireError)
    assert words in str(result)


def test_a_silent_peer_meets_the_deadline(make: Callable[..., list[Mesh]]) -> None:
    meshes = make(2, timeout=0.4)
    start = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded) as caught:
        meshes[0].receive({1: 8}, block=6, plan=PLAN)
    assert 0.35 < time.monotonic() - start < 60
    assert (caught.value.rank, caught.value.block) == (1, 6)
    for mesh in meshes:
        mesh.close()


def test_wrong_use_is_refused(make: Callable[..., list[Mesh]]) -> None:
    meshes = make(2)
    with pytest.raises(ValueError, match=r"rank: expected one of \[1\], got 5"):
        meshes[0].receive({5: 8}, block=0, plan=PLAN)
    for mesh in meshes:
        mesh.close()
        mesh.close()
    with pytest.raises(errors.AstraError, match="closed"):
        meshes[0].send(b"x", block=0, plan=PLAN, to=[1])
