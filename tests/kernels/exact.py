"""Attention in float64, key by key: what every op is compared with. Shares no code with the ops."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def one_query(query: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> Pair:
    """query [d] over lists of keys and values [d]: out [d] and lse."""
    if not keys:
        return torch.zeros_like(query), torch.tensor(-math.inf, dtype=torch.float64)
    scores = [scale * float(query @ key) for key in keys]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights)
    out = sum(
        (w / total * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(query)
    )
    return out, torch.tensor(top + math.log(total), dtype=torch.float64)


def coded_vector(codes: Tensor, table: Tensor, head: int) -> Tensor:
    """codes [C] of one token, table [R, Hkv, S, K, w] -> the vector [d] of one KV head."""
    stages, kv_heads, groups, _, width = table.shape
    shared = len(codes) == stages * groups
    vector = torch.zeros(groups * width, dtype=torch.float64)
    for stage in range(stages):
        for group in range(groups):
            if shared:
                place = stage * groups + group
            else:
                place = stage * kv_heads * groups + head * groups + group
            row = table[stage, head, group, int(codes[place])].double()
            vector[group * width : (group + 1) * width] += row
    return vector


def rotated(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = len(key) // 2
    turned = key.clone()
    for i in range(half):
        turned[i] = key[i] * cos[i] - key[i + half] * sin[i]
        turned[i + half] = key[i + half] * cos[i + half] + key[i] * sin[i + half]
    return turned


@dataclass
class Case:
    """A call of mixed_attention; without `key` one of coded_attention, without `codes` dense."""

    query: Tensor
    key: Tensor | None = None
    value: Tensor | None = None
    codes: Tensor | None = None
    key_codebook: Tensor | None = None
    value_codebook: Tensor | None = None
    options: dict = field(default_factory=dict)

    def visible(self, batch: int, head: int, row: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values that one query sees, KV head `head`."""
        keys, values = [], []
        if self.key is not None:
            tokens = self.key.shape[2]
            seen = (
                tokens - self.query.shape[2] + row + 1 if self.options.get("is_causal") else tokens
            )
            mask = self.options.get("key_mask")
            for token in range(seen):
                if mask is None or mask[batch, token]:
                    keys.append(self.key[batch, head, token].double())
                    values.append(self.value[batch, head, token].double())
        if self.codes is not None:
            mask = self.options.get("code_mask")
            for token in range(self.codes.shape[1]):
                if mask is None or mask[batch, token]:
                    key, value = self.coded(batch, head, token)
                    keys.append(key)
                    values.append(value)
        return keys, values

    def coded(self, batch: int, head: int, token: int) -> Pair:
        tables = [t if t.ndim == 5 else t[None] for t in (self.key_codebook, self.value_codebook)]
        value_codes = self.options.get("value_codes")
        value_codes = self.codes if value_codes is None else value_codes
        key = coded_vector(self.codes[batch, token], tables[0], head)
        value = coded_vector(value_codes[batch, token], tables[1], head)
        rope = self.options.get("rope")
        if rope is not None:
            cos, sin = (x[token] if x.ndim == 2 else x[batch, token] for x in rope)
            key = rotated(key, cos.double(), sin.double())
        return key, value


def attend(case: Case) -> Pair:
    batch, heads, rows, dim = case.query.shape
    kv_heads = case.key.shape[1] if case.key is not None else case.key_codebook.shape[-4]
    scale = case.options.get("scale") or dim**-0.5
    out = torch.zeros(batch, heads, rows, dim, dtype=torch.float64)
    lse = torch.zeros(batch, heads, rows, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for m in range(rows):
                seen = case.visible(b, h * kv_heads // heads, m)
                query = case.query[b, h, m].double()
                out[b, h, m], lse[b, h, m] = one_query(query, *seen, scale)
    return out, lse
