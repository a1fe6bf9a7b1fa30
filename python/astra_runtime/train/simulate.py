"""N devices in one differentiable forward pass of an unmodified model: what training runs.

All tokens are in one sequence, rank after rank. A token sees its own shard's keys and values as
they are and other shards' quantized, in one softmax

    softmax(q·[K, K̂]ᵀ/√d)·[V, V̂]           (Mixed-Precision Attention, arXiv 2505.19342)

where K holds a shard's own tokens and K̂ everyone else's. As in the engine, each shard attends to
its own tokens and to the others' by themselves, and the two states are merged: no mask, and no
scores of what is not seen. With the tables of a `Codebook` this is what the engine's ranks compute
together, to rounding, without communication.

Codes may be lost on their way (`lost`, `missed`): then a receiver leaves the shard out of that
block's softmax, or, with a codec that predicts, attends to it as predicted. With a codec whose
blocks build on each other it also goes on without the codewords of that block, so that its estimate
of the shard stays off in later blocks, while the sender and the other receivers know nothing of it.
That is computed as it is, with an estimate for each receiver. The engine does the same;
`after_loss` has other ways, for comparison.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import astra_kernels as ak

from ..codes.base import geometry
from ..codes.codebook import Codebook
from ..codes.registry import CODECS
from ..codes.search import Search
from ..codes.simulated import Pair, SentTokens, SimulatedCodec
from ..models import ROW, Adapter, adapt
from ..plan import Plan
from .navq import NAVQ


def quantizers(codebook: Codebook, device: torch.device | str, **options: Any) -> nn.ModuleList:
    """A quantizer for each block, with the codebook's tables; `options` are those of `NAVQ`."""
    seed = options.pop("seed", 0)
    return nn.ModuleList(
        NAVQ(table.to(device, torch.float32), seed=seed + block, **options)
        if len(table)
        else nn.Identity()  # a block of which nothing is sent
        for block, table in enumerate(codebook.block_tables)
    )


def frozen(codebook: Codebook, device: torch.device | str) -> nn.ModuleList:
    """Quantizers that neither learn nor add noise, and search as the engine does."""
    layers = quantizers(codebook, device).eval()
    for layer in layers:
        if isinstance(layer, NAVQ):
            layer.search = Search(layer.tables)
    return layers


AfterLoss = Literal["stale", "out", "predicted"]  # see `Simulation`


def engines_after_loss(codebook: Codebook) -> AfterLoss:
    """What the engine does where a block's codes did not come."""
    return "predicted" if codebook.codec.predicts else "stale"


@dataclass(frozen=True)
class Shard:
    """One rank's part of a `Layout`.

    Attributes:
        rows: how many tokens it computes.
        first: how many of these, the first, see no remote tokens: a decoder's replicated ones.
        remote: those of the S tokens sent that it knows from codes; slices that are not empty.
    """

    rows: int
    first: int
    remote: tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """The tokens of all ranks in one sequence of length L, rank after rank.

    Attributes:
        token: int64 [L], which token of the model's own sequence, class token first.
        rank: int64 [L], whose it is.
        sent: bool [L], whether other ranks know of it, through codes. S are.
        shards: of each rank.
    """

    token: Tensor
    rank: Tensor
    sent: Tensor
    shards: tuple[Shard, ...]

    @classmethod
    def make(cls, plan: Plan, device: torch.device, single_class_token: bool = False) -> Layout:
        """Distributed class tokens: a copy in front of every shard, never sent. Single: one in
        front of rank 0's shard, a token like any other."""
        token: list[int] = []
        rank: list[int] = []
        sent: list[bool] = []
        shards = []
        for n in range(plan.world_size):
            copies = plan.copies if n == 0 or not single_class_token else 0
            shard, halo = plan.shard(n), plan.num_leading(n) - plan.copies
            own = range(shard.start - halo, shard.stop)
            before = sum(sent)
            token += [*range(copies), *own]
            rank += [n] * (copies + len(own))
            sent += [single_class_token] * copies + [False] * halo + [True] * (len(own) - halo)
            known = [slice(0, before - halo)] if plan.causal else [slice(0, before)]
            if not plan.causal and n + 1 < plan.world_size:
                known.append(slice(sum(sent), None))
            remote = tuple(part for part in known if part.stop != 0)
            shards.append(Shard(copies + len(own), copies if plan.causal else 0, remote))
        columns = {"token": token, "rank": rank, "sent": sent}
        tensors = {name: torch.tensor(column, device=device) for name, column in columns.items()}
        return cls(**tensors, shards=tuple(shards))

    def local_masks(self, causal: bool, visible: Tensor) -> list[Tensor]:
        """Which of its shard's tokens a token sees, bool [B, 1, M, M] for each shard of M tokens.

        `visible`, bool [B, tokens], is False at padding. A token always sees itself, so that
        padding, which nobody sees, has a softmax too.
        """
        masks = []
        for token in self.token.split([shard.rows for shard in self.shards]):
            mask = visible[:, None, None, token].expand(-1, -1, len(token), -1)
            if causal:
                mask = mask.tril()
            masks.append(mask | torch.eye(len(token), dtype=torch.bool, device=mask.device))
        return masks


def _check_losses(
    codebook: Codebook, lost: float, generator: torch.Generator | None, after_loss: str | None
) -> None:
    if not 0 <= lost <= 1:
        raise ValueError(f"lost: expected a share between 0 and 1, got {lost}")
    if lost and generator is None:
        raise ValueError("generator: expected one, from which the losses are drawn, got None")
    if after_loss not in (None, "stale", "out", "predicted"):
        raise ValueError(f"after_loss: expected stale, out, predicted or None, got {after_loss!r}")
    if after_loss == "predicted" and not codebook.codec.predicts:
        predicting = " or ".join(f'"{key}"' for key, c in CODECS.items() if c.predicts)
        raise ValueError(f'after_loss: expected "predicted" with space {predicting} only')


class Simulation:
    """One forward pass of `model` as the ranks of `plan`; a listener of the hooks.

    Args:
        model: a supported Hugging Face model. In training mode its dropout works, except that on
            attention probabilities.
        codebook: what is sent, see `Codec.simulate`.
        plan: who holds which tokens.
        inputs: as the model's own, whole.
        quantizers: one a block, in place of the codebook's tables; from `quantizers`.
        single_class_token: rank 0 alone has the class token, for comparison.
        lost: the share of frames that do not arrive: of each block, from each rank to each other,
            drawn independently, one draw for the whole batch.
        missed: (receiver, sender, block) of further frames that do not arrive.
        after_loss: "stale": the shard is out of that block's softmax and back in the next one's, as
            far as it is known; "out": it stays out of every later block's; "predicted": it stays
            in, also in the block whose codewords did not come, as it was predicted (by a codec that
            predicts). None: as the engine does.
        generator: on the CPU, what losses are drawn from; needed where `lost` is not 0.

    Attributes:
        commitment: after `run`: the commitment losses of all blocks, summed.
    """

    def __init__(
        self,
        model: nn.Module,
        codebook: Codebook,
        plan: Plan,
        inputs: Mapping[str, Tensor],
        quantizers: Sequence[NAVQ] | nn.ModuleList | None = None,
        *,
        single_class_token: bool = False,
        lost: float = 0.0,
        missed: Collection[tuple[int, int, int]] = (),
        after_loss: AfterLoss | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        _check_losses(codebook, lost, generator, after_loss)
        self.lost, self.generator = lost, generator
        self.missed = frozenset(missed)
        self.after_loss = after_loss or engines_after_loss(codebook)
        self.losing = bool(lost or missed)
        self.present: Tensor | None = None  # [N receiving, S]: of what nothing was lost so far
        self.adapter: Adapter = adapt(model)
        tokens = self.adapter.count(inputs)[1] - (plan.copies if plan.causal else 0)
        if tokens != plan.tokens:
            raise ValueError(f"plan: expected one of {tokens} tokens, got {plan.tokens}")
        device = self.adapter.device
        self.codebook, self.plan = codebook, plan
        self.quantizers = quantizers if quantizers is not None else frozen(codebook, device)
        self.single = single_class_token
        self.layout = Layout.make(plan, device, single_class_token)
        self._look_at(inputs)
        self.kwargs = self._inputs(inputs)
        self.commitment = torch.zeros((), dtype=torch.float32, device=device)
        self.sizes = geometry(self.adapter)
        self.near = self._near()
        apart = self.losing or self.near is not None  # what a rank knows is its own
        self.receivers = plan.world_size if apart else 1
        self.codec: SimulatedCodec | None = None  # of the pass that runs
        self.block_input: Tensor | None = None

    def _look_at(self, inputs: Mapping[str, Tensor]) -> None:
        """Which tokens attention may see, and the angles of those that are sent."""
        visible = self.adapter.visible(inputs)
        self.local_masks: Sequence[Tensor | None] = [None] * self.plan.world_size
        if visible is not None:
            self.local_masks = self.layout.local_masks(self.plan.causal, visible)
        self.counted = None if visible is None else visible[:, self.layout.token[self.layout.sent]]
        positions = self.adapter.positions(inputs)
        if positions is not None:
            positions = positions[:, self.plan.copies :]  # of the tokens sent
        self.rope = None if positions is None else self.adapter.rope(positions)
        self.last = self.adapter.last_tokens(inputs) if self.adapter.head == ROW else None

    def _near(self) -> Tensor | None:
        """Whose fine codes each rank gets: bool [N receiving, S]; None: there are none."""
        plan, most = self.plan, self.codebook.fine_tokens
        if not (self.codebook.fine and plan.causal):
            return None
        near, start = torch.zeros(plan.world_size, plan.tokens, dtype=torch.bool), 0
        for rank in range(plan.world_size):
            fine = plan.fine_tokens(rank, most)
            near[(rank + 1) % plan.world_size, start + fine.start : start + fine.stop] = True
            start += plan.size(rank)
        return near.to(self.layout.rank.device)

    def _inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the model is called with: every rank's own inputs, side by side."""
        kwargs: dict[str, Any] = {"return_dict": True}
        if self.adapter.causal:
            kwargs["use_cache"] = False
        ranks = range(self.plan.world_size)
        of_ranks = [self.adapter.local_inputs(inputs, self.plan, n) for n in ranks]
        if not self.adapter.token_ids:
            return kwargs | of_ranks[0]  # cut after embedding
        keep = self._kept() if self.single else slice(None)
        for name in of_ranks[0]:
            kwargs[name] = torch.cat([inputs[name] for inputs in of_ranks], 1)[:, keep]
        return kwargs

    def _kept(self) -> Tensor:
        """Of the distributed layout, the tokens that a single class token leaves."""
        whole = Layout.make(self.plan, self.layout.token.device)
        return (whole.sent | (whole.rank == 0)).nonzero().flatten()

    def run(self) -> Any:
        """The model's own output; with a class token, of one sequence as the model knows it."""
        self.commitment = torch.zeros_like(self.commitment)
        self.present = None
        if self.codebook.codec.sends:
            self.codec = self.codebook.codec.simulate(
                self.codebook, self.adapter, self._quantize, self.receivers
            )
        with self.adapter.listening(self):
            return self.adapter.model(**self.kwargs)

    def embedded(self, hidden: Tensor) -> Tensor:
        return hidden[:, self.layout.token]

    def before_block(self, block: int, hidden: Tensor) -> None:
        self.block_input = hidden

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention [B, H, L, d] over keys and values [B, Hkv, L, d] and remote, quantized ones."""
        pairs: list[Pair] = []
        seen = None
        if self.codec is not None:
            received = self._received(block)
            seen = self._attended(received)
            pairs = self._remote_pairs(block, key, value, received)
        dtype = _dtype_of_attention(query)
        pairs = [(key_of.to(dtype), value_of.to(dtype)) for key_of, value_of in pairs]
        sizes = [shard.rows for shard in self.layout.shards]
        shards = zip(*(x.to(dtype).split(sizes, 2) for x in (query, key, value)), strict=True)
        outputs = []
        for n, tensors in enumerate(shards):
            pair = pairs[n % len(pairs)] if pairs else None
            out = self._attend(n, tensors, pair, None if seen is None else seen[n], scale)
            outputs.append(out.transpose(1, 2))
        return torch.cat(outputs, 1).transpose(1, 2)

    def _attend(
        self,
        rank: int,
        local: tuple[Tensor, ...],
        remote: Pair | None,
        seen: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Attention of one shard's queries over its own keys and values, and over what it knows of
        the S tokens sent; `seen`, bool [S], says which of these are attended to, None: all."""
        shard, mask = self.layout.shards[rank], self.local_masks[rank]
        causal = self.plan.causal and mask is None
        own, own_lse = ak.attention(*local, is_causal=causal, attn_mask=mask, scale=scale)
        if remote is None or not shard.remote:
            return own
        first = shard.first
        query, out, lse = local[0][:, :, first:], own[:, :, first:], own_lse[:, :, first:]
        for part in shard.remote:
            key, value = (x[:, :, part] for x in remote)
            visible = self._visible(part, seen, len(query))
            state = ak.attention(query, key, value, key_mask=visible, scale=scale)
            out, lse = ak.merge_state(out, lse, *state)
        return torch.cat([own[:, :, :first], out], 2) if first else out

    def _visible(self, part: slice, seen: Tensor | None, batch: int) -> Tensor | None:
        """Which of some tokens sent are no padding and attended to, bool [B, tokens]; None: all."""
        if seen is not None:
            seen = seen[None, part].expand(batch, -1)
        if self.counted is None:
            return seen
        counted = self.counted[:, part]
        return counted if seen is None else counted & seen

    def _remote_pairs(
        self, block: int, key: Tensor, value: Tensor, received: Tensor | None
    ) -> list[Pair]:
        """Keys (rotated) and values [B, Hkv, S, d] of the tokens sent, as other ranks see them."""
        assert self.codec is not None
        assert self.block_input is not None
        sent = self.layout.sent
        hidden, key, value = self.block_input[:, sent], key[:, :, sent], value[:, :, sent]
        tokens = SentTokens(hidden, key, value, self.rope, self.near)
        return self.codec.remote_pairs(block, tokens, received)

    def _received(self, block: int) -> Tensor | None:
        """Which tokens' codes of this block arrive where: bool [N receiving, S]; None: all do."""
        frames = self._frames_received(block)
        return None if frames is None else frames[:, self.layout.rank[self.layout.sent]]

    def _frames_received(self, block: int) -> Tensor | None:
        """Whose codes of this block arrive where: bool [N receiving, N sending]; None: all do."""
        if not self.losing or not self.codebook.token_bits(self.sizes, block):
            return None
        received = torch.ones((self.plan.world_size,) * 2, dtype=torch.bool)
        if self.lost:
            drawn = torch.rand(received.shape, dtype=torch.float32, generator=self.generator)
            received = drawn >= self.lost
        for receiver, sender, of_block in self.missed:
            if of_block == block:
                received[receiver, sender] = False
        return received.to(self.layout.rank.device)

    def _attended(self, received: Tensor | None) -> Tensor | None:
        """Whose shards are in this block's softmax, of those that may be seen; None: all."""
        if self.after_loss == "predicted":
            return None
        if self.after_loss == "out":
            if received is not None:
                self.present = received if self.present is None else self.present & received
            return self.present
        return received

    def finish(self, hidden: Tensor) -> Tensor:
        whole = self._in_order(hidden)
        if self.adapter.head != ROW:
            return whole
        # the head looks for a token by its column in what it was given, so all columns are it
        rows = torch.arange(len(whole), device=whole.device)
        read = whole[:, -1] if self.last is None else whole[rows, self.last]
        return read[:, None].expand(-1, hidden.shape[1], -1)

    def _in_order(self, hidden: Tensor) -> Tensor:
        """The final hidden states of the sequence as the model knows it, of all ranks'."""
        sent = self.layout.sent
        if self.single:
            return hidden
        if not self.plan.copies:
            return hidden[:, sent]
        copies = hidden[:, self.layout.token < self.plan.copies]
        copies = copies.unflatten(1, (self.plan.world_size, -1))
        first = copies[:, 0] if self.plan.causal else copies.mean(1)
        return torch.cat([first, hidden[:, sent]], 1)

    def _quantize(self, block: int, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The codewords of vectors [B, S, C, w], and the same with noise while training."""
        try:
            quantized = self.quantizers[block](vectors, self.counted)
        except ValueError as error:
            raise ValueError(f"block {block}: {error}") from error
        self.commitment = self.commitment + quantized.commitment
        return quantized.estimate, quantized.output


def _dtype_of_attention(query: Tensor) -> torch.dtype:
    """That of the queries, or what mixed precision has attention run in."""
    device = query.device.type
    if query.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return query.dtype
