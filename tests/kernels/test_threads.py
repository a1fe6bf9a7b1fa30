"""Whose threads the C++ kernels work on, and that answers do not depend on it."""

from __future__ import annotations

import subprocess
import sys
import threading

import torch

from astra_kernels.attention.native import attention

# Threads of this process after an op of torch and one of ours, each on three; and the same op in a
# forked child, where torch's threads are gone.
COUNTED = """
import os, torch
import astra_kernels as ak
torch.set_num_threads(3)
with torch.inference_mode():
    vectors = torch.randn(1 << 20)
    vectors.exp()
    before = len(os.listdir("/proc/self/task"))
    query, key, value = torch.randn(3, 1, 4, 300, 64)
    out = ak.attention(query, key, value, impl="native")[0]
    again = ak.attention(query, key, value, impl="native")[0]
    assert torch.equal(out, again)
    expected = out.numpy().tobytes()
    print(before, len(os.listdir("/proc/self/task")), flush=True)
    child = os.fork()
    if not child:
        out = ak.attention(query, key, value, impl="native")[0]
        os._exit(0 if out.numpy().tobytes() == expected else 1)  # torch's ops may wait for ever
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_torchs_threads_do_the_work_and_a_forked_child_has_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COUNTED],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after == before >= 3


def test_more_or_fewer_threads_and_several_callers_give_the_same_bits() -> None:
    query, key, value = torch.randn(3, 1, 4, 300, 64)
    before = torch.get_num_threads()
    found: list[torch.Tensor] = []

    def work(threads: int) -> None:
        torch.set_num_threads(threads)
        found.extend(attention(query, key, value)[0] for _ in range(20))

    try:
        for threads in (1, 4, 2, 3):
            work(threads)
        callers = [threading.Thread(target=work, args=(threads,)) for threads in (2, 3, 4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        torch.set_num_threads(before)
    assert len(found) == 140
    assert all(torch.equal(out, found[0]) for out in found)
