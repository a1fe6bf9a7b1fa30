"""Models known by their sizes alone, with random weights or none: to count, predict and time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

ANY_TOKENS = 1 << 20  # as many as anybody asks for, where positions take no memory


def _vit_base(tokens: int) -> Any:
    import transformers

    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"tokens: expected a square of patches for vit-base, got {tokens}")
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16 * side))


def gpt2(width: int, layers: int, heads: int) -> Callable[[int], Any]:
    def make(tokens: int) -> Any:
        import transformers

        config = transformers.GPT2Config(
            n_embd=width, n_layer=layers, n_head=heads, n_positions=max(1024, tokens)
        )
        return transformers.GPT2LMHeadModel(config)

    return make


def llama(
    width: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int
) -> Callable[[int], Any]:
    def make(tokens: int) -> Any:
        import transformers

        config = transformers.LlamaConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            max_position_embeddings=max(2048, tokens),
        )
        return transformers.LlamaForCausalLM(config)

    return make


# A model for inputs of up to so many tokens (a ViT: of exactly so many patches).
SHAPES: dict[str, Callable[[int], Any]] = {
    "vit-base": _vit_base,
    "gpt2": gpt2(768, 12, 12),
    "gpt2-medium": gpt2(1024, 24, 16),
    "llama-3-8b": llama(4096, 14336, 32, 32, 8, 128256),
}


def shaped(name: str) -> Any:
    """A model of a name in `SHAPES` on the meta device: sizes and nothing else."""
    if name not in SHAPES:
        raise ValueError(f"name: expected one of {', '.join(SHAPES)}, got {name!r}")
    with torch.device("meta"):
        return SHAPES[name](ANY_TOKENS).eval()
