"""How a mesh ends in processes of their own: forks, exec, a death, and the helper task."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..ranks import environment, free_ports, wait_for

JOIN = """
import os, sys, time
import astra_runtime as astra
from astra_runtime.transport import connect
rank, peers = int(sys.argv[1]), sys.argv[2].split(",")
mesh = connect(rank, 2, peers, timeout=30, **eval(sys.argv[3]))
"""


@contextlib.contextmanager
def ranks(*scripts: str, options: str = "{}") -> Iterator[list[subprocess.Popen[str]]]:
    peers = ",".join(free_ports(len(scripts)))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN + script, str(rank), peers, options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for rank, script in enumerate(scripts)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


LISTEN = """
print("up", flush=True)
try:
    mesh.receive({0: 8}, block=0, plan=0)
except astra.AstraError as error:
    print(f"{type(error).__name__}: {error}", flush=True)
"""


@pytest.mark.parametrize("backend", ["tcp", "datagram"])
def test_a_death_is_noticed_beside_a_forked_child(backend: str) -> None:
    fork = """
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
time.sleep(60)
"""
    with ranks(fork, LISTEN, options=repr({"backend": backend})) as (killed, listener):
        child = int(line(killed))
        try:
            assert line(listener) == "up"
            killed.kill()
            assert line(listener).startswith("PeerLost: rank 0 was lost")  # not DeadlineExceeded
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("link", ["None", "Link(1000, 0.1)"])
def test_a_forked_child_refuses_and_says_nothing(link: str) -> None:
    fork = """
read, write = os.pipe()
if os.fork() == 0:
    words = []
    for act in (
        lambda: mesh.send(b"child", block=0, plan=0, to=[1]),
        lambda: mesh.receive({1: 8}, block=0, plan=0),
        mesh.flush,
    ):
        try:
            act()
        except astra.AstraError as error:
            words.append(str(error))
    mesh.abort(RuntimeError("of the child"))
    mesh.close()
    os.write(write, repr(len(words) == 3 and all("fork" in word for word in words)).encode())
    os._exit(0)
print(os.read(read, 10).decode(), flush=True)
os.wait()
mesh.send(b"8 bytes.", block=0, plan=0, to=[1])
mesh.close()
"""
    answer = "print(bytes(mesh.receive({0: 8}, block=0, plan=0)[0]).decode(), flush=True)\n"
    options = f'{{"link": astra.transport.Link(1000, 0.1) if {link != "None"} else None}}'
    with ranks(fork, answer, options=options) as (parent, listener):
        assert line(parent) == "True"
        assert line(listener) == "8 bytes."


def holders(pid: int) -> list[int]:
    """KiB that each living helper task of a process holds."""
    sizes = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            text = status.read_text()
            if text.startswith("Name:\tastra-keeper") and f"PPid:\t{pid}\n" in text:
                _, _, size = text.partition("VmRSS:")  # there is none of one that is ending
                sizes += [int(size.split()[0])] if size else []
    return sizes


def test_exec_frees_the_old_memory() -> None:
    replace = """
memory = bytearray(b"1") * (200 << 20)
print("up", flush=True)
sys.stdin.readline()
new = "print('new', flush=True); import time; time.sleep(60)"
os.execv(sys.executable, [sys.executable, "-c", new])
"""
    with ranks(replace, "time.sleep(60)") as (process, _):
        assert line(process) == "up"
        assert max(wait_for(lambda: holders(process.pid))) > 200 << 10
        assert process.stdin is not None
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert line(process) == "new"
        wait_for(lambda: not holders(process.pid))


def test_close_ends_the_helper_task_without_the_collector() -> None:
    script = """
import gc
gc.disable()
pid = mesh.keeper.pid
mesh.close()
print(mesh.keeper, os.path.exists(f"/proc/{pid}"), flush=True)
"""
    with ranks(script, script) as processes:
        assert [line(process) for process in processes] == ["None False"] * 2
