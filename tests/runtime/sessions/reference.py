"""What each rank of a session knows and computes, one rank after the other, in fp64 attention.

No mesh, no packing, no cache: each rank has for every token and block the keys and values that it
computed, or those that the codes of another rank stand for. The formulas are written out here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import astra_kernels as ak
from astra_runtime.codes.codebook import Codebook
from astra_runtime.codes.layouts import merge_groups, split_groups
from astra_runtime.codes.rotary import rotate, unrotate
from astra_runtime.models import adapt
from astra_runtime.sessions.cut import Cut

Pairs = list[tuple[Tensor, Tensor]]  # keys (rotated) and values [1, Hkv, n, d], by block


class Reference:
    def __init__(self, model: Any, book: Codebook, world_size: int) -> None:
        self.model, self.book, self.adapter = model, book, adapt(model)
        self.blocks = len(self.adapter.blocks)
        self.views: list[Pairs] = [[] for _ in range(world_size)]
        self.codes: Pairs = []  # what the codes of all tokens stand for; sinks are exact
        self.ids = torch.zeros(1, 0, dtype=torch.int64)

    def length(self, rank: int) -> int:
        return self.views[rank][0][0].shape[2] if self.views[rank] else 0

    def append(self, ids: Tensor, cut: Cut) -> Tensor:
        """Logits [V] behind the last token."""
        past, plan, count = self.ids.shape[1], cut.plan, ids.shape[1]
        self.ids = torch.cat([self.ids, ids], 1)
        order = torch.arange(count)[None]
        known: list[Any] = [None] * count  # by new token: what its codes stand for, by block
        exact: dict[int, dict[int, Any]] = {rank: {} for rank in range(len(self.views))}
        logits = torch.empty(0)
        for n, rank in enumerate(cut.members):
            tokens = plan.local_tokens(order, n)[0].tolist()
            remote = plan.remote_tokens(order, n)[0].tolist()
            far = join([known[t] for t in remote]) if remote else None
            logits, own = self.run(rank, past, tokens, far, plan.copies)
            exact[rank] = dict(zip(tokens, split(own), strict=True))
            shard = list(range(count))[plan.shard(n)]
            if shard:
                coded = split(self.coded(own_part(own, len(shard)), [past + t for t in shard]))
                for t, each in zip(shard, coded, strict=True):
                    known[t] = each
        for rank in exact:
            if rank not in cut.members and plan.copies:
                own = self.run(rank, past, list(range(plan.copies)), None, plan.copies)[1]
                exact[rank] = dict(enumerate(split(own)))
        sinks = exact[cut.members[0]]
        self.codes = longer(self.codes, join([known[t] or sinks[t] for t in range(count)]))
        for rank, mine in exact.items():
            new = join([mine.get(t, known[t]) for t in range(count)])
            self.extend(rank, new)
        return logits

    def read(self, rank: int, ids: Tensor) -> Tensor:
        """`rank` alone reads tokens; the others know their codes. Logits [V] behind the last."""
        past, count = self.ids.shape[1], ids.shape[1]
        self.ids = torch.cat([self.ids, ids], 1)
        logits, own = self.run(rank, past, list(range(count)), None, 0)
        coded = self.coded(own, list(range(past, past + count)))
        self.codes = longer(self.codes, coded)
        for other in range(len(self.views)):
            self.extend(other, own if other == rank else coded)
        return logits

    def again(self, rank: int) -> Tensor:
        """`rank` reads the last token anew."""
        last = self.ids.shape[1] - 1
        self.views[rank] = [(k[:, :, :last], v[:, :, :last]) for k, v in self.views[rank]]
        logits, own = self.run(rank, last, [0], None, 0)
        self.extend(rank, own)
        return logits

    def truncate(self, length: int) -> None:
        self.ids = self.ids[:, :length]
        self.views = [
            [(k[:, :, :length], v[:, :, :length]) for k, v in view] for view in self.views
        ]

    def extend(self, rank: int, new: Pairs) -> None:
        self.views[rank] = longer(self.views[rank], new)

    def forget(self, start: int, stop: int) -> None:
        """Every rank has these tokens from codes alone, and the rest as rank 0 has it."""
        parts = [cut_out(self.views[0], 0, start), cut_out(self.codes, start, stop)]
        view = longer(longer(*parts), cut_out(self.views[0], stop, None))
        self.views = [view for _ in self.views]

    @torch.inference_mode()
    def run(
        self, rank: int, past: int, tokens: list[int], far: Pairs | None, copies: int
    ) -> tuple[Tensor, Pairs]:
        places = torch.tensor([[past + t for t in tokens]])
        listener = _Pass(self.views[rank], far, copies)
        with self.adapter.listening(listener):
            output = self.model(
                input_ids=self.ids[:, places[0]], position_ids=places, use_cache=False
            )
        return output.logits[0, -1], listener.own

    @torch.inference_mode()
    def coded(self, own: Pairs, places: list[int]) -> Pairs:
        """What the codes of these tokens stand for."""
        positions = torch.tensor([places])
        rope = self.adapter.rope(positions)
        if self.book.space == "none":
            return own
        if self.book.space == "transform":
            return self.transformed(own, positions, rope)
        pairs, book = [], self.book
        for block, (key, value) in enumerate(own):
            scales, heads = book.scales[block], key.shape[1]  # type: ignore[index]
            vectors = split_groups(unrotate(key, rope), value, scales, book.groups, book.shared)
            table = book.tables[block]  # type: ignore[index]
            codes = ak.encode(vectors, table, impl="reference")
            near = ak.decode(codes, table, impl="reference")
            key, value = merge_groups(near, scales, heads, book.shared)
            pairs.append((rotate(key, rope), value))
        return pairs

    def transformed(self, own: Pairs, positions: Tensor, rope: Any) -> Pairs:
        inputs = {"input_ids": self.ids[:, positions[0]], "position_ids": positions}
        x = self.adapter.embed(inputs)
        embedding = x / x.square().mean(-1, keepdim=True).sqrt()
        if self.book.basis is not None:
            embedding = embedding @ self.book.basis
        pairs, estimate = [], torch.empty(0)
        for block, (key, value) in enumerate(own):
            code = self.book.transforms[block]
            y = torch.cat([unrotate(key, rope), value], 1).transpose(1, 2).flatten(2)
            if block == 0:
                estimate = y
            else:
                p = torch.cat([estimate, embedding], -1) @ (code.down @ code.up) + code.offset
                estimate = p
                if code.codes:
                    z = ((y - p) @ code.analysis)[0].unflatten(-1, code.tables.shape[::2])
                    nearest = torch.cdist(z.transpose(0, 1), code.tables).argmin(-1)  # [C, T]
                    words = torch.stack(
                        [t[c] for t, c in zip(code.tables, nearest, strict=True)], 1
                    )
                    estimate = p + words.flatten(1)[None] @ code.synthesis
            both = estimate.unflatten(-1, (2, -1, self.adapter.head_dim)).permute(2, 0, 3, 1, 4)
            pairs.append((rotate(both[0], rope), both[1]))
        return pairs


class _Pass:
    """A listener: attention over the past, over other ranks' new tokens, and over its own."""

    def __init__(self, past: Pairs, far: Pairs | None, copies: int) -> None:
        self.past, self.far, self.copies = past, far, copies
        self.own: Pairs = []

    def embedded(self, hidden: Tensor) -> Tensor:
        return hidden

    def before_block(self, block: int, hidden: Tensor) -> None:
        pass

    def finish(self, hidden: Tensor) -> Tensor:
        return hidden

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.own.append((key, value))
        rows = query.shape[2]
        seen = [(key, value, torch.ones(rows, rows, dtype=torch.bool).tril())]
        if self.past:
            k, v = self.past[block]
            seen.append((k, v, torch.ones(rows, k.shape[2], dtype=torch.bool)))
        if self.far is not None:
            k, v = self.far[block]
            mask = torch.ones(rows, k.shape[2], dtype=torch.bool)
            mask[: self.copies] = False
            seen.append((k, v, mask))
        group = query.shape[1] // key.shape[1]
        keys = torch.cat([k for k, _, _ in seen], 2).double().repeat_interleave(group, 1)
        values = torch.cat([v for _, v, _ in seen], 2).double().repeat_interleave(group, 1)
        mask = torch.cat([m for _, _, m in seen], 1)
        scores = (query.double() @ keys.mT * scale).masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ values).to(query.dtype)


def split(pairs: Pairs) -> list[Pairs]:
    """Token by token."""
    count = pairs[0][0].shape[2]
    return [[(k[:, :, t : t + 1], v[:, :, t : t + 1]) for k, v in pairs] for t in range(count)]


def join(tokens: list[Pairs]) -> Pairs:
    return [
        (torch.cat([k for k, _ in block], 2), torch.cat([v for _, v in block], 2))
        for block in zip(*tokens, strict=True)
    ]


def longer(first: Pairs, second: Pairs) -> Pairs:
    return [
        (torch.cat([a, c], 2), torch.cat([b, d], 2))
        for (a, b), (c, d) in zip(first or empty_like(second), second, strict=True)
    ]


def cut_out(pairs: Pairs, start: int, stop: int | None) -> Pairs:
    return [(k[:, :, start:stop], v[:, :, start:stop]) for k, v in pairs]


def own_part(pairs: Pairs, count: int) -> Pairs:
    """The last `count` tokens."""
    return [(k[:, :, k.shape[2] - count :], v[:, :, v.shape[2] - count :]) for k, v in pairs]


def empty_like(pairs: Pairs) -> Pairs:
    return [(k[:, :, :0], v[:, :, :0]) for k, v in pairs]
