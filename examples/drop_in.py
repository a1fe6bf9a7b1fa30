"""Attention over codes, dropped into plain PyTorch and into unmodified Hugging Face models.

The first part of a context, the prefix, is held as codes: one integer a token and KV head, which
names a key and a value in two tables. Here every token of the prefix is a codeword of its own, so
nothing is lost and the result must equal dense attention over the whole context, to rounding. What
it is without the prefix is printed beside it. Real tables are fitted, and smaller: see `astra fit`.

    python examples/drop_in.py --device cpu
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import astra_kernels as ak
from astra_runtime.models import with_cache

Coded = tuple[Tensor, Tensor, Tensor]  # codes [B, N, Hkv], key and value tables [Hkv, 1, K, d]


def to_codes(key: Tensor, value: Tensor) -> Coded:
    """Keys and values [B, Hkv, N, d]: a code names both, and each pair is a codeword, K = B*N."""
    vectors = torch.cat((key, value), dim=-1).transpose(1, 2)  # [B, N, Hkv, 2d]
    codebook = vectors.flatten(0, 1).transpose(0, 1).contiguous()  # [Hkv, K, 2d]
    key_table, value_table = codebook.unsqueeze(1).chunk(2, dim=-1)
    return ak.encode(vectors, codebook), key_table.contiguous(), value_table.contiguous()


class SelfAttention(nn.Module):
    """Causal attention with grouped queries, over a prefix too if there is one."""

    def __init__(self, size: int = 64, heads: int = 8, kv_heads: int = 2) -> None:
        super().__init__()
        self.dim = size // heads
        self.query, self.output = nn.Linear(size, size), nn.Linear(size, size)
        self.key = nn.Linear(size, kv_heads * self.dim)
        self.value = nn.Linear(size, kv_heads * self.dim)

    def heads(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (-1, self.dim)).transpose(1, 2)  # [B, M, H*d] -> [B, H, M, d]

    def keys_values(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads(self.key(hidden)), self.heads(self.value(hidden))

    def forward(self, hidden: Tensor, prefix: Coded | None = None) -> Tensor:
        query, (key, value) = self.heads(self.query(hidden)), self.keys_values(hidden)
        if prefix is None:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        else:
            out = ak.mixed_attention(query, key, value, *prefix, is_causal=True)
        return self.output(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def plain_module(device: str, tokens: int = 96, cut: int = 64) -> tuple[float, float]:
    """Largest difference from dense attention: with the prefix as codes, and without it."""
    torch.manual_seed(0)
    layer, hidden = SelfAttention().to(device), torch.randn(2, tokens, 64).to(device)
    want = layer(hidden)[:, cut:]
    coded = layer(hidden[:, cut:], to_codes(*layer.keys_values(hidden[:, :cut])))
    without = layer(hidden[:, cut:])
    return (coded - want).abs().max().item(), (without - want).abs().max().item()


def coded_prefix(module, query, key, value, attention_mask, *, prefix, scaling=None, **_):
    """What transformers calls in every layer; ``prefix`` was given to the model's forward.

    ``attention_mask`` is bool [B, 1, M, L], of the local tokens, or None where it would be causal
    and nothing else.
    """
    coded, mask = prefix[module.layer_idx], attention_mask
    out = ak.mixed_attention(
        query, key, value, *coded, attn_mask=mask, is_causal=mask is None, scale=scaling
    )
    return out.transpose(1, 2), None


def register() -> None:
    """Makes "coded_prefix" known; without a mask function transformers passes no mask at all."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("coded_prefix", coded_prefix)
    AttentionMaskInterface.register("coded_prefix", sdpa_mask)


def tiny(kind: str) -> nn.Module:
    """A model of random weights, large ones, so that attention is far from uniform."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 99}
    if kind == "llama":
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 128}
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(kind, **sizes, **ends, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def hugging_face(kind: str, device: str, tokens: int = 48, cut: int = 32) -> tuple[float, float]:
    """The same for the logits of a "gpt2" or "llama"; a Llama's keys are coded as rotated."""
    from transformers import DynamicCache

    torch.manual_seed(0)
    model, ids = tiny(kind).to(device), torch.randint(0, 99, (1, tokens)).to(device)
    rest = {"position_ids": torch.arange(cut, tokens, device=device)[None], "use_cache": False}
    want = model(ids).logits[:, cut:]
    without = model(ids[:, cut:], **rest).logits
    cache = DynamicCache()
    model(ids[:, :cut], **with_cache(model, cache))
    prefix = [to_codes(layer.keys, layer.values) for layer in cache.layers]

    register()
    model.set_attn_implementation("coded_prefix")
    coded = model(ids[:, cut:], **rest, prefix=prefix).logits
    return (coded - want).abs().max().item(), (without - want).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    device = parser.parse_args().device
    print("Largest difference from dense attention over the whole context")
    rows = {"module, outputs": plain_module(device)}
    rows |= {f"{kind}, logits": hugging_face(kind, device) for kind in ("gpt2", "llama")}
    for name, (coded, without) in rows.items():
        print(f"  {name:16} prefix as codes: {coded:.1e}   without the prefix: {without:.1e}")


if __name__ == "__main__":
    main()
