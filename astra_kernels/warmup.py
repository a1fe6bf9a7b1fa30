"""Compiling and tuning before the first call that is in a hurry."""

from __future__ import annotations

from collections.abc import Callable

import torch

from astra_kernels._dispatch import has_triton

__all__ = ["warmup"]


def warmup(call: Callable[[], object], *, tune: bool = True) -> dict[str, dict[str, int]]:
    """Runs ``call``, compiling its kernels, and finds the quickest tiles for them on this device.

    No other function of this package measures anything: without it, kernels run with tiles that are
    good on the devices we know. What is found is kept on disk (``$ASTRA_CACHE`` or
    ``~/.cache/astra``, in ``tiles/``) and used by every later process on the same kind of device
    with the same version of Triton.

    Args:
        call: takes no arguments; runs the ops as they will be run, with tensors of the shapes to
            come. It is called some hundred times, so it should change nothing.
        tune: whether to measure tiles; otherwise kernels are only compiled.

    Returns:
        For each kernel that was tuned, its problem and the tile chosen. Empty without CUDA.

    Call it before a CUDA graph is captured, too: a kernel's first launch compiles and loads it.

    Example:
        >>> query, tables = torch.randn(1, 8, 1, 64), torch.randn(2, 2, 1, 1024, 64)
        >>> codes = torch.zeros(1, 300, 2, dtype=torch.int32)
        >>> tiles = ak.warmup(lambda: ak.coded_attention(query, codes, *tables), tune=False)
    """
    if has_triton():
        from astra_kernels._triton import launch, tuning

        if tune and (torch.cuda.is_available() or launch.interpreted()):
            return tuning.tune(call)
    call()
    return {}
