"""Tiny random models of every family, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from astra_runtime import Codebook
from astra_runtime.models import adapt

KINDS = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "vit", "bert", "roberta")


def tiny(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A model of 3 blocks, hidden size 48, 6 heads (3 KV heads where they are grouped)."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "initializer_range": 0.3,  # large, so that attention is far from uniform
    }
    if kind in ("llama", "mistral", "qwen2", "qwen3"):
        sizes |= {
            "vocab_size": 97,
            "intermediate_size": 96,
            "num_key_value_heads": 3,
            "max_position_embeddings": 256,
            "sliding_window": None,
        }
        if kind in ("llama", "qwen3"):
            sizes |= {"head_dim": 16, "eos_token_id": None}
        if kind == "llama":
            del sizes["sliding_window"]
        config_class, model_class = {
            "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
            "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
            "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
            "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        }[kind]
    elif kind == "gpt2":
        sizes |= {"vocab_size": 97, "n_positions": 256, "eos_token_id": None, "bos_token_id": None}
        config_class, model_class = transformers.GPT2Config, transformers.GPT2LMHeadModel
    elif kind == "vit":
        sizes |= {"image_size": 20, "patch_size": 4, "num_channels": 1, "intermediate_size": 96}
        config_class, model_class = transformers.ViTConfig, transformers.ViTForImageClassification
    elif kind == "bert":
        sizes |= {"vocab_size": 97, "intermediate_size": 96, "max_position_embeddings": 128}
        config_class, model_class = transformers.BertConfig, transformers.BertModel
    else:
        sizes |= {"vocab_size": 97, "intermediate_size": 96, "max_position_embeddings": 130}
        config_class, model_class = transformers.XLMRobertaConfig, transformers.XLMRobertaModel
    model = model_class(config_class(**(sizes | changes)))
    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:  # made as ones, which would not be missed
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model.eval()


def inputs_for(kind: str, tokens: int = 23, batch: int = 1, seed: int = 1) -> dict[str, Tensor]:
    """Random inputs. A ViT's are images of 25 patches, whatever `tokens` says."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return {"pixel_values": torch.randn(batch, 1, 20, 20, generator=generator)}
    return {"input_ids": torch.randint(0, 97, (batch, tokens), generator=generator)}


def windows_for(kind: str, count: int = 6, tokens: int = 40) -> Tensor:
    """Calibration windows, other than the inputs above."""
    windows = [inputs_for(kind, tokens, seed=100 + i) for i in range(count)]
    return torch.cat([next(iter(window.values())) for window in windows])


_books: dict[tuple[str, str], Codebook] = {}


def book_of(model: Any, kind: str, **options: Any) -> Codebook:
    """`Codebook.fit` on `windows_for(kind)`, once for all tests that ask for the same: a fit is
    deterministic, and takes longer than what most of them do with its codebook."""
    key = adapt(model).digest(), repr((kind, sorted(options.items())))
    if key not in _books:
        _books[key] = Codebook.fit(model, windows_for(kind), **options)
    return _books[key]


def fitted(kind: str, model: Any, **options: Any) -> Codebook:
    """A small codebook, of one of `SPACES`."""
    return book_of(model, kind, codewords=32, iterations=4, held_back=0, **options)


SPACES = {
    "kv-per-head": {"space": "kv", "groups": 3},
    "kv-sub-vectors": {"space": "kv", "groups": 12},
    "kv-one-code": {"space": "kv", "groups": 1, "shared": True},
    "hidden-1": {"space": "hidden", "groups": 1},
    "hidden-4": {"space": "hidden", "groups": 4},
    "differential-1": {"space": "differential", "groups": 1},
    "differential-4": {"space": "differential", "groups": 4},
}


def options_for(kind: str, name: str) -> dict[str, Any]:
    options = dict(SPACES[name])
    if kind in ("gpt2", "vit", "bert", "roberta") and name in ("kv-per-head", "kv-sub-vectors"):
        options["groups"] = {"kv-per-head": 6, "kv-sub-vectors": 12}[name]
    return options
