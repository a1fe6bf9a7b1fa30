"""A block's projection of keys and values as one product, for kernels that make it from codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import astra_kernels as ak

from .during_calls import set_forward


@dataclass(frozen=True, eq=False)
class Projection:
    """Keys and values of block inputs x: n(x) Wᵀ + b, with the norm's gain and shift in W and b.

    Attributes:
        weight: [2·Hkv·d, D], all keys, then all values. bias: [2·Hkv·d], None for zeros.
        norm, eps: n, as `ak.lookup_linear` takes it.
    """

    weight: Tensor
    bias: Tensor | None
    norm: str | None
    eps: float = 1e-6


def is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether a module is what its class says alone: no adapter, no hook, no patch."""
    return (
        type(module) in kinds
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and set_forward(module) is None
    )


RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


def _is_own(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


@torch.no_grad()
def joined(linears: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of several linear layers of one input; None: they are more than that."""
    if not all(is_plain(linear, nn.Linear) for linear in linears):
        return None
    weights: list[Any] = [linear.weight for linear in linears]
    biases: list[Any] = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return torch.cat(weights), None
    pairs = zip(biases, weights, strict=True)
    filled = [weight.new_zeros(len(weight)) if bias is None else bias for bias, weight in pairs]
    return torch.cat(weights), torch.cat(filled)


@torch.no_grad()
def folded(norm: Any, weight: Tensor, bias: Tensor | None) -> Projection | None:
    """The projection behind `norm`, a layer norm or transformers' RMS norm; None: it is another."""
    if is_plain(norm, nn.LayerNorm):
        kind, eps = "layer", norm.eps
    elif is_plain(norm, type(norm)) and type(norm).__name__ in RMS_NORMS and _is_own(norm):
        kind, eps = "rms", norm.variance_epsilon
    else:
        return None
    weight, bias = ak.fold_norm(weight, bias, norm.weight, getattr(norm, "bias", None))
    return Projection(weight, bias, kind, float(eps))
