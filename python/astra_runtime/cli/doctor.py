"""`astra doctor`: what this machine has, and whether it works."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import time
from typing import Any

from ..console import show_json

PACKAGES = ("torch", "numpy", "triton", "transformers", "gguf", "safetensors", "cryptography")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  astra doctor --json"
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(options: argparse.Namespace) -> int:
    checks = {
        "bit packing": _check_codec,
        "ops": _check_ops,
        "exchange on loopback": _check_exchange,
        "model smollm2": _check_model,
    }
    facts = _facts()
    results: dict[str, dict[str, Any]] = {}
    for name, check in checks.items():
        try:
            results[name] = {"ok": True, "detail": check()}
        except Exception as error:  # a doctor reports whatever is wrong
            results[name] = {"ok": False, "detail": f"{type(error).__name__}: {error}"}
    healthy = all(result["ok"] for result in results.values())
    if options.json:
        show_json({"facts": facts, "checks": results, "healthy": healthy})
    else:
        for name, value in facts.items():
            print(f"{name:24}{value}")
        for name, result in results.items():
            print(f"{name:24}{'ok' if result['ok'] else 'FAILED'}: {result['detail']}")
    return 0 if healthy else 1


def _facts() -> dict[str, Any]:
    import torch

    import astra_kernels._C as core
    from astra_kernels._cache import cache_folder

    versions = {
        name: importlib.metadata.version(name) if importlib.util.find_spec(name) else "absent"
        for name in PACKAGES
    }
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        **versions,
        "cores": os.cpu_count(),
        "simd of the codec": core.isa(),
        "gpu": gpu,
        "cache": str(cache_folder()),
    }


def _check_codec() -> str:
    import torch

    import astra_kernels as ak

    for bits in range(1, 17):
        codes = torch.arange(1000, dtype=torch.int32) % (1 << bits)
        if not torch.equal(ak.unpack(ak.pack(codes, bits), bits, 1000), codes):
            raise RuntimeError(f"{bits}-bit codes do not survive")
    return "every width survives"


def _check_ops() -> str:
    import torch

    import astra_kernels as ak

    generator = torch.Generator().manual_seed(0)
    query, tables = (
        torch.randn(1, 4, 8, 64, generator=generator),
        torch.randn(2, 2, 1, 16, 64, generator=generator),
    )
    codes = torch.randint(0, 16, (1, 32, 2), generator=generator, dtype=torch.int32)
    quick, _ = ak.coded_attention(query, codes, tables[0], tables[1])
    obvious, _ = ak.coded_attention(query, codes, tables[0], tables[1], impl="reference")
    error = float((quick - obvious).abs().max())
    if not error < 1e-4:
        raise RuntimeError(f"coded attention is {error:.2g} away from its reference")
    return f"coded attention within {error:.1g} of its reference"


def _check_exchange() -> str:
    from ..evaluate import run_ranks
    from ..transport import Mesh

    def work(mesh: Mesh) -> float:
        other, start = 1 - mesh.rank, time.perf_counter()
        for block in range(100):
            mesh.send(bytes(320), block=block, plan=0, to=[other])
            mesh.receive({other: 320}, block=block, plan=0)
        return (time.perf_counter() - start) / 100

    return f"{1e3 * max(run_ranks(2, work, timeout=10.0)):.3f} ms an exchange of 320 bytes"


def _check_model() -> str:
    from ..store import ModelNotFound, at_hand

    try:
        return at_hand("smollm2")
    except ModelNotFound as absent:
        return str(absent)  # only the demo needs it
