"""What is timed: models by name, and ASTRA's settings for them.

Times do not depend on the weights' values, so all models but SmolLM2 have random ones; so do the
codebooks of spaces whose work does not depend on what was fitted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from astra_runtime import Codebook
from astra_runtime.codebook import geometry
from astra_runtime.models import adapt
from astra_runtime.store import load_model

CODEBOOKS = Path("build/codebooks")  # of `bench.calibrate`
CODEWORDS = 1024


def _vit_base(tokens: int) -> Any:
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"tokens: expected a square of patches for vit-base, got {tokens}")
    config = transformers.ViTConfig(image_size=16 * side)
    return transformers.ViTForImageClassification(config)


def _int8(make: Callable[[int], Any]) -> Callable[[int], Any]:
    """8-bit weights, activations quantized at each layer's input: torch's dynamic quantization."""

    def made(tokens: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchao is to take its place, and needs a compiler
            return torch.ao.quantization.quantize_dynamic(
                make(tokens).eval(), {torch.nn.Linear}, dtype=torch.qint8
            )

    return made


def _gpt2(width: int, layers: int, heads: int) -> Callable[[int], Any]:
    def make(tokens: int) -> Any:
        config = transformers.GPT2Config(
            n_embd=width, n_layer=layers, n_head=heads, n_positions=max(1024, tokens)
        )
        return transformers.GPT2LMHeadModel(config)

    return make


def _llama(tokens: int) -> Any:
    """Llama-shaped, of GPT-2 medium's size: rotary positions, four queries to a key, gated MLP."""
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=max(2048, tokens),
    )
    return transformers.LlamaForCausalLM(config)


MODELS: dict[str, Callable[[int], Any]] = {
    "vit-base": _vit_base,
    "vit-base-int8": _int8(_vit_base),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "llama": _llama,
    "smollm2": lambda tokens: load_model("smollm2"),
    "tiny": _gpt2(48, 4, 4),  # for tests
}


@dataclass(frozen=True)
class Subject:
    """A model with an input of `tokens` tokens (a ViT: patches)."""

    name: str
    tokens: int
    model: Any
    inputs: dict[str, Tensor]

    @classmethod
    def make(cls, name: str, tokens: int) -> Subject:
        torch.manual_seed(0)
        model = MODELS[name](tokens).eval()
        config = model.config
        if adapt(model).token_ids:
            return cls(
                name, tokens, model, {"input_ids": torch.randint(config.vocab_size, (1, tokens))}
            )
        side = config.image_size
        return cls(name, tokens, model, {"pixel_values": torch.randn(1, 3, side, side)})

    def codebook(self, setting: str) -> Codebook:
        """ "kv:1", "hidden:1" …: random tables of that many groups; "transform:BITS": fitted."""
        space, _, count = setting.partition(":")
        if space == "transform":
            return Codebook.from_pretrained(CODEBOOKS / f"broad-{count}-0")
        adapter = adapt(self.model)
        sizes, groups = geometry(adapter), int(count)
        heads = sizes["num_key_value_heads"]
        shared = space == "kv" and groups % heads != 0
        width = 2 * heads * sizes["head_dim"] if space == "kv" else sizes["hidden_size"]
        generator = torch.Generator().manual_seed(1)
        shape = (sizes["num_blocks"], groups, CODEWORDS, width // groups)
        return Codebook(
            space,
            groups,
            CODEWORDS,
            shared,
            geometry=sizes,
            model=adapter.digest(),
            tables=torch.randn(shape, generator=generator),
            scales=torch.ones(sizes["num_blocks"], heads, 2) if space == "kv" else None,
        )
