"""Models whose weights are integers: every linear layer of the blocks, and the token embeddings.

A form of a model is what its weights are kept in: "float32", "bfloat16", "int8" or "int4". With
int8, every 64 weights of an output have a scale; with int4, every 32 a scale and a minimum. Token
embeddings, and the head that shares them, have 8 bits in both. Norms, positions,
biases and what else is small stay fp32, and so do activations outside of the products
(`ak.quantized_linear` rounds what enters a product to 8 bits, each token by itself, so a rank
computes of a token what the single device does).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astra_kernels import _direct as direct
from astra_kernels.quantized_linear._checks import SCALES, VECTORS
from astra_kernels.quantized_linear.reference import dequantized

GROUP = 32  # weights of 4 bits that share a scale and a minimum
SIGNED_GROUPS = (64, 48, 32)  # of 8 bits that share a scale: the first that fits
ROWS = 4096  # of a weight that are rounded at a time, so that little more than it is in memory
BITS = {"int8": 8, "int4": 4}  # of a linear layer's weights, by form


def quantize_signed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Floating point [N, K] -> int8 [N, K] and scales fp32 [N, K/64], one a group of consecutive
    weights; where K cannot be cut so, one of fewer, or [N, 1].

    Raises:
        ValueError: a weight is not finite.
    """
    outputs, inputs = weight.shape
    group = next((size for size in SIGNED_GROUPS if inputs % size == 0), inputs)
    integers = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(outputs, inputs // group, dtype=torch.float32)
    for start in range(0, outputs, ROWS):
        rows = _finite(weight[start : start + ROWS]).unflatten(1, (-1, group))
        scale = rows.abs().amax(-1, keepdim=True) / 127
        scales[start : start + ROWS] = scale[..., 0]
        integers[start : start + ROWS] = (rows / _divisor(scale)).round_().flatten(1)
    return integers, scales


def quantize_groups(weight: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor, Tensor]:
    """Floating point [N, K] -> uint8 [N, K/2], two weights a byte, and scales and minima, bfloat16
    [N, K/group], one of each a group of consecutive weights.

    Raises:
        ValueError: a weight is not finite, or K is no multiple of an even `group`.
    """
    outputs, inputs = weight.shape
    if group % 2 or inputs % group:
        raise ValueError(f"group: expected an even part of {inputs} columns, got {group}")
    halves = torch.empty(outputs, inputs // 2, dtype=torch.uint8)
    scales, minima = torch.empty(2, outputs, inputs // group, dtype=torch.bfloat16)
    for start in range(0, outputs, ROWS):
        rows = _finite(weight[start : start + ROWS]).unflatten(1, (-1, group))
        low, high = rows.aminmax(dim=-1)
        # as they are kept: what is rounded is rounded to these
        low = low.bfloat16()
        scale = ((high - low.float()) / 15).bfloat16()
        levels = (rows - low.float()[..., None]) / _divisor(scale.float())[..., None]
        levels = levels.round_().clamp_(0, 15).to(torch.uint8).flatten(1)
        halves[start : start + ROWS] = levels[:, ::2] | levels[:, 1::2] << 4
        scales[start : start + ROWS], minima[start : start + ROWS] = scale, low
    return halves, scales, minima


def _finite(weight: Tensor) -> Tensor:
    if not bool(weight.isfinite().all()):
        raise ValueError("weight: expected finite values, got NaN or infinity")
    return weight.float()


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class QuantizedLinear(nn.Module):
    """`nn.Linear` of integers, in evaluation: no gradient to its weights.

    Attributes:
        weight: int8 [out_features, in_features], or uint8 [out_features, in_features / 2].
        scale, minimum: [out_features, groups]; minimum None with 8 bits.
        bias: fp32 [out_features], or None.
    """

    minimum: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, weight: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.out_features = len(weight)
        self.in_features = weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
        self.weight, self.scale = _fixed(weight), _fixed(scale)
        self.minimum = None if minimum is None else _fixed(minimum)
        self.bias = None if bias is None else _fixed(bias)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, bits: int) -> QuantizedLinear:
        """Of floating-point weights [N, K]; of 4 bits where K can be cut into groups, else 8."""
        bias = None if bias is None else bias.detach().float()
        if bits == 4 and weight.shape[1] % GROUP == 0:
            return cls(*quantize_groups(weight.detach()), bias)
        return cls(*quantize_signed(weight.detach()), None, bias)

    def forward(self, vectors: Tensor) -> Tensor:
        if torch.is_grad_enabled() and vectors.requires_grad:  # codes are fitted through the model
            weight = dequantized(self.weight, self.scale, self.minimum).to(vectors.dtype)
            return F.linear(vectors, weight, None if self.bias is None else self.bias.to(weight))
        if vectors.dtype not in VECTORS:
            return QuantizedLinear.forward(self, vectors.float()).to(vectors.dtype)
        scale: Tensor = self.scale
        minimum: Tensor | None = self.minimum
        bias: Tensor | None = self.bias
        if scale.dtype not in SCALES:  # the model was converted
            scale, minimum = scale.float(), None if minimum is None else minimum.float()
        if bias is not None and bias.dtype != torch.float32:
            bias = bias.float()
        return direct.quantized_linear(vectors, self.weight, scale, minimum, bias)

    def extra_repr(self) -> str:
        bits = 4 if self.weight.dtype == torch.uint8 else 8
        return f"{self.in_features}, {self.out_features}, bits={bits}, bias={self.bias is not None}"


class QuantizedEmbedding(nn.Module):
    """`nn.Embedding` of 8 bits: weight int8 [num_embeddings, D], scale fp32 [num_embeddings, G]."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight, self.scale = _fixed(weight), _fixed(scale)

    def forward(self, ids: Tensor) -> Tensor:
        grouped = F.embedding(ids, self.weight).unflatten(-1, (self.scale.shape[1], -1))
        return (grouped * F.embedding(ids, self.scale)[..., None]).flatten(-2)


def is_quantized(model: nn.Module) -> bool:
    """Whether any of its layers is of integers, ours or another library's."""
    kept = (value for value in model.state_dict().values() if isinstance(value, Tensor))
    if any(isinstance(module, QuantizedLinear | QuantizedEmbedding) for module in model.modules()):
        return True
    # torch's own quantized layers pack their weights in entries that are no tensors
    packed = any(not isinstance(value, Tensor | None) for value in model.state_dict().values())
    return packed or any(tensor.dtype == torch.int8 or tensor.is_quantized for tensor in kept)


def form_of(model: nn.Module) -> str:
    """What the weights are kept in: "float32", "bfloat16", …, "int8", "int4", or "quantized"."""
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if linears:
        few = any(linear.weight.dtype == torch.uint8 for linear in linears)
        return "int4" if few else "int8"
    if is_quantized(model):
        return "quantized"
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return str(dtype).removeprefix("torch.")


def activation_dtype(module: nn.Module) -> torch.dtype | None:
    """What goes from layer to layer has it: the dtype of the first weight that is no scale; None:
    all weights are integers."""
    for name, parameter in module.named_parameters():
        scales = name.endswith((".scale", ".minimum"))
        if parameter.is_floating_point() and not scales:
            return parameter.dtype
    return None


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights in memory, each tensor once however many layers share it."""
    kept: dict[int, int] = {}
    for value in model.state_dict().values():
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, Tensor) and not tensor.is_quantized:
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
            elif isinstance(tensor, Tensor):
                kept[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(kept.values())


def quantizable(model: Any, blocks: list[nn.Module]) -> dict[str, str]:
    """What becomes integers, by name: "linear", "conv1d" (transposed), "embedding" or "head".

    Every linear layer of the blocks, the token embeddings, and the head that makes logits of them.
    """
    from transformers.pytorch_utils import Conv1D

    kinds: dict[str, str] = {}
    names = {id(module): name for name, module in model.named_modules()}
    for block in blocks:
        for module in block.modules():
            if type(module) is nn.Linear:
                kinds[names[id(module)]] = "linear"
            elif type(module) is Conv1D:
                kinds[names[id(module)]] = "conv1d"
    embeddings = model.get_input_embeddings()
    if type(embeddings) is nn.Embedding and embeddings.max_norm is None:
        kinds[names[id(embeddings)]] = "embedding"
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        kinds[names[id(head)]] = "head"
    return kinds


def quantized_module(kind: str, weight: Tensor, bias: Tensor | None, form: str) -> nn.Module:
    """The layer of integers in place of one of `quantizable`'s kinds; weight as that layer's."""
    if kind == "embedding":
        return QuantizedEmbedding(*quantize_signed(weight.detach()))
    if kind == "conv1d":
        weight = weight.T
    return QuantizedLinear.of(weight, bias, 8 if kind == "head" else BITS[form])


def tie_head(model: Any) -> None:
    """The head reads the embeddings' own integers, as it read their weights."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    head.weight, head.scale = embeddings.weight, embeddings.scale
