"""Ranks that shut down in order while the cable of all their peers is unplugged."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.runtime.ranks import environment, free_ports

pytestmark = pytest.mark.faults
TIMEOUT = 4.0
UNPLUGGED = """
import subprocess, sys, time
from astra_runtime.transport import connect
rank, peers = int(sys.argv[1]), sys.argv[2].split(",")
mesh = connect(rank, len(peers), peers, timeout=float(sys.argv[3]))
if rank:
    time.sleep(60)
time.sleep(0.5)
subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
began = time.monotonic()
mesh.close()
print(time.monotonic() - began)
"""


@pytest.mark.parametrize("timeout", [1.0, TIMEOUT, 30.0])
def test_close_has_one_bound_for_all_peers(timeout: float) -> None:
    unshare = ["unshare", "-n"]
    if shutil.which("ip") is None or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("needs network namespaces, so root, and iproute2")
    peers = ",".join(free_ports(4))
    ranks = " & ".join(f'"{sys.executable}" -c "$SCRIPT" {n} {peers} {timeout}' for n in (1, 2, 3))
    last = f'"{sys.executable}" -c "$SCRIPT" 0 {peers} {timeout}'
    shell = f"ip link set lo up; {ranks} & {last}; kill -9 $(jobs -p)"
    done = subprocess.run(
        [*unshare, "bash", "-c", shell],
        env=environment() | {"SCRIPT": UNPLUGGED},
        stdout=subprocess.PIPE,
        text=True,
        timeout=100,
        check=False,
    )
    assert float(done.stdout) < min(timeout, 10.0) + 2.0
