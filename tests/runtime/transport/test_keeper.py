"""A process's sockets close the moment that it is killed, and its memory is freed after them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from astra_kernels import _C
from astra_runtime.transport import connect

from ..ranks import free_ports, together, wait_for

BALLAST = 256 << 20  # bytes
# A process without torch: a keeper, memory, and a socket whose end is seen here.
KEPT = f"""
import importlib.machinery, importlib.util, socket, sys, threading, time, os, signal
loader = importlib.machinery.ExtensionFileLoader("_C", sys.argv[1])
_C = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
loader.exec_module(_C)
memory = bytearray(b"1") * {BALLAST}
sock = socket.socket(fileno=int(sys.argv[2]))
"""
MAKE = "keeper = _C.Keeper(); sock.send(b'%d ' % keeper.pid); "


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status; nothing where there is no such process, or only what is left of one."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    found = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {} if found["State"].startswith("Z") else found


@contextmanager
def kept(script: str) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket, int]]:
    """A process that makes a keeper, our end of its socket, and its keeper's process id."""
    ours, its = socket.socketpair(type=socket.SOCK_SEQPACKET)  # what is sent at once, comes at once
    arguments = [sys.executable, "-S", "-c", KEPT + script, _C.__file__, str(its.fileno())]
    process = subprocess.Popen(arguments, pass_fds=[its.fileno()])
    its.close()
    ours.settimeout(60)
    try:
        keeper = int(ours.recv(16))
        wait_for(lambda: status(keeper).get("Name") in (None, "astra-keeper"))
        yield process, ours, keeper
    finally:
        process.kill()
        process.wait()
        ours.close()


def test_sockets_close_before_memory_is_freed() -> None:
    with kept(MAKE + "time.sleep(60)") as (process, ours, keeper):
        os.kill(keeper, signal.SIGSTOP)  # so the memory stays as long as we look
        process.kill()
        assert ours.recv(1) == b""
        process.wait()
        assert int(status(keeper)["VmRSS"].split()[0]) << 10 >= BALLAST
        os.kill(keeper, signal.SIGCONT)
        wait_for(lambda: not status(keeper))


@pytest.mark.parametrize("end", ["sys.exit()", "os._exit(3)", "del keeper; time.sleep(60)"])
def test_it_ends_with_its_process_or_object(end: str) -> None:
    with kept(MAKE + end) as (_, _, keeper):
        wait_for(lambda: not status(keeper))


def test_it_is_no_child_and_has_no_signals_and_no_files() -> None:
    script = """
def make():
    global keeper
    keeper = _C.Keeper()
maker = threading.Thread(target=make)  # which ends, and its thread-local memory with it
maker.start(); maker.join()
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
os.kill(keeper.pid, signal.SIGTERM)
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    heard.append(2)
if os.fork() == 0:  # a fork has none, and must not end this one's
    del keeper
    os._exit(0)
os.wait()
sock.send(b"%d " % keeper.pid)
sock.send(b"%r" % heard)
time.sleep(60)
"""
    with kept(script) as (process, ours, keeper):
        assert ours.recv(16) == b"[2]"
        found = status(keeper)
        assert found["Name"] == "astra-keeper"
        assert found["PPid"] == str(process.pid)
        files = [os.readlink(entry) for entry in Path(f"/proc/{keeper}/fd").iterdir()]
        kinds = sorted(file.partition(":")[0] for file in files)
        assert kinds == ["anon_inode", "pipe"]  # its death, and its replacement by execve
        os.kill(keeper, signal.SIGKILL)  # nothing depends on it
        process.kill()
        assert ours.recv(1) == b""


def test_connect_makes_one() -> None:
    peers = free_ports(2)
    meshes = together([lambda rank=rank: connect(rank, 2, peers) for rank in range(2)])
    keepers = [mesh.keeper for mesh in meshes]
    assert all(keeper is not None and status(keeper.pid) for keeper in keepers)
    together([mesh.close for mesh in meshes])
    pids = [keeper.pid for keeper in keepers if keeper is not None]
    del meshes, keepers
    assert not any(status(pid) for pid in pids)
    with connect(0, 1) as alone:
        assert alone.keeper is None


def test_where_the_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(_C, "Keeper", refuse)
    peers = free_ports(2)
    meshes = together([lambda rank=rank: connect(rank, 2, peers) for rank in range(2)])
    assert [mesh.keeper for mesh in meshes] == [None, None]
    together([mesh.close for mesh in meshes])
