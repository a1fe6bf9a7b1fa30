"""Payloads that stay on a device, with gloo in NCCL's place and the CPU as the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from astra_runtime import wire
from astra_runtime.errors import NotFinite, WireError
from astra_runtime.transport import Mesh
from astra_runtime.transport.on_device import LaterChecks
from astra_runtime.transport.subset import Subset
from astra_runtime.wire import HEADER_SIZE, Header

from ..ranks import PLAN, as_ranks, gloo_mesh, pattern


def exchange(mesh: Mesh, size: int, block: int, plan: int = PLAN, finite: bool = True) -> Any:
    """What the other of two ranks has sent."""
    other = 1 - mesh.rank
    frame = mesh.device_buffer(size)
    frame.payload.fill_(0)
    content = bytearray(pattern(mesh.rank, block, size))
    if content:
        frame.payload[: len(content)] = torch.frombuffer(content, dtype=torch.uint8)
    frame.finite = torch.tensor(finite)
    mesh.send(frame, block=block, plan=plan, to=[other])
    return mesh.receive_on_device({other: size}, block=block, plan=plan)[other]


def test_frames_are_those_of_the_host() -> None:
    def work(mesh: Mesh) -> Any:
        mesh.begin(5)
        other = 1 - mesh.rank
        for block, size in enumerate((7, 0, 3000, 2_000_000)):
            got = exchange(mesh, size, block)
            assert len(got) == size
            assert got[:500].numpy().tobytes() == pattern(other, block, size)
        mesh.check_received()
        # numbers go on where bytes come between
        mesh.send(b"abc", block=9, plan=PLAN, to=[other])
        assert bytes(mesh.receive({other: 3}, block=9, plan=PLAN)[other]) == b"abc"
        exchange(Subset(mesh, (0, 1)), 4, 10)
        mesh.check_received()
        return mesh.stats

    first, second = as_ranks(gloo_mesh(2, on_device=True), work)
    total = 7 + 3000 + 2_000_000 + 3 + 4 + 6 * HEADER_SIZE
    assert first.bytes_sent_total == second.bytes_received_total == total


@pytest.mark.parametrize(
    ("work", "field"),
    [
        (lambda mesh: exchange(mesh, 9, 0, PLAN + mesh.rank), "plan"),
        (lambda mesh: (mesh.begin(mesh.rank), exchange(mesh, 9, 0)), "request"),
    ],
    ids=["plan", "request"],
)
def test_another_header_is_an_error_before_the_answer(
    work: Callable[[Mesh], Any], field: str
) -> None:
    def both(mesh: Mesh) -> None:
        work(mesh)
        with pytest.raises(WireError) as caught:
            mesh.check_received()
        assert (caught.value.field, caught.value.rank) == (field, 1 - mesh.rank)

    as_ranks(gloo_mesh(2, on_device=True), both)


def test_a_frame_says_that_it_stands_for_nothing() -> None:
    def work(mesh: Mesh) -> None:
        exchange(mesh, 9, 0)
        exchange(mesh, 9, 1, finite=mesh.rank == 1)
        if mesh.rank == 0:
            mesh.check_received()
            return
        with pytest.raises(NotFinite, match=r"rank 0.*NaN or infinity in block 1"):
            mesh.check_received()

    as_ranks(gloo_mesh(2, on_device=True), work)


def test_the_first_thing_wrong_is_raised_in_one_look() -> None:
    checks, header = LaterChecks(), Header(9, 0, PLAN, 3, 1)
    data = torch.frombuffer(bytearray(wire.encode_header(header)), dtype=torch.uint8)
    checks.add_flag(torch.tensor(True), WireError("payload", 1, 2))
    checks.add_header(data, header)
    data.zero_()  # it was read when it came
    checks.run()
    checks.add_header(data, header)
    checks.add_flag(torch.tensor(False), WireError("payload", 1, 2))
    with pytest.raises(WireError, match="source"):
        checks.run()
    checks.run()  # what an error has ended is not looked at again
    checks.add_flag(torch.tensor(False), WireError("payload", 1, 2))
    checks.clear()
    checks.run()
