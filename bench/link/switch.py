"""A link for real processes: network namespaces, TUN devices, and a switch in user space.

    with Namespaces(2, Link(10, rtt_ms=2)) as net:
        ranks = [net.launch(r, [sys.executable, "rank.py", *net.addresses]) for r in range(2)]
        codes = [rank.wait() for rank in ranks]
        net.report()                       # packets, bytes, lateness, the switch's share of a core

Each rank has a network namespace of its own with loopback and one TUN device, whose packets go
through `switch.cpp`. Kernel shapers will not do: `netem` may be missing, and a token bucket lets
what is smaller than its burst pass free, which are the very messages that matter here. A TUN device
carries IP packets, so no address resolution disturbs the first message; framing is added to every
packet's size.

The switch is C++: in Python a packet costs 25 µs of a core, and 500 Mbit/s have 41,000 a second in
each direction. It is compiled at first use (`c++`, or what `CXX` names) into `build/link`. It takes
part of a core that ranks may need, `Report.cpu_share` says how much, and runs ahead of them
(SCHED_FIFO) where allowed, so that a rank that computes makes no message late. A message is late
all the same by the time that the switch takes to wake up, twice; `bench.link` measures it.

Namespaces have no names: they live as long as this process holds them or a process runs in them, so
nothing is left behind even if this process is killed. Nothing outside of them is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from bench.link.model import MTU, Link

T = TypeVar("T")
SOURCE: Final = Path(__file__).with_name("switch.cpp")
BUILD: Final = Path(__file__).resolve().parents[2] / "build" / "link"
NETWORK: Final = "10.77.0"
MOST: Final = 250  # ranks: the last byte of an address names one
DEVICE: Final = b"link0"
_CLONE_NEWNET: Final = 0x40000000
_TUNSETIFF: Final = 0x400454CA
_IFF_TUN_NO_PI: Final = 0x1001
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C
_SIOCSIFMTU, _SIOCSIFTXQLEN = 0x8922, 0x8943
_UP: Final = 0x1
_QUEUE: Final = 10_000  # packets that the kernel keeps while the switch is busy


class LinkUnavailable(RuntimeError):
    """This machine cannot have the switch. The sentence says why."""


def unavailable() -> str:
    """Why there can be no switch here, or an empty string."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "there is no /dev/net/tun that may be opened"
    if shutil.which("nsenter") is None:
        return "there is no nsenter (util-linux)"
    if shutil.which(compiler()) is None:
        return f"there is no C++ compiler ({compiler()})"
    try:
        _in_thread(_unshare)
    except OSError as error:
        return f"a network namespace was refused: {error.strerror}"
    return ""


def compiler() -> str:
    return os.environ.get("CXX", "c++").split()[0]


def build() -> Path:
    """The switch's program, compiled if its source has changed."""
    source = SOURCE.read_bytes()
    program = BUILD / f"switch-{hashlib.sha256(source).hexdigest()[:16]}"
    if not program.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        fresh = program.with_suffix(f".{os.getpid()}")  # others may build at the same time
        options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"]
        compiled = subprocess.run(
            [compiler(), *options, str(SOURCE), "-o", str(fresh)], capture_output=True, text=True
        )
        if compiled.returncode:
            raise LinkUnavailable(f"the switch does not compile: {compiled.stderr.strip()}")
        fresh.replace(program)
    return program


@dataclass(frozen=True)
class Report:
    """What crossed the switch since it started, or between two reports.

    `packets`, `bytes`: handed over, IP headers included. `lost`: by the link's `loss`. `dropped`:
    not from one rank to another, or refused by the receiver's kernel.
    `late_mean`, `late_max`: seconds by which packets were handed over after their moment (the
    maximum is since the start). `cpu`, `wall`: seconds.
    """

    packets: int
    bytes: int
    lost: int
    dropped: int
    late_mean: float
    late_max: float
    cpu: float
    wall: float

    @property
    def cpu_share(self) -> float:
        """Of one core."""
        return self.cpu / self.wall if self.wall else 0.0

    def __sub__(self, other: Report) -> Report:
        packets = self.packets - other.packets
        late = self.late_mean * self.packets - other.late_mean * other.packets
        return Report(
            packets,
            self.bytes - other.bytes,
            self.lost - other.lost,
            self.dropped - other.dropped,
            late / packets if packets else 0.0,
            self.late_max,
            self.cpu - other.cpu,
            self.wall - other.wall,
        )


class Namespaces:
    """`count` namespaces behind one switch; `addresses[rank]` is a rank's IPv4 address.

    Use it in a `with` block: on the way out, also of an exception or of Ctrl-C, every process that
    `launch` started is ended, the switch stops, and the namespaces are gone.
    """

    def __init__(self, count: int, link: Link) -> None:
        if not 2 <= count <= MOST:
            raise ValueError(f"count: expected 2..{MOST}, got {count}")
        if link.tls:
            raise ValueError("link: tls is for the virtual link; here the sockets encrypt")
        self.link = link
        self.addresses = [f"{NETWORK}.{rank + 1}" for rank in range(count)]
        self._namespaces: list[int] = []
        self._processes: list[subprocess.Popen[Any]] = []
        self._switch: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._started = 0.0

    def __enter__(self) -> Self:
        reason = unavailable()
        if reason:
            raise LinkUnavailable(reason)
        program = build()
        tuns: list[int] = []
        try:
            for address in self.addresses:
                namespace, tun = _in_thread(partial(_make, address))
                self._namespaces.append(namespace)
                tuns.append(tun)
            self._start(program, tuns)
        except BaseException:
            self.close()
            raise
        finally:
            for tun in tuns:  # the switch has them now
                os.close(tun)
        return self

    def _start(self, program: Path, tuns: Sequence[int]) -> None:
        link = self.link
        self._control, theirs = socket.socketpair()
        self._control.settimeout(10)
        values = (link.mbit_per_s, link.rtt_ms / 2, link.jitter_ms, link.loss, link.ethernet)
        numbers = [*(repr(v) for v in values), link.seed, theirs.fileno(), *tuns]
        with theirs:
            self._switch = subprocess.Popen(
                [str(program), *map(str, numbers)],
                pass_fds=[theirs.fileno(), *tuns],
                start_new_session=True,  # Ctrl-C is for us; the end of our socket is for the switch
            )
        self._started = self._ask()["clock"]

    def _ask(self, what: bytes = b"?") -> dict[str, Any]:
        assert self._control is not None, "the switch runs inside of the with block"
        self._control.sendall(what)
        line = b""
        while not line.endswith(b"\n"):
            part = self._control.recv(4096)
            if not part:
                raise LinkUnavailable("the switch has stopped")
            line += part
        answer: dict[str, Any] = json.loads(line)
        return answer

    def report(self) -> Report:
        """What crossed the switch so far; subtract two of them."""
        counters = self._ask()
        wall = counters.pop("clock") - self._started
        return Report(**counters, wall=wall)

    def cut(self) -> None:
        """From now on every packet is lost, in all directions, and nobody is told."""
        self._ask(b"x")

    def launch(self, rank: int, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Starts a process in a rank's namespace; `options` are those of `subprocess.Popen`."""
        enter = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self._namespaces[rank]}", "--"]
        process = subprocess.Popen([*enter, *command], **options)
        self._processes.append(process)
        return process

    def inside(self, rank: int, call: Callable[[], T]) -> T:
        """Calls `call` on a thread in a rank's namespace. Sockets made there stay there, whoever
        uses them."""

        def enter() -> T:
            _setns(self._namespaces[rank])
            return call()

        return _in_thread(enter)

    def close(self) -> None:
        """Ends everything; may be repeated."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._processes.clear()
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._switch is not None:
            try:
                self._switch.wait(5)
            except subprocess.TimeoutExpired:
                self._switch.send_signal(signal.SIGKILL)
                self._switch.wait()
            self._switch = None
        while self._namespaces:
            os.close(self._namespaces.pop())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _in_thread(call: Callable[[], T]) -> T:
    """Calls on a thread of its own, with which the namespace it entered is left again."""
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def _libc(name: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _unshare() -> None:
    _libc("unshare", _CLONE_NEWNET)


def _setns(namespace: int) -> None:
    _libc("setns", namespace, _CLONE_NEWNET)


def _make(address: str) -> tuple[int, int]:
    """A namespace with loopback and a TUN device that has `address`: descriptors of both."""
    _unshare()
    with contextlib.suppress(FileNotFoundError):  # no IPv6, no router solicitations on the link
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    with contextlib.ExitStack() as undo:
        namespace = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)
        undo.callback(os.close, namespace)
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        undo.callback(os.close, tun)
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", DEVICE, _IFF_TUN_NO_PI))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
            settings: Mapping[int, bytes] = {
                _SIOCSIFADDR: _ipv4(address),
                _SIOCSIFNETMASK: _ipv4("255.255.255.0"),
                _SIOCSIFMTU: struct.pack("i20x", MTU),
                _SIOCSIFTXQLEN: struct.pack("i20x", _QUEUE),
                _SIOCSIFFLAGS: struct.pack("H22x", _UP),
            }
            for request, value in settings.items():
                fcntl.ioctl(handle, request, struct.pack("16s24s", DEVICE, value))
            fcntl.ioctl(handle, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _UP))
        undo.pop_all()
    return namespace, tun


def _ipv4(address: str) -> bytes:
    return struct.pack("HH4s16x", socket.AF_INET, 0, socket.inet_aton(address))
