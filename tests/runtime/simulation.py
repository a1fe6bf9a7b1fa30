"""N ranks as one forward pass over the whole sequence, made of references only.

No mesh, no packing, no shards: every token is in one sequence (an encoder's class token once for
each rank), and masks in fp64 say who sees whom, exactly or through codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import astra_kernels as ak
from astra_runtime.codes.codebook import Codebook
from astra_runtime.codes.layouts import split_groups, split_tables
from astra_runtime.codes.rotary import rotate
from astra_runtime.models import adapt
from astra_runtime.plan import Plan


class Simulation:
    """A listener that computes what all ranks together compute."""

    def __init__(self, model: Any, codebook: Codebook, plan: Plan, inputs: dict[str, Tensor]):
        self.model, self.book, self.plan = model, codebook, plan
        self.adapter = adapt(model)
        self.codes: dict[int, Tensor] = {}
        self.x: dict[int, Tensor] = {}
        self.estimate = torch.empty(0)  # space "differential": of the block before
        copies = plan.copies
        self.order, self.rank, self.is_copy, self.is_halo, self.start = [], [], [], [], []
        for n in range(plan.world_size):
            shard = plan.shard(n)
            own = list(range(shard.start, shard.stop))
            halo = list(range(max(copies, shard.start - plan.halo), shard.start))
            self.order += [*range(copies), *halo, *own]
            self.rank += [n] * (copies + len(halo) + len(own))
            self.is_copy += [True] * copies + [False] * (len(halo) + len(own))
            self.is_halo += [False] * copies + [True] * len(halo) + [False] * len(own)
            self.start += [(halo or own)[0]] * (copies + len(halo) + len(own))
        positions = self.adapter.positions(inputs)
        if positions is not None:
            positions = positions[:, self.order]
        self.rope = None if positions is None else self.adapter.rope(positions)
        ids = inputs.get("input_ids")
        self.kwargs: dict[str, Any] = dict(inputs)
        if ids is not None and (copies or plan.halo):
            order = torch.tensor(self.order)
            self.kwargs = {"input_ids": ids[:, order], "position_ids": order[None]}

    @torch.inference_mode()
    def run(self) -> Any:
        with self.adapter.listening(self):
            return self.model(**self.kwargs)

    def embedded(self, hidden: Tensor) -> Tensor:
        return hidden[:, self.order]

    def before_block(self, block: int, hidden: Tensor) -> None:
        self.x[block] = hidden

    def estimates(self, block: int) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values of all tokens as other ranks see them."""
        x, book = self.x[block], self.book
        if book.space == "transform":
            return self.transformed(block, x)
        assert book.tables is not None
        if book.space == "differential":
            if block == 0:
                self.estimate = x
            else:
                vectors = (x - self.estimate).unflatten(-1, (book.groups, -1))
                self.codes[block] = ak.encode(vectors, book.tables[block], impl="reference")
                step = ak.decode(self.codes[block], book.tables[block], impl="reference")
                self.estimate = self.estimate + step.flatten(2)
            key, value = self.adapter.project(block, self.estimate)
            return rotate(key, self.rope), value
        if book.space == "hidden":
            vectors = x.unflatten(-1, (book.groups, -1))
            self.codes[block] = ak.encode(vectors, book.tables[block], impl="reference")
            estimate = ak.decode(self.codes[block], book.tables[block], impl="reference")
            key, value = self.adapter.project(block, estimate.flatten(2))
            return rotate(key, self.rope), value
        assert book.scales is not None
        key, value = self.adapter.project(block, x)
        heads, scales = key.shape[1], book.scales[block]
        vectors = split_groups(key, value, scales, book.groups, book.shared)
        codes = ak.encode(vectors, book.tables[block], impl="reference")
        self.codes[block] = codes
        tables = split_tables(book.tables[block], scales, heads, book.shared)
        per_head = codes if not book.shared else codes.repeat(1, 1, heads)
        per_head = per_head.unflatten(-1, (heads, -1)).long()  # [B, T, Hkv, S]

        def look_up(table: Tensor) -> Tensor:  # [Hkv, S, K, d/S] -> [B, Hkv, T, d]
            rows = [
                torch.cat([table[h, s][per_head[:, :, h, s]] for s in range(table.shape[1])], -1)
                for h in range(heads)
            ]
            return torch.stack(rows, 1)

        return rotate(look_up(tables[0]), self.rope), look_up(tables[1])

    def transformed(self, block: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The formulas of `transform.py`, one after the other."""
        code, free = self.book.transforms[block], self.adapter.token_ids
        key, value = self.adapter.project(block, x)
        y = torch.cat([key, value], 1).transpose(1, 2).flatten(2)
        if block == 0:
            self.embedding = x / x.square().mean(-1, keepdim=True).sqrt()
            if self.book.basis is not None:
                self.embedding = self.embedding @ self.book.basis
            self.estimate = y if free else torch.empty(0)
        if block or not free:
            known = [self.estimate] if block else []
            features = (
                torch.cat([*known, *([self.embedding] if free else [])], -1)
                if block
                else x[..., :0]
            )
            p = features @ (code.down @ code.up) + code.offset
            z = ((y - p) @ code.analysis).unflatten(-1, code.tables.shape[::2])
            codes = torch.cdist(z.transpose(0, 2).flatten(1, 2), code.tables).argmin(-1)  # [C, T·B]
            words = (
                torch.stack([t[c] for t, c in zip(code.tables, codes, strict=True)], 1)
                if len(codes)
                else z[:0]
            )
            words = (
                words.unflatten(0, (y.shape[1], y.shape[0])).transpose(0, 1) if len(codes) else z
            )
            self.estimate = p + words.flatten(2) @ code.synthesis
        key, value = self.estimate.unflatten(-1, (2, -1, self.adapter.head_dim)).permute(
            2, 0, 3, 1, 4
        )
        return rotate(key, self.rope), value

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        rank, copy = torch.tensor(self.rank), torch.tensor(self.is_copy)
        local = rank[:, None] == rank[None]
        far = ~local & ~copy[None] & ~torch.tensor(self.is_halo)[None]
        if self.plan.causal:
            earlier = torch.ones_like(local).tril()
            place = torch.tensor(self.order)
            local, far = local & earlier, far & (place[:, None] > place)
            far = far & (place < torch.tensor(self.start)[:, None])
        if self.book.space == "drop":
            far = torch.zeros_like(far)
            far_key, far_value = key, value
        elif self.book.space == "none":
            far_key, far_value = key, value
        else:
            far_key, far_value = self.estimates(block)
        group = query.shape[1] // key.shape[1]

        def scores(keys: Tensor, mask: Tensor) -> Tensor:
            wide = keys.double().repeat_interleave(group, 1)
            return (query.double() @ wide.mT * scale).masked_fill(~mask, -torch.inf)

        both = torch.cat([scores(key, local), scores(far_key, far)], -1).softmax(-1)
        values = torch.cat([value, far_value], 2).double().repeat_interleave(group, 1)
        return (both @ values).to(query.dtype)

    def finish(self, hidden: Tensor) -> Tensor:
        is_copy, is_halo = torch.tensor(self.is_copy), torch.tensor(self.is_halo)
        hidden, is_copy = hidden[:, ~is_halo], is_copy[~is_halo]
        if not self.plan.copies:
            return hidden
        copies = hidden[:, is_copy].unflatten(1, (self.plan.world_size, -1))
        first = copies[:, 0] if self.plan.causal else copies.mean(1)
        return torch.cat([first, hidden[:, ~is_copy]], 1)
