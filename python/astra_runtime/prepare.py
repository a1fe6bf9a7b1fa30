"""The beginning of a call: what was given is checked, and the call's state made of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .call import Call
from .codes.verify import Verifier
from .engine_parts import EngineParts
from .inputs import Views, check_answer, check_inputs, contents, num_padding
from .last_tokens import LastTokens
from .missing import Missing, waiting_limits
from .models import Adapter
from .plan import Plan
from .transport import Mesh
from .transport.subset import Subset


def prepare(
    engine: EngineParts,
    inputs: dict[str, Any],
    answer: str,
    everywhere: bool,
    request: int | None,
    *options: object,
    owner: int | None = None,
) -> tuple[Call, dict[str, Any], dict[str, Tensor]]:
    """A call of `engine`, the model's arguments and the checked inputs.

    `options` have to be the same on every rank; decoding follows where there are any.
    `owner`: the rank that is to hold a decoder's last token; None: the last one.
    """
    adapter, mesh, weights = engine.adapter, engine.mesh, engine.shard_weights
    if owner is not None and owner != mesh.world_size - 1:
        mesh, weights = _dealt_from(mesh, weights, owner)
        options = (*options, owner)
    rank = mesh.rank
    engine.degraded, engine.missing = False, {}
    engine._check_model()
    alike = repr((options, request, answer, everywhere)).encode()  # on all ranks
    pooled = check_answer(adapter, answer)
    given = check_inputs(adapter, inputs)
    batch, tokens = adapter.count(given)
    last = adapter.last_tokens(given)
    padding = num_padding(adapter.visible(given))
    plan = engine._plan(tokens, padding=padding, shard_weights=weights)
    blocks = len(adapter.blocks)
    deadline, patience = waiting_limits(engine.on_missing, engine.deadline_ms, mesh, blocks)
    codec, sizes = _begun(engine, given, plan, rank), engine._sizes(rank, plan, batch)
    views = Views.of(adapter, given, plan, rank)
    call = Call(
        rank,
        plan,
        codec,
        sizes,
        mesh,
        batch,
        plan.tag([*contents(given), alike]),
        views,
        "last" if pooled else answer,
        None if last is None else LastTokens.of(last, plan),
        pooled,
        everywhere,
        keeps=bool(options) and rank == plan.owner,
        deadline=deadline,
        patience=patience,
        missing=Missing(mesh.world_size, blocks) if engine.on_missing == "degrade" else None,
        verifier=None
        if engine._verified
        else Verifier(adapter, codec, sizes.sent_slice, views.sent_rope),
    )
    return call, _arguments(adapter, given, plan, rank), given


def _begun(engine: EngineParts, given: dict[str, Tensor], plan: Plan, rank: int) -> Any:
    """The codec of this call, which may run parts of the model."""
    try:
        return engine.codec.begin(given, plan, rank)
    except Exception:
        if engine._watch.changed() is None:
            raise
        return None  # the call ends on every rank before it begins: the model has changed


def _dealt_from(
    mesh: Mesh, weights: tuple[float, ...] | None, owner: int
) -> tuple[Mesh, tuple[float, ...] | None]:
    """The ranks in turn, so that `owner` comes last, and their shares of the tokens."""
    size = mesh.world_size
    turned = Subset(mesh, [(owner + 1 + n) % size for n in range(size)])
    return turned, None if weights is None else weights[owner + 1 :] + weights[: owner + 1]


def _arguments(adapter: Adapter, given: dict[str, Tensor], plan: Plan, rank: int) -> dict[str, Any]:
    """The model's, for this rank's tokens."""
    kwargs = adapter.local_inputs(given, plan, rank)
    # a shard's hidden states or attentions would pass for the sequence's
    kwargs |= {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
    if adapter.causal:
        kwargs["use_cache"] = False
    return kwargs
