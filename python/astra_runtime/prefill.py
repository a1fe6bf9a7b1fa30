"""A prompt that all ranks read, and what its owner keeps to go on with alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .codes.base import Codec
from .codes.rotary import Rope
from .decoding import guarded
from .engine_parts import EngineParts
from .inputs import check_bound, check_function, check_integer, check_request
from .layer import Layer
from .prepare import prepare
from .trace import stage


@dataclass(frozen=True, eq=False)
class Prefix:
    """What the rank that holds the last token of a prompt knows of it.

    Attributes:
        tokens: of the prompt.
        logits: fp32 [V], after its last token.
        local: by block, keys and values [1, Hkv, L, d] of the tokens computed here, rotated.
        remote: by block, what the codec keeps of the other tokens, and which of them attention may
            see; without remote tokens there is nothing.
        codec, remote_rope: to attend to them.
        num_remote: how many tokens these are.
        bits_per_token_block, degraded, missing: as of an answer of the engine.
    """

    tokens: int
    logits: Tensor
    local: dict[int, tuple[Tensor, Tensor]]
    remote: dict[int, tuple[Any, Tensor | None]]
    codec: Codec
    remote_rope: Rope
    num_remote: int
    bits_per_token_block: float
    degraded: bool
    missing: dict[int, list[int]]


def prefill(
    engine: EngineParts,
    input_ids: Tensor,
    *,
    owner: int | None,
    request: int | None,
    within_ms: float | None,
    between: Callable[[int], None] | None,
) -> Prefix | None:
    """`Engine.prefill`, of the engine given."""
    last = engine.mesh.world_size - 1
    owner = last if owner is None else check_integer("owner", owner, 0, last)
    if isinstance(input_ids, Tensor) and input_ids.shape[:1] != (1,):
        raise ValueError(f"input_ids: expected one sequence, got shape {list(input_ids.shape)}")
    request, within_ms = check_request(request), check_bound(within_ms)
    check_function("between", between)
    between = guarded("between", between, engine.rank)
    with engine.calling():
        inputs = {"input_ids": input_ids}
        call, kwargs, _ = prepare(engine, inputs, "last", False, request, "prefill", owner=owner)
        call = replace(call, keeps_local=call.keeps, between=between)
        with (
            engine._ending_together(call, request, within_ms),
            engine.adapter.listening(Layer(call)),
            stage("compute"),
        ):
            output = engine.model(**kwargs)
            call.mesh.check_cancelled()
        engine._report(call)
        if not call.keeps:
            return None
        return Prefix(
            input_ids.shape[1],
            output.logits[0, -1].float(),
            call.state.local,
            call.state.remote,
            call.codec,
            call.views.remote_rope,
            sum(call.sizes.num_received.values()),
            engine.bits_per_token_block,
            engine.degraded,
            engine.missing,
        )
