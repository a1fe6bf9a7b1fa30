"""The links: virtual times are exact where they can be computed by hand, whatever threads do."""

from __future__ import annotations

import heapq
import itertools
import math
import random
import statistics
import threading
import time
from collections.abc import Callable

import pytest
import torch

from astra_runtime import Codebook, Engine
from astra_runtime.errors import AstraError, DeadlineExceeded, PeerLost, WireError
from astra_runtime.transport import peers_of
from bench.link.model import IP_TCP, SEGMENT, Link
from bench.link.network import Network
from bench.link.virtual import Lap, SocketCosts, Span, VirtualMesh, World
from tests.runtime.models import inputs_for, tiny, windows_for
from tests.runtime.ranks import all_to_all

HEADER = 28 + IP_TCP + 18  # of a mesh's frame, TCP, IP, Ethernet
pytestmark = pytest.mark.usefixtures("one_thread")


def world(size: int, link: Link, **options) -> World:
    """A world in which executing costs nothing: time passes in `spend` and on the link alone."""
    return World(size, link, **{"clock": lambda: 0.0, **options})


def wire(size: int, link: Link) -> float:
    """Seconds of a frame of `size` payload bytes that is smaller than a packet."""
    return (size + HEADER) * 8e-6 / link.mbit_per_s


def swap(mesh: VirtualMesh, sizes: int = 320, block: int = 0) -> None:
    """One exchange of all ranks."""
    others = peers_of(mesh)
    mesh.send(bytes(sizes), block=block, plan=1, to=others)
    mesh.receive(dict.fromkeys(others, sizes), block=block, plan=1)


def test_a_message_below_a_packet_takes_its_bits_and_the_delay() -> None:
    link = Link(10, rtt_ms=2)

    def work(mesh: VirtualMesh) -> Lap:
        mesh.spend(0.5)
        swap(mesh)
        return mesh.lap()

    run = world(2, link).run(work)
    expected = 0.5 + wire(320, link) + 1e-3
    assert run.results == [pytest.approx((expected, 0.5, expected - 0.5))] * 2
    assert wire(320, link) == pytest.approx(0.3344e-3)  # 418 bytes at 10 Mbit/s
    assert run.laps == run.results


def test_an_idle_link_saves_nothing_up_and_a_busy_one_queues() -> None:
    link = Link(10)

    def work(mesh: VirtualMesh) -> list[float]:
        moments = []
        if mesh.rank == 0:
            mesh.spend(1.0)
            for block in range(3):
                mesh.send(bytes(320), block=block, plan=1, to=[1])
        else:
            for block in range(3):
                mesh.receive({0: 320}, block=block, plan=1)
                moments.append(mesh.now)
        return moments

    moments = world(2, link).run(work).results[1]
    assert moments == pytest.approx([1 + n * wire(320, link) for n in (1, 2, 3)])


def test_a_message_to_all_crosses_the_uplink_once_for_each() -> None:
    link = Link(10, rtt_ms=20)

    def work(mesh: VirtualMesh) -> float:
        if mesh.rank == 0:
            mesh.send(bytes(100), block=0, plan=1, to=[2, 3, 1])
            mesh.flush()
        else:
            mesh.receive({0: 100}, block=0, plan=1)
        return mesh.now

    each = wire(100, link)
    expected = [3 * each, 0.01 + 3 * each, 0.01 + each, 0.01 + 2 * each]
    assert world(4, link).run(work).results == pytest.approx(expected)


def test_many_senders_queue_at_one_downlink() -> None:
    link = Link(10, rtt_ms=1)

    def work(mesh: VirtualMesh) -> float:
        if mesh.rank == 0:
            mesh.receive(dict.fromkeys((1, 2, 3), 320), block=0, plan=1)
        else:
            mesh.send(bytes(320), block=0, plan=1, to=[0])
        return mesh.now

    assert world(4, link).run(work).results[0] == pytest.approx(0.5e-3 + 3 * wire(320, link))


def test_a_frame_that_is_sent_later_but_arrives_first_goes_first() -> None:
    """Ranks are asked in the order of their numbers here, and rank 3 is the first to send."""
    link = Link(1)

    def work(mesh: VirtualMesh) -> list[float]:
        if mesh.rank == 0:
            moments = []
            for n in (3, 1, 2):
                mesh.receive({n: 1400}, block=0, plan=1)
                moments.append(mesh.now)
            return moments
        mesh.spend({1: 1.001, 2: 1.002, 3: 1.0}[mesh.rank])
        mesh.send(bytes(1400), block=0, plan=1, to=[0])
        return []

    each = wire(1400, link)
    moments = world(4, link).run(work).results[0]
    assert moments == pytest.approx([1 + each, 1 + 2 * each, 1 + 3 * each])


def test_headers_count_for_every_packet() -> None:
    link = Link(8)  # a byte takes a microsecond
    assert link.seconds(1) == pytest.approx(71e-6)
    assert link.seconds(SEGMENT) == pytest.approx(1518e-6)
    assert link.seconds(SEGMENT + 1) == pytest.approx(1518e-6 + 71e-6)
    assert link.seconds(10 * SEGMENT) == pytest.approx(15180e-6)
    assert Link(8, tls=True).seconds(100) == pytest.approx((100 + 22 + 70) * 1e-6)
    two_records = 20000 + 2 * 22
    packets = -(-two_records // SEGMENT)
    assert Link(8, tls=True).seconds(20000) == pytest.approx((two_records + 70 * packets) * 1e-6)
    assert Link(8, ethernet=38).seconds(1) == pytest.approx(91e-6)


def step_by_step(link: Link, size: int, sends: list[tuple[float, int, int, int]]) -> list[float]:
    """The slow way: packet by packet with a calendar. Sends: time, source, target, bytes."""
    uplinks, downlinks = [0.0] * size, [0.0] * size
    calendar: list[tuple[float, int, int, int, float]] = []
    done = [0.0] * len(sends)
    for index in sorted(range(len(sends)), key=lambda i: (sends[i][0], i)):
        at, source, target, length = sends[index]
        for order, seconds in enumerate(link.packet_seconds(length)):
            start = max(at, uplinks[source])
            uplinks[source] = start + seconds
            entry = (start + link.delay, source, 1000 * index + order, target, seconds)
            heapq.heappush(calendar, entry)
    while calendar:
        arrival, _, name, target, seconds = heapq.heappop(calendar)
        downlinks[target] = max(arrival, downlinks[target]) + seconds
        done[name // 1000] = max(done[name // 1000], downlinks[target])
    return done


@pytest.mark.parametrize("seed", range(8))
def test_the_network_equals_a_calendar_of_packets(seed: int) -> None:
    draw = random.Random(seed)
    link, size = Link(draw.choice([1, 10]), rtt_ms=draw.choice([0, 3])), 5
    times = sorted(round(draw.uniform(0, 0.1), 3) for _ in range(60))
    sends = []
    for at in times:
        source, target = draw.sample(range(size), 2)
        sends.append((at, source, target, draw.choice([1, 320, 1448, 9000, 30000])))
    expected = step_by_step(link, size, sends)
    # told in another order: every sender's own in turn, and asked in between as far as is known
    network = Network(size, link)
    got = [0.0] * len(sends)
    for turn in range(0, 60, 12):
        for source in range(size):
            for index in range(turn, turn + 12):
                at, own, target, length = sends[index]
                if own == source:
                    network.send(own, target, length, index, at)
        known_until = sends[turn + 12][0] if turn + 12 < 60 else math.inf
        for pair in itertools.permutations(range(size), 2):
            while (message := network.first(*pair)) is not None:
                moment = network.arrival(*pair, known_until)
                if moment > known_until:
                    break
                got[message.content] = moment
                network.take(*pair)
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "link", [Link(10, rtt_ms=2), Link(10, rtt_ms=2, jitter_ms=3, loss=0.2, rto_ms=5)]
)
def test_results_do_not_depend_on_real_time(link: Link) -> None:
    """Ranks that are really slow, by turns, finish at the same virtual times."""

    def run(slow: int) -> list[Lap]:
        def work(mesh: VirtualMesh) -> Lap:
            draw = random.Random(mesh.rank)
            for block in range(6):
                if mesh.rank == slow:
                    time.sleep(2e-3)
                mesh.spend(draw.uniform(0, 2e-3))
                swap(mesh, 2000, block)
            return mesh.lap()

        return world(4, link).run(work).results

    first = run(0)
    assert all(run(slow) == first for slow in (1, 3))
    assert len({lap.finish for lap in first}) > 1


def test_jitter_and_loss_only_add_and_keep_order() -> None:
    def moments(link: Link) -> list[float]:
        def work(mesh: VirtualMesh) -> list[float]:
            seen = []
            for block in range(200):
                if mesh.rank == 0:
                    mesh.spend(5e-3)
                    mesh.send(bytes(320), block=block, plan=1, to=[1])
                else:
                    mesh.receive({0: 320}, block=block, plan=1)
                    seen.append(mesh.now)
            return seen

        return world(2, link).run(work).results[1]

    plain = moments(Link(10, rtt_ms=2))
    jittered = moments(Link(10, rtt_ms=2, jitter_ms=4))
    extra = [b - a for a, b in zip(plain, jittered, strict=True)]
    assert min(extra) >= -1e-12
    assert max(extra) <= 4e-3 + 1e-12
    assert 1.6e-3 < statistics.mean(extra) < 2.4e-3
    lossy = moments(Link(10, rtt_ms=2, loss=0.1, rto_ms=200))
    late = [b - a for a, b in zip(plain, lossy, strict=True)]
    assert min(late) >= -1e-12
    assert max(late) >= 0.2
    assert lossy == sorted(lossy)
    assert moments(Link(10, rtt_ms=2, jitter_ms=4, seed=1)) != jittered


def test_measured_time_counts_divided_by_speed_and_the_meshs_own_does_not() -> None:
    ticks = threading.local()

    def clock() -> float:  # executing means to look at the clock: 1 s each time
        ticks.n = getattr(ticks, "n", 0) + 1
        return float(ticks.n)

    def work(mesh: VirtualMesh) -> list[Lap]:
        mesh.start()
        laps = [mesh.lap()]
        mesh.send(b"", block=0, plan=1, to=[])
        laps.append(mesh.lap())
        mesh.spend(7.0)
        return [*laps, mesh.lap()]

    run = World(1, Link(10), clock=clock, speed=4).run(work)
    assert [lap.computing for lap in run.results[0]] == [0.25, 0.75, 8.25]


@pytest.mark.parametrize("clock", ["cpu", "wall"])
def test_both_clocks_time_what_is_executed(clock: str) -> None:
    def work(mesh: VirtualMesh) -> Lap:
        mesh.start()
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
        time.sleep(0.2)
        swap(mesh)
        return mesh.lap()

    run = World(2, Link(10), clock=clock).run(work)
    least = 0.02 if clock == "cpu" else 0.22
    assert min(lap.computing for lap in run.results) >= least * 0.99
    if clock == "cpu":  # the sleep is not computing
        assert max(lap.computing for lap in run.results) < 0.15
    assert run.elsewhere < 1.0


def test_socket_costs_are_charged_by_message_and_byte() -> None:
    costs = SocketCosts(send=1e-3, send_byte=1e-6, receive=2e-3, receive_byte=3e-6)

    def work(mesh: VirtualMesh) -> Lap:
        if mesh.rank == 0:
            mesh.send(bytes(72), block=0, plan=1, to=[1, 2])
        else:
            mesh.receive({0: 72}, block=0, plan=1)
        return mesh.lap()

    run = world(3, Link(10), costs=costs, speed=2).run(work)
    assert [lap.computing for lap in run.results] == pytest.approx([1.1e-3, 1.15e-3, 1.15e-3])
    measured = SocketCosts.measured(20)
    assert 1e-7 < measured.send < 1e-2
    assert 1e-7 < measured.receive < 1e-2


def test_spans_tell_stages_and_waits() -> None:
    link = Link(8)

    def work(mesh: VirtualMesh) -> None:
        mesh.spend(1.0)
        mesh.start()
        with mesh.stage("encode"):
            mesh.spend(0.25)
            mesh.spend(0.25)
        if mesh.rank == 0:
            mesh.send(bytes(2), block=0, plan=1, to=[1])
        else:
            mesh.receive({0: 2}, block=0, plan=1)
            mesh.spend(1.0, "attend")

    run = world(2, link, spans=True).run(work)
    arrival = 0.5 + 100e-6
    assert run.spans == [
        Span(0, "encode", 0.0, 0.5),
        Span(1, "encode", 0.0, 0.5),
        Span(1, "wait", 0.5, pytest.approx(arrival)),
        Span(1, "attend", pytest.approx(arrival), pytest.approx(arrival + 1.0)),
    ]


def test_a_start_begins_with_idle_links() -> None:
    link = Link(1, rtt_ms=10)

    def work(mesh: VirtualMesh) -> list[float]:
        others, finishes = peers_of(mesh), []
        for repeat in range(3):
            mesh.spend(mesh.rank * 0.1)
            if repeat:  # 0.8 s of frames, on their way when time starts again
                mesh.send(bytes(50_000), block=repeat, plan=1, to=others)
            mesh.start()
            if repeat:
                mesh.receive(dict.fromkeys(others, 50_000), block=repeat, plan=1)
            swap(mesh, 3000, repeat)
            finishes.append(mesh.lap().finish)
        return finishes

    for finishes in world(3, link).run(work).results:
        assert finishes == [finishes[0]] * 3


def test_the_mesh_keeps_its_contract() -> None:
    def work(mesh: VirtualMesh):
        assert not mesh.encrypted
        all_to_all(mesh, 5, 700)
        frame = mesh.buffer(4)
        frame.payload[:] = b"abcd"
        mesh.send(frame, block=7, plan=3, to=peers_of(mesh))
        frame.payload[:] = b"wxyz"  # may be written again
        views = mesh.receive(dict.fromkeys(peers_of(mesh), 4), block=7, plan=3)
        assert all(bytes(view) == b"abcd" for view in views.values())
        mesh.agree({"model": "m"})
        with pytest.raises(ValueError, match="rank"):
            mesh.send(b"", block=0, plan=0, to=[mesh.rank])
        stats = mesh.stats
        mesh.close()
        mesh.close()
        with pytest.raises(AstraError, match="closed"):
            mesh.send(b"", block=0, plan=0, to=[])
        return stats

    stats = World(3, Link(100)).run(work).results[0]
    assert stats.messages_sent == 2 * 7
    assert stats.bytes_sent_payload == 2 * (5 * 700 + 4)
    assert stats.bytes_sent_total == 2 * (5 * 728 + 32 + 2048 + 28)
    assert stats.bytes_received_total == stats.bytes_sent_total


def failing(size: int, work: Callable[[VirtualMesh], object], error: type, match: str) -> None:
    before = set(threading.enumerate())
    with pytest.raises(error, match=match):
        world(size, Link(10, rtt_ms=4)).run(work)
    assert set(threading.enumerate()) <= before  # an earlier test's may end meanwhile


def test_failures_are_told_and_nobody_hangs() -> None:
    def broken(mesh: VirtualMesh) -> None:
        if mesh.rank == 1:
            raise RuntimeError("broken rank")
        swap(mesh)

    failing(3, broken, RuntimeError, "broken rank")

    def other_plan(mesh: VirtualMesh) -> None:
        mesh.send(b"x", block=0, plan=mesh.rank, to=peers_of(mesh))
        mesh.receive({1 - mesh.rank: 1}, block=0, plan=mesh.rank)

    failing(2, other_plan, WireError, "another plan")

    def all_wait(mesh: VirtualMesh) -> None:
        mesh.receive({1 - mesh.rank: 1}, block=0, plan=0)

    failing(2, all_wait, AstraError, "every rank waits")

    def leaves(mesh: VirtualMesh) -> None:
        if mesh.rank == 0:
            with pytest.raises(PeerLost, match="finished") as lost:
                mesh.receive({1: 1}, block=3, plan=0)
            assert (lost.value.rank, lost.value.block) == (1, 3)
            assert mesh.now == pytest.approx(2e-3)
            raise lost.value

    failing(2, leaves, PeerLost, "at block 3")

    def late(mesh: VirtualMesh) -> None:
        mesh.timeout = 0.5
        if mesh.rank == 0:
            mesh.spend(2.0)
            mesh.send(b"x", block=0, plan=0, to=[1])
        else:
            with pytest.raises(DeadlineExceeded):
                mesh.receive({0: 1}, block=0, plan=0)
            assert mesh.now == 0.5

    world(2, Link(10)).run(late)

    def never_starts(mesh: VirtualMesh) -> None:
        if mesh.rank:
            mesh.start()

    failing(2, never_starts, AstraError, "every rank waits")


def test_arguments_are_checked() -> None:
    for options in (
        {"mbit_per_s": 0},
        {"mbit_per_s": 1, "loss": 1},
        {"mbit_per_s": 1, "rtt_ms": -1},
    ):
        with pytest.raises(ValueError, match=next(reversed(options))):
            Link(**options)
    for options in ({"speed": 0}, {"clock": "sun"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            World(2, Link(1), **options)
    used = world(1, Link(1))
    used.run(lambda mesh: None)
    with pytest.raises(RuntimeError, match="once"):
        used.run(lambda mesh: None)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_an_unmodified_engine_runs_on_it(world_size: int) -> None:
    """Dense exchange on the virtual mesh equals the single device."""
    model, inputs = tiny("llama"), inputs_for("llama", 40)
    with torch.inference_mode():
        single = model(**inputs).logits[:, -1]

    def work(mesh: VirtualMesh):
        with Engine(model, Codebook.none(), mesh) as engine:
            mesh.start()
            logits = engine(**inputs).logits[:, -1]
            return logits, mesh.lap()

    run = World(world_size, Link(10, rtt_ms=2), cold_bytes=1 << 20).run(work)
    for logits, lap in run.results:
        torch.testing.assert_close(logits, single, atol=1e-4, rtol=1e-4)
        assert lap.finish == pytest.approx(lap.computing + lap.waiting)
        assert lap.computing > 0


def test_thirty_two_ranks_exchange_codes() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 64)
    codebook = Codebook.fit(
        model, windows_for("llama"), space="kv", groups=3, codewords=32, iterations=2, held_back=0
    )

    def work(mesh: VirtualMesh):
        with Engine(model, codebook, mesh) as engine:
            mesh.start()
            return engine(**inputs).logits[:, -1]

    run = World(32, Link(10, rtt_ms=2)).run(work)
    assert all(torch.equal(logits, run.results[0]) for logits in run.results)
