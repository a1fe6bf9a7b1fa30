"""Wheel and sdist in an environment of their own, which has the base dependencies only.

    python -m tests.install --torch torch==2.13.0 --folder build/install

Makes the environment in the folder, installs torch first, then each of the two, and tries there
what a new user tries. `make test-install` calls it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTS = """
import sys
import astra_runtime.cli
assert "torch" not in sys.modules, "the command imports torch for its help"
import torch
import astra_kernels as ak
from astra_runtime import Plan, local_mesh
assert astra_runtime.cli.__file__.startswith(sys.prefix), astra_runtime.cli.__file__
codes = torch.arange(1000, dtype=torch.int32)
assert torch.equal(ak.unpack(ak.pack(codes, 10), 10, 1000), codes)
extras = {"transformers", "triton", "cryptography", "tqdm", "starlette", "uvicorn"}
absent = extras & sys.modules.keys()
assert not absent, absent
"""
# Commands that need no extra, and those that do, with the extra that each has to name.
BASE = (["--help"], ["--version"], ["keys", "--help"], ["run", "--help"])
EXTRAS = {
    "demo": "models",
    "fit --output book": "models",
    "finetune --control exact --output adapted": "models",
    "eval": "models",
    "run --prompt x": "models",
    "worker --rank 1 --peers 127.0.0.1:1,127.0.0.1:2": "models",
    "plan": "models",
    "keys init --ranks 2": "security",
}


def call(*command: str | Path, status: int = 0, **environment: str) -> str:
    """What a command printed; fails unless it ended so."""
    done = subprocess.run(
        command,
        cwd=tempfile.gettempdir(),  # not the checkout, whose packages would be imported
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != status:
        raise SystemExit(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}")
    return done.stdout


def try_out(bin_folder: Path, cache: Path) -> None:
    call(bin_folder / "python", "-c", IMPORTS)
    astra = bin_folder / "astra"
    for arguments in BASE:
        call(astra, *arguments)
    for command, extra in EXTRAS.items():
        said = call(astra, *command.split(), status=1, ASTRA_CACHE=str(cache))
        if f'pip install "astra-inference[{extra}]"' not in said or "Traceback" in said:
            raise SystemExit(
                f"astra {command}: expected the extra {extra} to be named, got: {said}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="torch==2.13.0", help="installed first")
    parser.add_argument("--constraints", default=os.devnull, help="versions of the rest")
    parser.add_argument("--folder", type=Path, required=True, help="for environment and packages")
    options = parser.parse_args()
    folder = options.folder.resolve()
    environment, built = folder / "venv", folder / "dist"
    pip = [environment / "bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    constraints = ["-c", (ROOT / options.constraints).resolve()]
    if not (environment / "bin/python").exists():
        venv.create(environment, with_pip=True)
    print(f"installing {options.torch}, numpy and safetensors", flush=True)
    call(*pip, "install", *constraints, options.torch, "numpy", "safetensors")
    print("building wheel and sdist", flush=True)
    call("rm", "-rf", built)
    call(*pip, "wheel", "--no-deps", "--wheel-dir", built, ROOT)
    source = f"import os; os.chdir({str(ROOT)!r}); from setuptools import build_meta as build; "
    call(sys.executable, "-c", source + f"build.build_sdist({str(built)!r})")
    for package in (*built.glob("*.whl"), *built.glob("*.tar.gz")):
        print(f"trying {package.name}", flush=True)
        call(*pip, "install", *constraints, "--force-reinstall", "--no-deps", package)
        call(*pip, "check")
        try_out(environment / "bin", folder / "cache")
    print("wheel and sdist work with the base dependencies alone")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
