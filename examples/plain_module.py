"""Ten lines: a module of plain PyTorch whose attention is this package's.

`ak.scaled_dot_product_attention` has torch's name, signature and numbers, so a model changes by
replacing the name. What torch's function does not have (windows, softcap, sinks, keys and values
from codes, the log-sum-exp) stands in `ak.attention` and `ak.mixed_attention`.

    python examples/plain_module.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import astra_kernels as ak


class Attention(nn.Module):
    def __init__(self, size: int = 64, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.project, self.output = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, hidden: Tensor, attend: Any = ak.scaled_dot_product_attention) -> Tensor:
        parts = self.project(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.output(attend(*parts, is_causal=True).transpose(1, 2).flatten(2))


def main() -> float:
    """The largest difference from torch's own function, of outputs and of gradients."""
    torch.manual_seed(0)
    module, hidden = Attention(), torch.randn(2, 50, 64)
    found, want = module(hidden), module(hidden, nn.functional.scaled_dot_product_attention)
    weights = list(module.parameters())
    ours, theirs = (torch.autograd.grad(out.square().sum(), weights) for out in (found, want))
    differences = [(found - want).abs().max()]
    differences += [
        ((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)
    ]
    return float(torch.stack(differences).detach().max())


if __name__ == "__main__":
    print(f"largest difference from torch's function: {main():.1e}")
