"""What a chip can do, per second: the rates that rooflines are made of."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from bench.kernels.timing import Call, Gpu, on_cpu

COPY, DENSE, EXP, GATHER = 3.0e12, 800e12, 3.7e12, 5.5e12
# An fp32-accurate product takes three in tf32, at half the rate of 16-bit ones each.
FP32_OF_DENSE = 1 / 6


@dataclass(frozen=True)
class Ceilings:
    """Rates per second; infinite where nothing is known.

    Attributes:
        copy: bytes of device memory, read and written.
        dense, fp32: FLOP of 16-bit products and of fp32-accurate ones.
        exp: exponentials.
        gather: bytes of table rows read from the L2 cache, at random.
    """

    copy: float
    dense: float
    fp32: float
    exp: float
    gather: float = math.inf

    def known(self) -> dict[str, float]:
        return {name: rate for name, rate in dataclasses.asdict(self).items() if rate < math.inf}


NOMINAL = Ceilings(COPY, DENSE, DENSE * FP32_OF_DENSE, EXP, GATHER)


def measured_ceilings(
    device: torch.device, *, small: bool = False, kernels: bool = False, samples: int = 15
) -> Ceilings:
    """The rates of a device.

    Args:
        device: where they are measured.
        small: with tensors so small that a CPU is done at once.
        kernels: those as well that take a kernel of our own, which a CPU runs in Triton's
            interpreter only: `exp` and `gather`, else infinite.
        samples: of each call, on a CPU.
    """
    size = 512 if small else 8192
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = torch.randn(size * (size if small else 2 * size), device=device)
    target = torch.empty_like(source)
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    calls: dict[str, Call] = {
        "copy": lambda: target.copy_(source),
        "dense": lambda: left @ right,
    }
    work = {"copy": 2.0 * source.numel() * source.element_size(), "dense": 2.0 * size**3}
    if kernels:
        from bench.kernels import _probes

        for name, probe in _probes.probes(device, small=small).items():
            calls[name], work[name] = probe.call, probe.work
    if device.type == "cuda":
        times = Gpu().measure(calls)
    else:
        times = on_cpu(calls, seconds=0.1 if samples > 1 else 0.0, samples=samples)
    rates = {name: work[name] / (times[name].warm.p50 / 1e3) for name in calls}
    fp32 = rates["dense"] * (FP32_OF_DENSE if device.type == "cuda" else 1.0)
    return Ceilings(fp32=fp32, **{"exp": math.inf, **rates})
