"""Models known by their sizes alone: enough to count and to predict, without any weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _vit_base(transformers: Any) -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig())


def _gpt2(width: int, layers: int, heads: int) -> Callable[[Any], Any]:
    def make(transformers: Any) -> Any:
        config = transformers.GPT2Config(
            n_embd=width, n_layer=layers, n_head=heads, n_positions=1 << 20
        )
        return transformers.GPT2LMHeadModel(config)

    return make


def _llama_3_8b(transformers: Any) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=1 << 20,
    )
    return transformers.LlamaForCausalLM(config)


SHAPES: dict[str, Callable[[Any], Any]] = {
    "vit-base": _vit_base,
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "llama-3-8b": _llama_3_8b,
}


def shaped(name: str) -> Any:
    """A model of a name in `SHAPES` on the meta device: sizes and nothing else."""
    import transformers

    if name not in SHAPES:
        raise ValueError(f"name: expected one of {', '.join(SHAPES)}, got {name!r}")
    with torch.device("meta"):
        return SHAPES[name](transformers).eval()
