"""gloo between two network namespaces where each believes to be reached at its loopback."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.runtime.ranks import environment

pytestmark = pytest.mark.faults
LIMIT = 6.0
JOIN = """
import sys, time
import astra_runtime.transport.distributed  # torch, which takes seconds
from astra_runtime import ConnectFailed, connect
began = time.monotonic()
try:
    connect(int(sys.argv[1]), 2, ["10.79.0.1:29500", "10.79.0.2:29500"], backend="gloo",
            insecure=True, connect_timeout=float(sys.argv[2]))
except ConnectFailed:
    print(time.monotonic() - began)
"""
NETS = """
trap 'ip netns del astraGA; ip netns del astraGB' EXIT
set -e
ip netns add astraGA; ip netns add astraGB
ip link add astraVA netns astraGA type veth peer name astraVB netns astraGB
for x in A:1 B:2; do
  ip -n astraG${x%:*} addr add 10.79.0.${x#*:}/24 dev astraV${x%:*}
  ip -n astraG${x%:*} link set astraV${x%:*} up
  ip -n astraG${x%:*} link set lo up
done
ip netns exec astraGB "$PYTHON" -c "$SCRIPT" 1 $LIMIT &
ip netns exec astraGA "$PYTHON" -c "$SCRIPT" 0 $LIMIT
wait
"""


def test_gloo_waits_no_longer_than_asked() -> None:
    if (
        shutil.which("ip") is None
        or subprocess.run(["unshare", "-n", "true"], check=False).returncode
    ):
        pytest.skip("needs network namespaces, so root, and iproute2")
    done = subprocess.run(
        ["bash", "-c", NETS],
        env=environment() | {"PYTHON": sys.executable, "SCRIPT": JOIN, "LIMIT": str(LIMIT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=100,
        check=False,
    )
    seconds = [float(line) for line in done.stdout.split()]
    assert len(seconds) == 2
    assert max(seconds) < 2 * LIMIT
