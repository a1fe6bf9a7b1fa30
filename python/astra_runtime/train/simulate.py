"""N devices in one differentiable forward pass of an unmodified model: what training runs.

All tokens are in one sequence, rank after rank, and masks say who sees whom: a token sees its own
shard's keys and values as they are and other shards' through quantized stand-ins, in one softmax

    softmax(q·[K, K̂]ᵀ/√d)·[V, V̂]           (Mixed-Precision Attention, arXiv 2505.19342)

where K holds a shard's own tokens and K̂ everyone else's. With the tables of a `Codebook` this is
what the engine's ranks compute together, to rounding; it costs twice the attention scores of the
plain model, and no communication.

Codes may be lost on their way (`lost`, `missed`): then a receiver leaves the shard out of that
block's softmax. In the spaces "differential" and "transform" it also goes on without the codewords
of that block, so that its estimate of the shard stays off in later blocks, while the sender and the
other receivers know nothing of it. That is computed as it is, with an estimate for each receiver.
The engine does the same; `after_loss` has other ways, for comparison.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codes.codebook import Codebook
from ..codes.dense import int8
from ..codes.layouts import flat, heads, joint, parted
from ..codes.rotary import rotate, unrotate
from ..codes.search import Search
from ..codes.transform import Known, unit
from ..models import Adapter, adapt
from ..plan import Plan
from .navq import NAVQ


def quantizers(codebook: Codebook, device: torch.device | str, **options: Any) -> nn.ModuleList:
    """A quantizer for each block, with the codebook's tables; `options` are those of `NAVQ`."""
    seed = options.pop("seed", 0)
    tables = [t.tables for t in codebook.transforms]
    if codebook.tables is not None:
        tables = list(codebook.tables)
    return nn.ModuleList(
        NAVQ(table.to(device, torch.float32), seed=seed + block, **options)
        if len(table)
        else nn.Identity()  # a block of which nothing is sent
        for block, table in enumerate(tables)
    )


def frozen(codebook: Codebook, device: torch.device | str) -> nn.ModuleList:
    """Quantizers that neither learn nor add noise, and search as the engine does."""
    made = quantizers(codebook, device).eval()
    for quantizer in made:
        if isinstance(quantizer, NAVQ):
            quantizer.search = Search(quantizer.tables)
    return made


@dataclass(frozen=True)
class Layout:
    """The tokens of all ranks in one sequence of length L, rank after rank.

    Attributes:
        token: int64 [L], which token of the model's own sequence, class token first.
        rank: int64 [L], whose it is.
        sent: bool [L], whether other ranks know of it, through codes. S are.
        start: int64 [L], from which token on its rank computes the sequence itself.
    """

    token: Tensor
    rank: Tensor
    sent: Tensor
    start: Tensor

    @classmethod
    def make(cls, plan: Plan, device: torch.device, single_class_token: bool = False) -> Layout:
        """Distributed class tokens: a copy in front of every shard, never sent. Single: one in
        front of rank 0's shard, a token like any other."""
        token: list[int] = []
        rank: list[int] = []
        sent: list[bool] = []
        start: list[int] = []
        for n in range(plan.world_size):
            copies = plan.copies if n == 0 or not single_class_token else 0
            shard, halo = plan.shard(n), plan.num_leading(n) - plan.copies
            own = range(shard.start - halo, shard.stop)
            token += [*range(copies), *own]
            rank += [n] * (copies + len(own))
            sent += [single_class_token] * copies + [False] * halo + [True] * (len(own) - halo)
            start += [own.start] * (copies + len(own))
        return cls(*(torch.tensor(given, device=device) for given in (token, rank, sent, start)))

    def mask(self, causal: bool, visible: Tensor | None) -> Tensor:
        """Who sees whom: bool [B or 1, 1, L, L + S], local tokens first, then stand-ins.

        `visible`, bool [B, tokens], is False at padding. A token always sees itself, so that
        padding, which nobody sees, has a softmax too.
        """
        near = self.rank[:, None] == self.rank
        far = ~near[:, self.sent]
        if causal:
            near = near & (self.token[:, None] >= self.token)
            far = far & (self.token[:, None] > self.token[self.sent])
            far = far & (self.start[:, None] > self.token[self.sent])  # not what the halo has
        both = torch.cat([near, far], 1)[None, None]
        if visible is None:
            return both
        seen = visible[:, self.token]
        both = both & torch.cat([seen, seen[:, self.sent]], 1)[:, None, None]
        return both | torch.eye(len(self.token), both.shape[-1], dtype=torch.bool).to(both.device)


class Simulation:
    """One forward pass of `model` as the ranks of `plan`; a listener of the hooks.

    Args:
        model: a supported Hugging Face model. In training mode its dropout works, except that on
            attention probabilities.
        codebook: space, groups and scales. Space "none" sends exact tensors, "drop" nothing.
        plan: who holds which tokens.
        inputs: as the model's own, whole.
        quantizers: one a block, in place of the codebook's tables; from `quantizers`.
        single_class_token: rank 0 alone has the class token, for comparison.
        lost: the share of frames that do not arrive: of each block, from each rank to each other,
            drawn independently, one draw for the whole batch.
        missed: (receiver, sender, block) of further frames that do not arrive.
        after_loss: "stale": the shard is back in the next block's softmax, as far as it is known;
            "out": it stays out of every later block's; "predicted": it stays in, also in the block
            whose codewords did not come, as it was predicted (space "transform").
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
        after_loss: Literal["stale", "out", "predicted"] = "stale",
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 <= lost <= 1:
            raise ValueError(f"lost: expected a share between 0 and 1, got {lost}")
        if lost and generator is None:
            raise ValueError("generator: expected one, from which the losses are drawn, got None")
        if after_loss not in ("stale", "out", "predicted"):
            raise ValueError(f"after_loss: expected stale, out or predicted, got {after_loss!r}")
        if after_loss == "predicted" and codebook.space != "transform":
            raise ValueError('after_loss: expected "predicted" with space "transform" only')
        self.lost, self.generator = lost, generator
        self.missed, self.after_loss = frozenset(missed), after_loss
        self.losing = bool(lost or missed)
        self.present: Tensor | None = None  # [N receiving, S]: of what nothing was lost so far
        self.adapter: Adapter = adapt(model)
        tokens = self.adapter.count(inputs)[1] - (plan.copies if plan.causal else 0)
        if tokens != plan.tokens:
            raise ValueError(f"plan: expected one of {tokens} tokens, got {plan.tokens}")
        device = self.adapter.device
        self.codebook, self.plan = codebook, plan
        self.quantizers = quantizers if quantizers is not None else frozen(codebook, device)
        self.scales = None if codebook.scales is None else codebook.scales.to(device)
        self.single = single_class_token
        self.layout = Layout.make(plan, device, single_class_token)
        visible = self.adapter.visible(inputs)
        self.mask = self.layout.mask(plan.causal, visible)
        self.counted = None if visible is None else visible[:, self.layout.token[self.layout.sent]]
        positions = self.adapter.positions(inputs)
        if positions is not None:
            positions = positions[:, plan.copies :]  # of the tokens sent
        self.rope = None if positions is None else self.adapter.rope(positions)
        self.kwargs = self._inputs(inputs)
        self.commitment = torch.zeros((), device=device)
        self.transforms = [t.to(device) for t in codebook.transforms]
        self.loop: Known  # space "transform": what all know of the tokens sent
        self.loops: list[Known] = []  # and each receiver, where frames are lost
        self.block_input: Tensor | None = None
        self.known: Tensor | None = None  # space "differential": what all ranks know of tokens sent
        self.behind: Tensor | None = (
            None  # [N, B, S, D]: what each receiver lacks of it, after losses
        )

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
            kwargs[name] = torch.cat([given[name] for given in of_ranks], 1)[:, keep]
        return kwargs

    def _kept(self) -> Tensor:
        """Of the distributed layout, the tokens that a single class token leaves."""
        whole = Layout.make(self.plan, self.layout.token.device)
        return (whole.sent | (whole.rank == 0)).nonzero().flatten()

    def run(self) -> Any:
        """The model's own output; with a class token, of one sequence as the model knows it."""
        self.commitment = torch.zeros_like(self.commitment)
        self.known = self.behind = self.present = None
        with self.adapter.listening(self):
            return self.adapter.model(**self.kwargs)

    # What the model's hooks call.

    def embedded(self, hidden: Tensor) -> Tensor:
        return hidden[:, self.layout.token]

    def before_block(self, block: int, hidden: Tensor) -> None:
        self.block_input = hidden

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention [B, H, L, d] over keys and values [B, Hkv, L, d] and their stand-ins."""
        length = key.shape[2]
        if self.codebook.space == "drop":
            return _attention(query, key, value, self.mask[..., :length], scale)
        mask, arrived = self.mask, self._came(block)
        here = self._attended(arrived)
        if here is not None:
            heard = here[self.layout.rank]
            mask = torch.cat([mask[..., :length], mask[..., length:] & heard], -1)
        of_receivers = self._stand_ins(block, key, value, arrived)
        found = []
        for n, (far_key, far_value) in enumerate(of_receivers):
            rows = self.layout.rank == n if len(of_receivers) > 1 else slice(None)
            keys = torch.cat([key, far_key.to(key.dtype)], 2)
            values = torch.cat([value, far_value.to(value.dtype)], 2)
            found.append(_attention(query[:, :, rows], keys, values, mask[:, :, rows], scale))
        return found[0] if len(found) == 1 else torch.cat(found, 2)  # rank after rank

    def _came(self, block: int) -> Tensor | None:
        """Which tokens' codes of this block arrive where: bool [N receiving, S]; None: all do."""
        arrived = self._arrivals(block)
        return None if arrived is None else arrived[:, self.layout.rank[self.layout.sent]]

    def _arrivals(self, block: int) -> Tensor | None:
        """Whose codes of this block arrive where: bool [N receiving, N sending]; None: all do."""
        silent = self.codebook.space == "differential" and not block  # sends nothing to lose
        silent |= bool(self.transforms) and not self.transforms[block].codes
        if not self.losing or silent:
            return None
        arrived = torch.ones((self.plan.world_size,) * 2, dtype=torch.bool)
        if self.lost:
            arrived = torch.rand(arrived.shape, generator=self.generator) >= self.lost
        for receiver, sender, of_block in self.missed:
            if of_block == block:
                arrived[receiver, sender] = False
        return arrived.to(self.layout.rank.device)

    def _attended(self, arrived: Tensor | None) -> Tensor | None:
        """Whose shards are in this block's softmax, of those that may be seen; None: all."""
        if self.after_loss == "predicted":
            return None
        if self.after_loss == "out":
            if arrived is not None:
                self.present = arrived if self.present is None else self.present & arrived
            return self.present
        return arrived

    def finish(self, hidden: Tensor) -> Tensor:
        sent = self.layout.sent
        if self.single:
            return hidden
        if not self.plan.copies:
            return hidden[:, sent]
        copies = hidden[:, self.layout.token < self.plan.copies]
        copies = copies.unflatten(1, (self.plan.world_size, -1))
        first = copies[:, 0] if self.plan.causal else copies.mean(1)
        return torch.cat([first, hidden[:, sent]], 1)

    # Stand-ins, by space.

    def _stand_ins(
        self, block: int, key: Tensor, value: Tensor, arrived: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys (rotated) and values [B, Hkv, S, d] of the tokens sent, as other ranks see them.

        One pair for all, or one a receiver where losses have made their estimates differ.
        """
        sent = self.layout.sent
        if self.codebook.space == "none":
            pair = torch.stack([key[:, :, sent], value[:, :, sent]])
            if self.codebook.dtype == "int8":
                codes, step = int8(pair)
                pair = codes * step.to(pair.dtype)
            elif self.codebook.dtype == "float16":
                pair = pair.half().to(pair.dtype)
            return [(pair[0], pair[1])]
        if self.codebook.space == "transform":
            plain = unrotate(key[:, :, sent].float(), self.rope)
            seen = self._pairs_seen(block, flat(plain, value[:, :, sent].float()), arrived)
            pairs = [heads(y, key.shape[1]) for y in seen]
        elif self.codebook.space == "kv":
            assert self.scales is not None
            shared, scales = self.codebook.shared, self.scales[block]
            plain = unrotate(key[:, :, sent].float(), self.rope)
            vectors = joint(plain, value[:, :, sent].float(), scales, self.codebook.groups, shared)
            output = self._quantize(block, vectors)[1]
            pairs = [parted(output, scales, key.shape[1], shared)]
        else:
            assert self.block_input is not None
            seen = self._inputs_seen(block, self.block_input, arrived)
            pairs = [self.adapter.project(block, hidden) for hidden in seen]
        return [(rotate(far, self.rope), far_value) for far, far_value in pairs]

    def _pairs_seen(self, block: int, y: Tensor, arrived: Tensor | None) -> list[Tensor]:
        """Space "transform": keys and values y [B, S, E] as the others know them."""
        if not block:
            first = embedding = None
            if self.adapter.token_ids:
                assert self.block_input is not None
                sent = self.block_input[:, self.layout.sent]
                first, embedding = y.detach(), unit(sent.detach())
            loop = Known(self.transforms, first, embedding)
            self.loops = [loop.fork() for _ in range(self.plan.world_size if self.losing else 1)]
            self.loop = loop
            if first is not None:
                return [y]
        transform, predicted = self.transforms[block], self.loop.predict(block, y)
        words, step = None, y.new_zeros(())
        if transform.codes:
            z = transform.coordinates(y - predicted)
            estimate, output = self._quantize(block, z)
            words, step = estimate.detach(), transform.restored(output.detach())
        self.loop.learn(block, predicted, words)  # free of noise: the coder's loop is exact
        if not self.losing:
            return [y + (predicted + step - y).detach()]  # straight-through, for all of y
        return [self._heard(block, loop, y, words, n, arrived) for n, loop in enumerate(self.loops)]

    def _heard(
        self,
        block: int,
        loop: Known,
        y: Tensor,
        words: Tensor | None,
        receiver: int,
        arrived: Tensor | None,
    ) -> Tensor:
        """What one receiver knows of y after a block whose frames may be lost."""
        if words is not None and arrived is not None:
            words = words * arrived[receiver][:, None, None]
        found = loop.learn(block, loop.predict(block, y), words)
        return y + (found - y).detach()

    def _inputs_seen(self, block: int, hidden: Tensor, arrived: Tensor | None) -> list[Tensor]:
        """Block inputs [B, S, D] as other ranks know them: of all, or of each receiver."""
        x, behind = hidden[:, self.layout.sent].float(), None
        if self.codebook.space == "hidden":
            seen = self._quantize(block, x.unflatten(-1, (self.codebook.groups, -1)))[1].flatten(2)
        elif self.known is None:
            seen = self.known = x  # token ids are known everywhere, and so are embeddings
        else:
            known = self.known.detach()  # x − known is coded: the gradient is that of x alone
            missing = (x - known).unflatten(-1, (self.codebook.groups, -1))
            estimate, output = self._quantize(block, missing)
            self.known = known + estimate.flatten(2)  # free of noise: the coder's loop is exact
            seen = known + output.flatten(2)
            behind = self._fall_behind(estimate.flatten(2), arrived)
        of_receivers = [seen] if behind is None else [seen - lacks for lacks in behind]
        return [found.to(hidden.dtype) for found in of_receivers]

    def _fall_behind(self, step: Tensor, arrived: Tensor | None) -> Tensor | None:
        """What each receiver's estimate lacks, [N, B, S, D], after codewords [B, S, D]."""
        if arrived is not None:
            lacks = ~arrived[:, None, :, None] * step.detach()
            self.behind = lacks if self.behind is None else self.behind + lacks
        return self.behind

    def _quantize(self, block: int, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The codewords of vectors [B, S, C, w], and the same with noise while training."""
        try:
            found = self.quantizers[block](vectors, self.counted)
        except ValueError as error:
            raise ValueError(f"block {block}: {error}") from error
        self.commitment = self.commitment + found.commitment
        return found.estimate, found.output


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[B, H, M, d] of queries [B, H, M, d] over [B, Hkv, N, d], under a mask [B or 1, 1, M, N]."""
    heads = query.shape[1] // key.shape[1]  # of queries to a head of keys
    key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
