"""The baselines' collectives on the virtual link: what they compute, and how long they take."""

from __future__ import annotations

import pytest
import torch

from bench.baselines.comm import ThreadComm
from bench.link.comm import VirtualComm
from bench.link.model import Link
from bench.link.virtual import VirtualMesh, World
from tests.runtime.ranks import together

pytestmark = pytest.mark.usefixtures("one_thread")


def test_collectives_are_those_of_the_baselines() -> None:
    size = 4

    def collect(comm):
        draw = torch.Generator().manual_seed(comm.rank)
        own = torch.randn(5, 3, generator=draw)
        uneven = torch.randn(comm.rank, 3, generator=draw)
        shapes = [(n, 3) for n in range(size)]
        return comm.all_reduce(own), comm.all_gather(own), comm.all_gather(uneven, shapes)

    threads = ThreadComm.group(size)
    expected = together([lambda comm=comm: collect(comm) for comm in threads])
    for ring in (False, True):
        run = World(size, Link(10)).run(
            lambda mesh, ring=ring: (collect(comm := VirtualComm(mesh, ring=ring)), comm.bytes_sent)
        )
        for rank, ((total, same, uneven), sent) in enumerate(run.results):
            exact = run.results[0][0][0]
            assert torch.equal(total, exact)
            torch.testing.assert_close(total, expected[rank][0])
            assert all(map(torch.equal, same, expected[rank][1]))
            assert all(map(torch.equal, uneven, expected[rank][2]))
            assert ring or sent == threads[rank].bytes_sent


def test_collectives_take_the_links_time() -> None:
    link, size, count = Link(10, rtt_ms=6), 4, 40_000

    def work(mesh: VirtualMesh, ring: bool) -> list[float]:
        comm, tensor = VirtualComm(mesh, ring=ring), torch.zeros(count)
        finishes = []
        for call in (comm.all_gather, comm.all_reduce):
            mesh.start()
            call(tensor)
            finishes.append(mesh.lap().finish)
        return finishes

    whole, part = link.seconds(4 * count), link.seconds(4 * count // size)
    for ring, rounds in ((False, 2), (True, 6)):
        for gather, reduce in (
            World(size, link, clock=lambda: 0.0).run(lambda mesh, r=ring: work(mesh, r)).results
        ):
            assert gather == pytest.approx(3 * whole + 3e-3)
            assert reduce == pytest.approx(6 * part + rounds * 3e-3)
