"""A Transformer over a Hugging Face model's own weights, in pieces that can be given to ranks.

Nothing is copied: a rank's part of a weight is a view of it, so ranks that are threads of one
process share one model. ViT, GPT-2 and Llama differ in `_vit`, `_gpt2` and `_llama` only; all are
pre-norm, and a test holds each to the model's own forward pass.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import astra_kernels as ak
from astra_runtime.codes.rotary import rotate
from astra_runtime.models import Adapter, adapt
from astra_runtime.plan import Plan

Rope = tuple[Tensor, Tensor] | None  # cos and sin, [1, T, d]
ALL = slice(None)


@dataclass(frozen=True)
class Linear:
    """y = x Wᵀ + b with W [out, in], or some of its rows and columns."""

    weight: Tensor
    bias: Tensor | None

    def __call__(
        self, x: Tensor, rows: slice = ALL, columns: slice = ALL, *, biased: bool = True
    ) -> Tensor:
        bias = self.bias[rows] if self.bias is not None and biased else None
        return F.linear(x, self.weight[rows, columns], bias)


@dataclass(frozen=True)
class Norm:
    """Layer norm, or RMS norm where there is no bias; over some channels alone if asked to."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor, channels: slice = ALL) -> Tensor:
        weight = self.weight[channels]
        if self.bias is None:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, self.bias[channels], self.eps)


class Part(NamedTuple):
    """What of a block a rank computes.

    Attributes:
        heads: query heads, with the KV heads that they read; None: all.
        inner: channels between the matrices of the MLP.
        channels: of the block's input and output.
        biased: adds the biases of the output projection and of the MLP's last matrix; of ranks
            whose outputs are summed, one does.
    """

    heads: slice | None = None
    inner: slice = ALL
    channels: slice = ALL
    biased: bool = True


WHOLE = Part()


@dataclass(frozen=True)
class Block:
    """One pre-norm block: x + attention(norm(x)), then x + MLP(norm(x))."""

    norm1: Norm
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    norm2: Norm
    up: Linear
    gate: Linear | None
    down: Linear
    activation: Callable[[Tensor], Tensor]
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    causal: bool

    def queries(self, normed: Tensor, rope: Rope, part: Part = WHOLE) -> Tensor:
        """[B, H, M, d] of normed inputs [B, M, D], rotated to their positions."""
        heads = self._heads(part)
        flat = self.query(normed, self._flat(heads), part.channels)
        return rotate(self._split(flat), rope)

    def keys_values(self, normed: Tensor, rope: Rope, part: Part = WHOLE) -> tuple[Tensor, Tensor]:
        """[B, Hkv, L, d] each, of the KV heads that the part's query heads read."""
        heads, group = self._heads(part), self.heads // self.kv_heads
        rows = self._flat(slice(heads.start // group, (heads.stop - 1) // group + 1))
        key = rotate(self._split(self.key(normed, rows, part.channels)), rope)
        value = self._split(self.value(normed, rows, part.channels))
        # Heads may be cut inside a group; attention wants as many queries for each KV head.
        reads = [h // group - heads.start // group for h in range(heads.start, heads.stop)]
        if any(reads.count(n) != reads.count(0) for n in reads):
            key, value = key[:, reads], value[:, reads]
        return key, value

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """[B, M, H·d]: a decoder's queries are the last M of the L tokens, unless `bias` says.

        bias: [M, L], added to the scores; -inf hides a key.
        """
        if bias is None:
            out, _ = ak.attention(query, key, value, is_causal=self.causal, scale=self.scale)
        else:
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=bias, scale=self.scale, enable_gqa=True
            )
        return out.transpose(1, 2).flatten(2)

    def project(self, attended: Tensor, part: Part = WHOLE) -> Tensor:
        """The output projection of attention: [B, M, H·d] -> [B, M, D]."""
        columns = self._flat(self._heads(part))
        return self.output(attended, part.channels, columns, biased=part.biased)

    def mlp(self, x: Tensor, part: Part = WHOLE) -> Tensor:
        """The MLP with the norm before it: [B, M, D] -> [B, M, D]."""
        normed = self.norm2(x, part.channels)
        inner = self.up(normed, part.inner, part.channels)
        if self.gate is None:
            inner = self.activation(inner)
        else:
            inner = self.activation(self.gate(normed, part.inner, part.channels)) * inner
        return self.down(inner, part.channels, part.inner, biased=part.biased)

    def after(self, x: Tensor, attended: Tensor, part: Part = WHOLE) -> Tensor:
        """The block's output, from its input and the heads' attention [B, M, H·d]."""
        x = x + self.project(attended, part)
        return x + self.mlp(x, part)

    def whole(self, x: Tensor, rope: Rope, part: Part = WHOLE) -> Tensor:
        """The block's output for all tokens, [B, T, D]."""
        normed = self.norm1(x, part.channels)
        key, value = self.keys_values(normed, rope, part)
        attended = self.attend(self.queries(normed, rope, part), key, value)
        return self.after(x, attended, part)

    def among(self, seen: Tensor, own: slice, rope: Rope) -> Tensor:
        """The output for some tokens: `own` of the tokens that they see, [B, L, D].

        Keys and values are computed for all that are seen, the first L of the sequence. A decoder's
        own tokens are the last of them.
        """
        normed = self.norm1(seen)
        query = self.queries(normed[:, own], cut_rope(rope, own))
        key, value = self.keys_values(normed, cut_rope(rope, slice(seen.shape[1])))
        return self.after(seen[:, own], self.attend(query, key, value))

    def _heads(self, part: Part) -> slice:
        return slice(0, self.heads) if part.heads is None else part.heads

    def _flat(self, heads: slice) -> slice:
        return slice(heads.start * self.head_dim, heads.stop * self.head_dim)

    def _split(self, flat: Tensor) -> Tensor:
        """[B, N, H·d] -> [B, H, N, d]."""
        return flat.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


@dataclass(frozen=True)
class Transformer:
    """A ViT, GPT-2 or Llama with its head, in pieces."""

    adapter: Adapter
    embed: Callable[[Mapping[str, Tensor]], Tensor]
    blocks: list[Block]
    norm: Norm
    head: nn.Module

    @classmethod
    def of(cls, model: nn.Module) -> Transformer:
        """The pieces of `model`; made once, and again where its weights have moved."""
        place = next(model.parameters()).data_ptr()
        with _lock:
            if model not in _made or _made[model][0] != place:
                _made[model] = (place, cls._make(model))
            return _made[model][1]

    @classmethod
    def _make(cls, model: nn.Module) -> Transformer:
        adapter = adapt(model)
        kind = adapter.model.config.model_type
        if kind not in _FAMILIES:
            raise ValueError(f"model: expected one of {', '.join(_FAMILIES)}, got {kind!r}")
        head = getattr(model, "lm_head", getattr(model, "classifier", None))
        if head is None:
            raise ValueError("model: expected one with a language-model head or a classifier")
        make, embed, norm = _FAMILIES[kind]
        blocks = [make(adapter, block) for block in adapter.blocks]
        return cls(adapter, embed(adapter), blocks, norm(adapter.base), head)

    @property
    def causal(self) -> bool:
        return self.adapter.causal

    def tokens(self, inputs: Mapping[str, Tensor]) -> int:
        """T, the class token counted: here it is a token of the sequence like any other."""
        if "attention_mask" in inputs:
            raise ValueError("inputs: expected input_ids or pixel_values alone, without padding")
        return self.adapter.count(inputs)[1] + self.adapter.class_tokens

    def rope(self, positions: Tensor) -> Rope:
        """cos and sin at positions [T], which need not be whole numbers."""
        return self.adapter.rope(positions[None])

    def plan(self, tokens: int, world_size: int, weights: Any = None) -> Plan:
        """Contiguous shards, in proportion to `weights`, else equal."""
        return Plan.make(tokens, world_size, causal=self.causal, weights=weights)

    def answer(self, hidden: Tensor) -> Tensor:
        """Logits [B, V] of the last, or from the class token, of the sequence's last or first.

        hidden: [B, M, D], the last block's output; whose last (first) token is the sequence's.
        """
        token = hidden[:, -1] if self.causal else hidden[:, 0]
        logits: Tensor = self.head(self.norm(token))
        return logits


_lock = threading.Lock()  # ranks that are threads share one model
_made: weakref.WeakKeyDictionary[nn.Module, tuple[int, Transformer]] = weakref.WeakKeyDictionary()


def cut(count: int, parts: int, weights: Any = None) -> list[slice]:
    """`count` things in contiguous slices, one a rank, in proportion to `weights` (else equal)."""
    if count < parts:
        raise ValueError(f"world_size: expected at most {count} ranks, got {parts}")
    bounds = Plan.make(count, parts, causal=False, weights=weights).bounds
    return [slice(bounds[n], bounds[n + 1]) for n in range(parts)]


def cut_rope(rope: Rope, tokens: slice) -> Rope:
    return None if rope is None else (rope[0][:, tokens], rope[1][:, tokens])


def every_position(tokens: int, device: torch.device) -> Tensor:
    return torch.arange(tokens, device=device)


def _linear(module: Any) -> Linear:
    return Linear(module.weight, module.bias)


def _norm(module: Any) -> Norm:
    if hasattr(module, "variance_epsilon"):
        return Norm(module.weight, None, module.variance_epsilon)
    return Norm(module.weight, module.bias, module.eps)


def _projections(attention: Any) -> dict[str, Any]:
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    return {role: _linear(getattr(attention, name)) for role, name in names.items()}


def _sizes(adapter: Adapter, attention: Any) -> dict[str, Any]:
    return {
        "heads": adapter.num_heads,
        "kv_heads": adapter.num_key_value_heads,
        "head_dim": adapter.head_dim,
        "scale": float(attention.scaling),
        "causal": adapter.causal,
    }


def _vit(adapter: Adapter, layer: Any) -> Block:
    attention, mlp = layer.attention, layer.mlp
    return Block(
        norm1=_norm(layer.layernorm_before),
        **_projections(attention),
        norm2=_norm(layer.layernorm_after),
        up=_linear(mlp.fc1),
        gate=None,
        down=_linear(mlp.fc2),
        activation=mlp.activation_fn,
        **_sizes(adapter, attention),
    )


def _gpt2(adapter: Adapter, layer: Any) -> Block:
    """GPT-2 keeps its matrices as [in, out], and query, key and value in one."""

    def linear(module: Any, columns: slice = ALL) -> Linear:
        return Linear(module.weight[:, columns].T, module.bias[columns])

    attention, mlp, width = layer.attn, layer.mlp, adapter.hidden_size
    return Block(
        norm1=_norm(layer.ln_1),
        query=linear(attention.c_attn, slice(0, width)),
        key=linear(attention.c_attn, slice(width, 2 * width)),
        value=linear(attention.c_attn, slice(2 * width, 3 * width)),
        output=linear(attention.c_proj),
        norm2=_norm(layer.ln_2),
        up=linear(mlp.c_fc),
        gate=None,
        down=linear(mlp.c_proj),
        activation=mlp.act,
        **_sizes(adapter, attention),
    )


def _llama(adapter: Adapter, layer: Any) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    return Block(
        norm1=_norm(layer.input_layernorm),
        **_projections(attention),
        norm2=_norm(layer.post_attention_layernorm),
        up=_linear(mlp.up_proj),
        gate=_linear(mlp.gate_proj),
        down=_linear(mlp.down_proj),
        activation=mlp.act_fn,
        **_sizes(adapter, attention),
    )


def _pixels(adapter: Adapter) -> Callable[[Mapping[str, Tensor]], Tensor]:
    return lambda inputs: adapter.base.embeddings(inputs["pixel_values"])


def _ids(adapter: Adapter) -> Callable[[Mapping[str, Tensor]], Tensor]:
    return adapter.embed


_FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "vit": (_vit, _pixels, lambda base: _norm(base.layernorm)),
    "gpt2": (_gpt2, _ids, lambda base: _norm(base.ln_f)),
    "llama": (_llama, _ids, lambda base: _norm(base.norm)),
}
