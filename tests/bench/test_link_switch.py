"""The switch between namespaces: no packet is early, none is late by much, nothing stays behind.

What is late depends on what else the machine does: those tests are slow ones.
"""

from __future__ import annotations

import json
import math
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.link import __main__ as program
from bench.link import switch
from bench.link.model import Link
from bench.link.rank import begin, join
from bench.link.switch import LinkUnavailable, Namespaces
from tests.processes import runs
from tests.runtime.ranks import environment, free_ports, together, wait_for

pytestmark = pytest.mark.usefixtures("one_thread")
MISSING = switch.unavailable()
needs_switch = pytest.mark.skipif(bool(MISSING), reason=f"no switch here: {MISSING}")


def datagrams(net: Namespaces, rank: int) -> socket.socket:
    def make() -> socket.socket:
        end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        end.bind((net.addresses[rank], 0))
        end.settimeout(60)
        return end

    return net.inside(rank, make)


def count_coming(end: socket.socket, quiet: float) -> list[bytes]:
    """What comes until nothing does for a while."""
    end.settimeout(quiet)
    came = []
    try:
        while True:
            came.append(end.recv(2048))
    except TimeoutError:
        return came


def seconds_of_bulk(net: Namespaces, link: Link) -> float:
    """Over those that the link needs: of a fifth of a second."""
    size = round(link.mbit_per_s * 25_000)
    seconds, report = program.bulk(net, size)
    assert report.bytes > size
    assert report.cpu_share > 0
    return seconds / link.seconds(size)


@needs_switch
@pytest.mark.parametrize("mbit", [10, 100, 500])
def test_the_switch_flatters_no_packet(mbit: int) -> None:
    link = Link(mbit, rtt_ms=1)
    with Namespaces(2, link) as net:
        for turn, size in enumerate((320, 1472), start=1):
            assert min(program.single_packets(net, size, 10)) >= program.expected_packet(link, size)
            assert net.report().packets == 10 * turn
        # a segment may be on its way before the clock has started
        assert seconds_of_bulk(net, link) >= 0.99
        assert net.report().lost == net.report().dropped == 0


@needs_switch
@pytest.mark.slow
@pytest.mark.parametrize("mbit", [10, 100, 500])
def test_the_switch_is_late_by_little(mbit: int) -> None:
    """Other work on the machine only makes packets later, so the fastest is what the link does."""
    link, sizes, fastest = Link(mbit, rtt_ms=1), (320, 1472), dict[int, float]()
    expected = {size: program.expected_packet(link, size) for size in sizes}
    with Namespaces(2, link) as net:
        for _ in range(10):
            for size in sizes:
                found = program.single_packets(net, size, 40)
                fastest[size] = min(found + [fastest.get(size, math.inf)])
            if all(fastest[size] <= expected[size] + 0.4e-3 for size in sizes):
                break
        assert all(fastest[n] <= expected[n] + 0.4e-3 for n in sizes)


@needs_switch
@pytest.mark.slow
@pytest.mark.parametrize(("mbit", "slack"), [(10, 1.1), (100, 1.15), (500, 2.0)])
def test_bulk_takes_the_links_rate(mbit: int, slack: float) -> None:
    link = Link(mbit)
    with Namespaces(2, link) as net:
        assert any(seconds_of_bulk(net, link) <= slack for _ in range(20))


@needs_switch
def test_two_senders_share_the_downlink_and_not_the_uplink() -> None:
    link, count = Link(10), 40
    each = program.expected_packet(link, 1472)
    with Namespaces(3, link) as net:
        ends = [datagrams(net, rank) for rank in range(3)]
        for senders, receivers, packets in (((1, 2), (0,), 2 * count), ((1, 2), (0, 1), count)):
            times = []
            while len(times) < 20 and (not times or times[-1] > packets * each + 0.3):
                start = time.perf_counter()
                for _ in range(count):
                    for n, sender in enumerate(senders):
                        target = ends[receivers[n % len(receivers)]]
                        ends[sender].sendto(bytes(1472), target.getsockname())
                for n in receivers:
                    for _ in range(count * len(senders) // len(receivers)):
                        ends[n].recv(2048)
                times.append(time.perf_counter() - start)
            assert packets * each * 0.99 <= min(times) <= packets * each + 0.3
        for end in ends:
            end.close()


@needs_switch
def test_the_switch_loses_what_it_says_and_keeps_the_order() -> None:
    with Namespaces(2, Link(100, jitter_ms=3, loss=0.3)) as net:
        out, into = (datagrams(net, rank) for rank in (0, 1))
        for number in range(300):
            out.sendto(number.to_bytes(2, "big"), into.getsockname())
        came: list[bytes] = []

        def all_are_known() -> bool:
            came.extend(count_coming(into, 0.05))
            return net.report().lost == 300 - len(came)

        wait_for(all_are_known)
        assert came == sorted(came)
        assert 150 < len(came) < 270
        out.close()
        into.close()


@needs_switch
def test_a_launched_process_lives_at_its_address_and_ends_with_the_block() -> None:
    link = Link(100)
    code = "import socket, sys; socket.create_server((sys.argv[1], 7000)); print('ok')"
    with pytest.raises(ZeroDivisionError), Namespaces(2, link) as net:  # noqa: PT012
        for address, expected in ((net.addresses[1], 0), (net.addresses[0], 1)):
            process = net.launch(
                1,
                [sys.executable, "-S", "-c", code, address],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            assert process.communicate(timeout=30)[0] == (b"" if expected else b"ok\n")
            assert process.returncode == expected
        with pytest.raises(OSError, match="assign"):
            socket.create_server((net.addresses[1], 7000))  # not out here
        sleeper = net.launch(0, ["sleep", "1000"])
        running = net._switch
        assert running is not None
        raise ZeroDivisionError
    assert sleeper.returncode == -signal.SIGKILL
    assert running.returncode == 0
    net.close()


@needs_switch
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_switch_ends_with_its_owner(number: signal.Signals) -> None:
    code = (
        "import time; from bench.link.model import Link; from bench.link.switch import Namespaces\n"
        "with Namespaces(2, Link(10)) as net:\n"
        "    print(net._switch.pid, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    assert owner.stdout is not None
    switch_process = int(owner.stdout.readline())
    assert runs(switch_process)
    owner.send_signal(number)
    owner.wait(60)
    owner.stdout.close()
    wait_for(lambda: not runs(switch_process))


def test_a_machine_without_the_switch_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(LinkUnavailable, match="root"), Namespaces(2, Link(10)):
        pass
    with pytest.raises(ValueError, match="count"):
        Namespaces(1, Link(10))
    with pytest.raises(ValueError, match="tls"):
        Namespaces(2, Link(10, tls=True))


def test_ranks_begin_at_one_moment() -> None:
    addresses = free_ports(3)
    meshes = together([lambda n=n: join(n, addresses) for n in range(3)])
    moments = together([lambda mesh=mesh: begin(mesh) for mesh in meshes])
    assert moments == [moments[0]] * 3
    together([mesh.close for mesh in meshes])


def test_the_comparison_on_the_virtual_link() -> None:
    link = Link(10, rtt_ms=2, ethernet=0)
    taken = program.on_virtual(link, "none", 64, 3)
    # rank 0 sends keys and values of about half the tokens in each of 3 blocks
    assert len(taken.seconds) == len(taken.computing) == 3
    assert min(taken.seconds) > 3 * (link.seconds(30 * 2 * 48 * 4) + link.delay)


@pytest.mark.slow
def test_the_comparison_of_all_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.report.results.RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["link"])
    program.main(["--rates", "10", "--packets", "10", "--repeats", "10", "--tokens", "64"])
    (path,) = tmp_path.glob("*/link.json")
    told = json.loads(path.read_text())
    for case in told["cases"]:
        for agreement in case.get("agreement_of_fastest", {}).values():
            assert agreement > 0.9  # the virtual link flatters nobody
