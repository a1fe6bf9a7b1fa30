"""Attention in float64, key by key: what every op is compared with. Shares no code with the ops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def one_query(scores: list[float], values: list[Tensor], width: int, sink: float) -> Pair:
    """Softmax of the scores, and of a sink whose value is zero: out [width] and lse."""
    out = torch.zeros(width, dtype=torch.float64)
    top = max([*scores, sink])
    if top == -math.inf:
        return out, torch.tensor(-math.inf, dtype=torch.float64)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights) + math.exp(sink - top)
    for weight, value in zip(weights, values, strict=True):
        out += weight / total * value
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

    def visible(self, batch: int, head: int, row: int) -> tuple[list[float], list[Tensor]]:
        """Scores and values of the keys that one query sees."""
        heads, dim = self.query.shape[1], self.query.shape[3]
        kv_heads = self.key.shape[1] if self.key is not None else self.key_codebook.shape[-4]
        kv_head = head * kv_heads // heads
        query = self.query[batch, head, row].double()
        scale = self.options.get("scale") or dim**-0.5
        cap = self.options.get("softcap")
        scores, values = [], []
        for key, value, bias in self.seen(batch, head, kv_head, row):
            score = scale * float(query @ key)
            score = score if cap is None else cap * math.tanh(score / cap)
            scores.append(score + bias)
            values.append(value)
        return scores, values

    def seen(self, batch: int, head: int, kv_head: int, row: int) -> Iterator[tuple]:
        """Key, value and bias of each token that one query sees."""
        coded_mask = "attn_mask" if self.key is None else "code_attn_mask"
        if self.key is not None:
            tokens = self.key.shape[2]
            place = tokens - self.query.shape[2] + row
            left, right = self.options.get("window") or (-1, -1)
            for token in range(tokens):
                if self.options.get("is_causal") and token > place:
                    continue
                if (left >= 0 and token < place - left) or (right >= 0 and token > place + right):
                    continue
                bias = self.bias("key_mask", "attn_mask", (batch, head, row, token), tokens)
                if bias != -math.inf:
                    pair = (x[batch, kv_head, token].double() for x in (self.key, self.value))
                    yield *pair, bias
        if self.codes is not None:
            tokens = self.codes.shape[1]
            for token in range(tokens):
                bias = self.bias("code_mask", coded_mask, (batch, head, row, token), tokens)
                if bias != -math.inf:
                    yield *self.coded(batch, kv_head, token), bias

    def bias(self, mask_name: str, attn_mask_name: str, index: tuple, tokens: int) -> float:
        mask = self.options.get(mask_name)
        if mask is not None and not mask[index[0], index[3]]:
            return -math.inf
        mask = self.options.get(attn_mask_name)
        if mask is None:
            return 0.0
        bias = mask.expand(*self.query.shape[:3], tokens)[index]
        return float(bias) if mask.dtype != torch.bool else 0.0 if bias else -math.inf

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
    batch, heads, rows, _ = case.query.shape
    if case.value is not None:
        width = case.value.shape[3]
    else:
        width = case.value_codebook.shape[-3] * case.value_codebook.shape[-1]
    sinks = case.options.get("sinks")
    out = torch.zeros(batch, heads, rows, width, dtype=torch.float64)
    lse = torch.zeros(batch, heads, rows, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            sink = -math.inf if sinks is None else float(sinks[h])
            for m in range(rows):
                out[b, h, m], lse[b, h, m] = one_query(*case.visible(b, h, m), width, sink)
    return out, lse
