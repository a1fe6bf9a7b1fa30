from __future__ import annotations

import subprocess
import sys

import astra_kernels as ak

IMPORT = """
import sys, time

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import torch
start = time.process_time()
import astra_kernels
print(time.process_time() - start)
assert not {absent} & set(sys.modules)
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_lean_and_quick() -> None:
    """Without Triton and transformers, and in under 1.5 s of a processor more than torch (best of
    two)."""
    code = IMPORT.format(absent={"triton", "transformers", "safetensors", "sklearn", "faiss"})
    assert float(run(code)) < 1.5 or float(run(code)) < 1.5


def test_exports() -> None:
    assert all(callable(getattr(ak, name)) for name in ak.__all__)
