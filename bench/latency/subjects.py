"""What is timed: models by name, and ASTRA's settings for them.

Times do not depend on the weights' values, so all models but SmolLM2 have random ones; so do the
codebooks of spaces whose work does not depend on what was fitted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from astra_runtime import Codebook
from astra_runtime.models import adapt
from astra_runtime.models.shapes import SHAPES, gpt2, llama
from astra_runtime.store import load_model
from bench import codebooks


def _int8(make: Callable[[int], Any]) -> Callable[[int], Any]:
    """8-bit weights, activations quantized at each layer's input: torch's dynamic quantization."""

    def quantized(tokens: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchao is to take its place, and needs a compiler
            return torch.ao.quantization.quantize_dynamic(
                make(tokens).eval(), {torch.nn.Linear}, dtype=torch.qint8
            )

    return quantized


MODELS: dict[str, Callable[[int], Any]] = {
    **{name: SHAPES[name] for name in ("vit-base", "gpt2", "gpt2-medium")},
    "vit-base-int8": _int8(SHAPES["vit-base"]),
    # of GPT-2 medium's size: rotary positions, four queries to a key, gated MLP
    "llama": llama(1024, 2816, 16, 16, 4, 32000),
    "smollm2": lambda tokens: load_model("smollm2"),
    "smollm2-int8": lambda tokens: load_model("smollm2", dtype="int8"),
    "tiny": gpt2(48, 4, 4),  # for tests
}

WARM_UP_TOKENS = 512  # of a longer text, in a pass that is not timed
# Of ASTRA, by model, where none are asked for.
SETTINGS = {
    "vit-base": ("hidden:1", "kv:1"),
    "vit-base-int8": ("hidden:1", "kv:1"),
    "gpt2": ("hidden:1", "kv:1"),
    "gpt2-medium": ("hidden:1", "kv:1"),
    "llama": ("kv:1", "kv:4"),
    "smollm2": ("kv:3", "transform:30", "transform:100"),
    "smollm2-int8": (codebooks.DEFAULT,),
    "tiny": ("hidden:1", "kv:4"),
}


@dataclass(frozen=True)
class Subject:
    """A model with an input of `tokens` tokens (a ViT: patches)."""

    name: str
    tokens: int
    model: Any
    inputs: dict[str, Any]  # of tensors

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

    @property
    def warm_up(self) -> dict[str, Any]:
        """Inputs of a pass that is not timed: of a long text its first tokens."""
        if self.tokens <= 2 * WARM_UP_TOKENS or "input_ids" not in self.inputs:
            return self.inputs
        return {"input_ids": self.inputs["input_ids"][:, :WARM_UP_TOKENS]}

    def codebook(self, setting: str) -> Codebook:
        """Of a budget the fitted one; of "kv:1", "hidden:1:256" … one with random tables."""
        if setting == codebooks.DEFAULT:
            return codebooks.default(self.name.removesuffix("-int8"), self.model)
        if codebooks.budgeted(setting):
            return codebooks.calibrated(setting, 0)
        return codebooks.random_codebook(setting, adapt(self.model))
