"""N devices in one differentiable forward pass of an unmodified model: what training runs.

All tokens are in one sequence, rank after rank, and masks say who sees whom: a token sees its own
shard's keys and values as they are and other shards' through quantized stand-ins, in one softmax

    softmax(q·[K, K̂]ᵀ/√d)·[V, V̂]           (Mixed-Precision Attention, arXiv 2505.19342)

where K holds a shard's own tokens and K̂ everyone else's. With the tables of a `Codebook` this is
what the engine's ranks compute together, to rounding; it costs twice the attention scores of the
plain model, and no communication.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codebook import Codebook, joint
from .models import Adapter, adapt, listening
from .navq import NAVQ
from .plan import Plan
from .spaces import rotate, unrotate


def quantizers(codebook: Codebook, device: torch.device | str, **options: Any) -> nn.ModuleList:
    """A quantizer for each block, with the codebook's tables; `options` are those of `NAVQ`."""
    if codebook.tables is None:
        return nn.ModuleList()
    seed = options.pop("seed", 0)
    tables = codebook.tables.to(device, torch.float32)
    return nn.ModuleList(
        NAVQ(table, seed=seed + block, **options) for block, table in enumerate(tables)
    )


def frozen(codebook: Codebook, device: torch.device | str) -> nn.ModuleList:
    """Quantizers that neither learn nor add noise."""
    return quantizers(codebook, device).eval()


@dataclass(frozen=True)
class Layout:
    """The tokens of all ranks in one sequence of length L, rank after rank.

    Attributes:
        token: int64 [L], which token of the model's own sequence, class token first.
        rank: int64 [L], whose it is.
        sent: bool [L], whether other ranks know of it, through codes. S are.
    """

    token: Tensor
    rank: Tensor
    sent: Tensor

    @classmethod
    def make(cls, plan: Plan, device: torch.device, single_class_token: bool = False) -> Layout:
        """Distributed class tokens: a copy in front of every shard, never sent. Single: one in
        front of rank 0's shard, a token like any other."""
        token: list[int] = []
        rank: list[int] = []
        sent: list[bool] = []
        for n in range(plan.world_size):
            copies = plan.class_tokens if n == 0 or not single_class_token else 0
            own = range(plan.bounds[n] + plan.class_tokens, plan.bounds[n + 1] + plan.class_tokens)
            token += [*range(copies), *own]
            rank += [n] * (copies + len(own))
            sent += [single_class_token] * copies + [True] * len(own)
        return cls(*(torch.tensor(given, device=device) for given in (token, rank, sent)))

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
    ) -> None:
        self.adapter: Adapter = adapt(model)
        if self.adapter.count(inputs)[1] != plan.tokens:
            raise ValueError(
                f"plan: expected one of {self.adapter.count(inputs)[1]} tokens, got {plan.tokens}"
            )
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
        self.rope = None if positions is None else self.adapter.rope(positions)
        self.kwargs = self._inputs(inputs)
        self.commitment = torch.zeros((), device=device)
        self.block_input: Tensor | None = None
        self.known: Tensor | None = None  # space "differential": what all ranks know of tokens sent

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
        self.known = None
        with self.adapter.installed(), listening(self):
            return self.adapter.model(**self.kwargs)

    # What the model's hooks call.

    def embedded(self, hidden: Tensor) -> Tensor:
        return hidden[:, self.layout.token]

    def before_block(self, block: int, hidden: Tensor) -> None:
        self.block_input = hidden

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention [B, H, L, d] over keys and values [B, Hkv, L, d] and their stand-ins."""
        mask = self.mask
        if self.codebook.space == "drop":
            mask = mask[..., : key.shape[2]]
        else:
            far_key, far_value = self._stand_ins(block, key, value)
            key = torch.cat([key, far_key.to(key.dtype)], 2)
            value = torch.cat([value, far_value.to(value.dtype)], 2)
        heads = query.shape[1] // key.shape[1]  # of queries to a head of keys
        key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    def finish(self, hidden: Tensor) -> Tensor:
        if not self.plan.class_tokens or self.single:
            return hidden
        sent = self.layout.sent
        return torch.cat([hidden[:, ~sent].mean(1, keepdim=True), hidden[:, sent]], 1)

    # Stand-ins, by space.

    def _stand_ins(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values [B, Hkv, S, d] of the tokens sent, as other ranks see them."""
        sent = self.layout.sent
        if self.codebook.space == "none":
            return key[:, :, sent], value[:, :, sent]
        if self.codebook.space == "kv":
            assert self.scales is not None
            heads, shared, scales = key.shape[1], self.codebook.shared, self.scales[block]
            key = unrotate(key[:, :, sent].float(), self.rope)
            vectors = joint(key, value[:, :, sent].float(), scales, self.codebook.groups, shared)
            key, value = parted(self._quantize(block, vectors)[1], scales, heads, shared)
        else:
            assert self.block_input is not None
            key, value = self.adapter.project(block, self._inputs_seen(block, self.block_input))
        return rotate(key, self.rope), value

    def _inputs_seen(self, block: int, hidden: Tensor) -> Tensor:
        """Block inputs [B, S, D] as other ranks know them."""
        x = hidden[:, self.layout.sent].float()
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
        return seen.to(hidden.dtype)

    def _quantize(self, block: int, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The codewords of vectors [B, S, C, w], and the same with noise while training."""
        try:
            found = self.quantizers[block](vectors, self.counted)
        except ValueError as error:
            raise ValueError(f"block {block}: {error}") from error
        self.commitment = self.commitment + found.commitment
        return found.estimate, found.output


def parted(vectors: Tensor, scales: Tensor, heads: int, shared: bool) -> tuple[Tensor, Tensor]:
    """The inverse of `codebook.joint`: [B, T, C, w] -> keys and values [B, Hkv, T, d]."""
    if shared:
        pair = vectors.unflatten(-1, (heads, 2, -1)).permute(0, 3, 1, 4, 2, 5)
    else:
        pair = vectors.unflatten(-1, (2, -1)).unflatten(2, (heads, -1)).permute(0, 2, 1, 4, 3, 5)
    pair = pair.flatten(4) / scales[:, None, :, None]  # [B, Hkv, T, 2, d]
    return pair[..., 0, :], pair[..., 1, :]
