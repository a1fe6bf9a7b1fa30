"""A few cases under pytest-benchmark, for comparing commits with its own tools.

    pytest bench/kernels/test_benchmarks.py --device cuda [--benchmark-compare]
    pytest bench/kernels/test_benchmarks.py --device cpu     # small shapes

Not part of the tests (pyproject's testpaths). The figures that are reported come from
`python -m bench.kernels`, which times the device alone; these are wall clock, launches included.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")
import torch

from bench.kernels.cases import small, specs
from bench.kernels.spec import Spec

REPRESENTATIVE = (
    "codeword_M1024_N32768_H32",
    "fused_lookup_rotary_M256_N8192_H32",
    "fused_lookup_subvectors_M256_N8192_H32",
    "decode_rotary_fused_packed_M1_N131072",
    "decode_plain_counts_M1_N131072",
    "encode_bfloat16_D768_G32",
    "mixed_M1024",
    "lookup_linear_T8192_G32",
)


def chosen() -> list[tuple[str, str, Spec]]:
    return [
        (name, impl, spec)
        for spec in specs()
        for impl, name in spec.variants.items()
        if any(re.match(pattern, name) for pattern in REPRESENTATIVE)
    ]


@pytest.mark.parametrize(
    ("impl", "spec"), [(impl, spec) for _, impl, spec in chosen()], ids=[n for n, _, _ in chosen()]
)
def test_speed(benchmark: Any, device: str, impl: str, spec: Spec) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if device == "cpu":
        spec = small(spec)
    torch.manual_seed(0)
    with torch.inference_mode():
        calls = spec.build(spec.shape, spec.dtype, torch.device(device))
        call = calls.ours[impl]
        call()

        def done() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.extra_info.update(impl=impl, **spec.shape)
        benchmark.pedantic(done, rounds=20, warmup_rounds=3)
