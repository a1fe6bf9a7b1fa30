"""`astra doctor`: what this machine has, and whether it works."""

from __future__ import annotations

import argparse
import glob
import importlib.metadata
import importlib.util
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ..console import show_json
from . import EXTRAS

BASE = ("torch", "numpy", "safetensors")
PACKAGES = (
    *("torch", "numpy", "triton", "transformers", "gguf", "accelerate", "tqdm", "safetensors"),
    *("cryptography", "starlette", "uvicorn", "prometheus_client"),
)

OF_MODELS = ("transformers", "gguf", "accelerate", "tqdm")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  astra doctor --json"
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(options: argparse.Namespace) -> int:
    facts = {name: _fact(find) for name, find in FACTS.items()}
    results = {name: _result(check) for name, check in CHECKS.items()}
    healthy = all(result["ok"] for result in results.values())
    if options.json:
        show_json({"facts": facts, "checks": results, "healthy": healthy})
    else:
        for name, value in facts.items():
            print(f"{name:24}{value}")
        for name, result in results.items():
            print(f"{name:24}{'ok' if result['ok'] else 'FAILED'}: {result['detail']}")
    return 0 if healthy else 1


def _fact(find: Callable[[], Any]) -> Any:
    try:
        return find()
    except Exception as error:  # the check of what is broken fails; the other facts are told
        return f"unknown ({type(error).__name__}: {error})"


def _result(check: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"ok": True, "detail": check()}
    except Exception as error:  # a doctor reports whatever is wrong
        return {"ok": False, "detail": f"{type(error).__name__}: {error}"}


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _version(package: str) -> str:
    if not _is_installed(package):
        return "absent"
    return importlib.metadata.version(package)


def _simd() -> str:
    import astra_kernels._C as core

    return core.isa()


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"


def _cache() -> str:
    from astra_kernels._cache import cache_folder

    return str(cache_folder())


def _check_packages() -> str:
    """What is installed can be imported; what the base installation lacks may be absent."""
    absent = []
    for package in PACKAGES:
        if not _is_installed(package):
            if package in BASE:
                raise ModuleNotFoundError(f"{package}, without which nothing works, is absent")
            absent.append(package)
        else:
            importlib.import_module(package)
    if not absent:
        return "all import"
    extras = ",".join(dict.fromkeys(EXTRAS[package] for package in absent))
    return f'all import; without {", ".join(absent)}: pip install "astra-inference[{extras}]"'


def _check_codec() -> str:
    import torch

    import astra_kernels as ak

    for bits in range(1, 17):
        codes = torch.arange(1000, dtype=torch.int32) % (1 << bits)
        if not torch.equal(ak.unpack(ak.pack(codes, bits), bits, 1000), codes):
            raise RuntimeError(f"{bits}-bit codes do not survive")
    return "every width survives"


def _check_ops() -> str:
    return _compare_ops("cpu")


def _compare_ops(device: str) -> str:
    """Coded attention and the search for codewords beside their references."""
    import torch

    import astra_kernels as ak

    generator = torch.Generator().manual_seed(0)
    query, tables = (
        torch.randn(1, 4, 8, 64, generator=generator).to(device),
        torch.randn(2, 2, 1, 16, 64, generator=generator).to(device),
    )
    codes = torch.randint(0, 16, (1, 32, 2), generator=generator, dtype=torch.int32).to(device)
    quick, _ = ak.coded_attention(query, codes, tables[0], tables[1])
    obvious, _ = ak.coded_attention(query, codes, tables[0], tables[1], impl="reference")
    error = float((quick - obvious).abs().max())
    if not error < 1e-4:
        raise RuntimeError(f"coded attention is {error:.2g} away from its reference")
    codebook = tables[0].squeeze(1)
    if not bool((torch.arange(16) == ak.encode(codebook.transpose(0, 1), codebook).cpu().T).all()):
        raise RuntimeError("codewords are not found where they are")
    return f"coded attention within {error:.1g} of its reference"


def _check_gpu() -> str:
    """A GPU that is there computes what the CPU does, or is broken."""
    import torch

    if torch.cuda.is_available():
        return _compare_ops("cuda")
    devices = glob.glob("/dev/nvidia[0-9]*")
    if devices and torch.version.cuda is not None:
        raise RuntimeError(f"{devices[0]} is there, and torch cannot use it: see nvidia-smi")
    return "none that this torch is built for" if devices else "none"


def _check_cache() -> str:
    from astra_kernels._cache import cache_folder

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(1 << 20))
        file.flush()
    return f"{folder} takes files"


def _check_exchange() -> str:
    from ..evaluate import run_ranks
    from ..transport import Mesh

    def work(mesh: Mesh) -> float:
        other, start = 1 - mesh.rank, time.perf_counter()
        payload = bytes(range(256)) + bytes(64)
        for block in range(100):
            mesh.send(payload, block=block, plan=0, to=[other])
            if bytes(mesh.receive({other: 320}, block=block, plan=0)[other]) != payload:
                raise RuntimeError("a frame came otherwise than it was sent")
        return (time.perf_counter() - start) / 100

    return f"{1e3 * max(run_ranks(2, work, timeout=10.0)):.3f} ms an exchange of 320 bytes"


def _check_keys() -> str:
    """Keys can be made and read again, and those of ASTRA_KEYS are good."""
    from ..transport import credentials
    from ..transport.certificates import can_make_keys, ephemeral_keys

    found = "none can be made without the package cryptography"
    if can_make_keys():
        with ephemeral_keys(2) as folder:
            credentials.Keys(folder).contexts(1)
        found = "made and read"
    named = os.environ.get(credentials.ENVIRONMENT)
    if not named:
        return found
    keys = credentials.Keys(named)
    for rank in keys.ranks() or [0]:
        keys.contexts(rank)
    return f"{found}; those of {credentials.ENVIRONMENT} are valid"


def _check_engine() -> str:
    """Two ranks of a tiny random model give what the model alone gives."""
    import torch

    if not _is_installed("transformers"):
        return "no models without the package transformers"
    import transformers

    from .. import Engine
    from ..evaluate import run_ranks
    from ..transport import Mesh

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 50}
    config = transformers.LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(12)[None]

    def work(mesh: Mesh) -> torch.Tensor:
        with Engine(model, None, mesh) as engine:
            logits: torch.Tensor = engine(input_ids=ids).logits
            return logits[0, -1]

    with torch.inference_mode():
        alone = model(ids).logits[0, -1]
    error = max(float((logits - alone).abs().max()) for logits in run_ranks(2, work, timeout=30.0))
    if not error < 1e-4:
        raise RuntimeError(f"two ranks are {error:.2g} away from one")
    return f"two ranks within {error:.1g} of one"


def _check_codebooks() -> str:
    """What earlier commands have fitted can be read."""
    from astra_kernels._cache import cache_folder

    from ..codes.codebook import Codebook

    folders = sorted(path.parent for path in cache_folder().glob("codebooks/*/astra_config.json"))
    for folder in folders:
        Codebook.from_pretrained(folder)
    return f"{len(folders)} in the cache, each whole"


def _check_model() -> str:
    from ..store import DamagedModel, ModelNotFound, at_hand

    try:
        found = at_hand("smollm2")
    except DamagedModel:
        raise
    except ModelNotFound as error:
        return str(error)  # only the demo needs it
    absent = [package for package in OF_MODELS if not _is_installed(package)]
    if not absent:
        return found
    needed = f"package{'s' if len(absent) > 1 else ''} {', '.join(absent)}"
    return f'{found}; to run it needs the {needed}: pip install "astra-inference[models]"'


FACTS: dict[str, Callable[[], Any]] = {
    "python": platform.python_version,
    **{package: partial(_version, package) for package in PACKAGES},
    "cores": os.cpu_count,
    "simd of the codec": _simd,
    "gpu": _gpu,
    "cache": _cache,
}
CHECKS = {
    "packages": _check_packages,
    "bit packing": _check_codec,
    "ops": _check_ops,
    "gpu": _check_gpu,
    "cache": _check_cache,
    "exchange on loopback": _check_exchange,
    "keys": _check_keys,
    "engine": _check_engine,
    "codebooks": _check_codebooks,
    "model smollm2": _check_model,
}
