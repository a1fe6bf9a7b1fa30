"""A relay between two ranks that can stop being one: the network as a source of faults.

It forwards bytes until somebody connects to its control port and sends a byte; from then on

    "blackhole"   nothing is read or forwarded, and nobody is told
    "half_open"   the same; whoever ends on one side, the other never hears of it
    "slow"        one byte a second reaches the side `towards`
"""

from __future__ import annotations

import contextlib
import select
import socket
import time

from .forks import MEETINGS, Told

CONTROL_BYTE_SECONDS = 1.0


def relay(told: Told, at: str, target: str, control: str, mode: str, towards: str) -> None:
    """Serves one connection. `towards`: "dialer" or "acceptor", whose bytes are slow."""
    for meeting in range(MEETINGS):
        told.arrive(meeting)
    with _listen(at) as door, _listen(control) as switch:
        near, _ = door.accept()
        far = _dial(target)
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with near, far:
            _forward(near, far, switch)
            caller, _ = switch.accept()
            caller.recv(1)
            caller.sendall(b"y")
            told(switched=time.monotonic())
            if mode == "slow":
                source, sink = (far, near) if towards == "dialer" else (near, far)
                _trickle(source, sink)
            time.sleep(3600)


def _listen(address: str) -> socket.socket:
    host, port = address.split(":")
    return socket.create_server((host, int(port)))


def _dial(address: str) -> socket.socket:
    host, port = address.split(":")
    for _ in range(1000):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((host, int(port)))
        time.sleep(0.01)
    raise ConnectionRefusedError(address)


def _forward(near: socket.socket, far: socket.socket, switch: socket.socket) -> None:
    """Both ways, until somebody knocks at the control port; what came before is forwarded, too."""
    knocked = False
    while True:
        ready, _, _ = select.select([near, far, switch], [], [], 0.0 if knocked else None)
        if knocked and not {near, far} & {*ready}:
            return
        knocked = knocked or switch in ready
        for source, sink in ((near, far), (far, near)):
            if source in ready and (part := source.recv(65536)):
                sink.sendall(part)


def _trickle(source: socket.socket, sink: socket.socket) -> None:
    """One direction at a byte a second, the other as before."""
    next_byte = time.monotonic() + CONTROL_BYTE_SECONDS
    while True:
        ready, _, _ = select.select([sink], [], [], max(0.0, next_byte - time.monotonic()))
        if ready and (part := sink.recv(65536)):
            source.sendall(part)
        elif ready:
            return
        if time.monotonic() >= next_byte:
            next_byte += CONTROL_BYTE_SECONDS
            sink.sendall(source.recv(1))
