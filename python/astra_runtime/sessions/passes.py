"""Forward passes over a session's new tokens, on one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

import astra_kernels as ak

from ..call import Call, Sizes
from ..engine_parts import EngineParts
from ..inputs import Views
from ..layer import Layer
from ..missing import waiting_limits
from ..plan import Plan
from ..trace import stage
from ..transport import Mesh
from ..transport.subset import Subset
from .cache import KeyValues
from .cut import Cut
from .running import Running
from .state import SessionState, Span

Between = Callable[[int], None]


class PrefillLayer(Layer):
    """A shard of new tokens: attends to the session's past beside its own shard and the others'."""

    def __init__(self, call: Call, past: KeyValues) -> None:
        super().__init__(call)
        self.past = past

    def _attend_locally(
        self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        local = super()._attend_locally(block, query, key, value, scale)
        if not self.past.length:
            return local
        with stage("attend", block):
            past = ak.attention(query, *self.past.tensors(block), scale=scale)
        with stage("merge", block):
            return ak.merge_state(*local, *past)


class Continued(Protocol):
    """What one rank knows of a sequence that it continues by itself."""

    @property
    def length(self) -> int:
        """Tokens so far."""

    def attend(
        self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Adds new tokens, and attends from them to all so far: (out, lse)."""


class SteadyLayer:
    """A pass of one rank by itself, over new tokens of several sequences side by side.

    Each goes on from what its own cache holds. To the model they are one sequence; only attention
    tells them apart, and the head reads the last token of each.

    Args:
        caches: one a sequence.
        lengths: how many new tokens each has.
        between: called before each block, with its number.
    """

    def __init__(
        self,
        caches: Sequence[Continued],
        lengths: Sequence[int],
        between: Between | None = None,
    ) -> None:
        self.caches, self.lengths, self.between = caches, list(lengths), between

    def embedded(self, hidden: Tensor) -> Tensor:
        return hidden

    def before_block(self, block: int, hidden: Tensor) -> None:
        if self.between is not None:
            self.between(block)

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        tensors = [tensor.split(self.lengths, 2) for tensor in (query, key, value)]
        outs = [
            cache.attend(block, *parts, scale)[0]
            for cache, *parts in zip(self.caches, *tensors, strict=True)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def finish(self, hidden: Tensor) -> Tensor:
        if len(self.lengths) == 1:
            return hidden[:, -1:]
        ends = torch.tensor(self.lengths, device=hidden.device).cumsum(0)
        return hidden[:, ends - 1]


def read_tokens(
    engine: EngineParts,
    caches: Sequence[Continued],
    new: Sequence[Tensor],
    between: Between | None = None,
) -> Tensor:
    """Reads the next tokens of B sequences in one pass, so that the weights are read once.

    Args:
        caches: what is known of each sequence so far; they grow by its new tokens.
        new: int64 [1, M], M ≥ 1, of each; any M beside any other.
        between: called before each block, with its number; other sequences may be read in it.

    Returns:
        fp32 logits [B, V] behind the last ones. No other rank is asked for anything.
    """
    spans = [
        torch.arange(cache.length, cache.length + ids.shape[1], device=ids.device)
        for cache, ids in zip(caches, new, strict=True)
    ]
    layer = SteadyLayer(caches, [len(span) for span in spans], between)
    with engine.adapter.listening(layer), stage("compute"):
        output = engine.model(**_inputs(torch.cat(list(new), 1), torch.cat(spans)[None]))
    logits: Tensor = output.logits[0].float()
    return logits


def _inputs(ids: Tensor, positions: Tensor) -> dict[str, Any]:
    options = {"use_cache": False, "return_dict": True}
    options |= {"output_hidden_states": False, "output_attentions": False}
    return {"input_ids": ids, "position_ids": positions, **options}


def prefill(
    engine: EngineParts,
    state: SessionState,
    running: Running,
    cut: Cut,
    tag: int,
    between: Between | None,
) -> None:
    """Reads the tokens of `state.ids` that nobody has read yet, cut over ranks as `cut` says.

    This rank has keys and values of all tokens read before, if it is a member.
    """
    past = state.read
    if engine.rank in cut.members:
        _prefill_shard(engine, state, running, cut, tag, between)
    elif between is not None:  # what it does may need every rank
        for block in range(len(engine.adapter.blocks)):
            running.check_running()
            between(block)
    for rank in range(state.world_size):
        for start, stop in cut.computed(rank):
            state.add_exact(rank, past + start, past + stop)
    state.pending += _spans(cut, past)
    state.fresh = True
    state.advance(state.tokens, cut.members[-1])


def _prefill_shard(
    engine: EngineParts,
    state: SessionState,
    running: Running,
    cut: Cut,
    tag: int,
    between: Between | None,
) -> None:
    past, plan, adapter = state.read, cut.plan, engine.adapter
    mesh = _members_mesh(engine.mesh, cut.members)
    new = state.ids[:, past:]
    positions = torch.arange(past, state.tokens, device=new.device)[None]
    inputs = {"input_ids": new, "position_ids": positions}
    rank, blocks = mesh.rank, len(adapter.blocks)
    sizes = Sizes.of(engine.codec, blocks, rank, plan, 1)
    alone = not (sizes.sources or sizes.receivers)
    deadline, patience = waiting_limits(engine.on_missing, engine.deadline_ms, mesh, blocks)
    call = Call(
        rank,
        plan,
        engine.codec if alone else engine.codec.begin(inputs, plan, rank),
        sizes,
        mesh,
        1,
        tag,
        Views.of(adapter, inputs, plan, rank),
        everywhere=False,
        keeps=True,
        keeps_local=True,
        keeps_codes=True,
        between=between,
        deadline=deadline,
        patience=patience,
        state=running.state,
    )
    layer = PrefillLayer(call, state.cache)
    kwargs = adapter.local_inputs(inputs, plan, rank)
    with adapter.listening(layer), stage("compute"):
        output = engine.model(**_inputs(kwargs["input_ids"], kwargs["position_ids"]))
        mesh.check_cancelled()
    _keep(state, call, cut, past)
    state.scores = output.logits[:, -1].float() if rank == plan.owner else None
    engine._report(call)


def _members_mesh(mesh: Mesh, members: tuple[int, ...]) -> Mesh:
    return mesh if members == tuple(range(mesh.world_size)) else Subset(mesh, members)


def _keep(state: SessionState, call: Call, cut: Cut, past: int) -> None:
    """Keys and values in the order of the sequence: replicated, other ranks', own; and codes."""
    copies = cut.plan.copies
    for block, (key, value) in call.state.local.items():
        state.cache.append(block, key[:, :, :copies], value[:, :, :copies])
        remote, _ = call.state.remote.pop(block, (None, None))
        if remote is not None:
            state.cache.append(block, *call.codec.tensors(block, remote, call.views.remote_rope))
        state.cache.append(block, key[:, :, copies:], value[:, :, copies:])
    if state.store is None:
        return
    for source, payloads in call.state.codes.items():
        sent, blocks = cut.plan.sent_slice(source), range(len(call.state.local))
        # nothing is sent of a block without codes
        state.pieces[past + sent.start, past + sent.stop] = [payloads.get(b, b"") for b in blocks]


def _spans(cut: Cut, past: int) -> list[Span]:
    """Which ranks know the codes of which new tokens after a prefill."""
    plan, spans = cut.plan, []
    for n, source in enumerate(cut.members):
        shard, sent = plan.shard(n), plan.sent_slice(n)
        receivers = [cut.members[receiver] for receiver in plan.receivers(n)]
        spans.append((sent.start, sent.stop, source, frozenset([source, *receivers])))
        spans.append((sent.stop, shard.stop, source, frozenset([source])))
    return [Span(past + a, past + b, source, known) for a, b, source, known in spans if a < b]


def whole(tokens: int) -> Plan:
    """A plan in which rank 0 sends all of `tokens` tokens to rank 1, which has none."""
    return Plan((0, tokens, tokens), True)
