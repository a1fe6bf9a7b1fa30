"""Generation: every rank reads the prompt, and the rank that holds its last token goes on alone.

Its cache is dense for its own tokens and the new ones; of the remote tokens it keeps codes. It
sends each token to every other rank as it comes, so that all ranks return the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .call import Call
from .control import Control
from .engine_parts import EngineParts
from .errors import AstraError, CallEnded, InvalidChoice, NotFinite
from .exchange import receive_tensors, send_tensor
from .inputs import check_bound, check_function, check_integer, check_request, inferred_mask
from .layer import Layer
from .models import Adapter, vocabulary_of, with_cache, without_listener
from .prepare import prepare
from .trace import stage

T = TypeVar("T")
DEFAULT_NEW_TOKENS = 20  # of `model.generate`
Choose = Callable[[Tensor, Tensor], Tensor]  # (ids [B, t], logits [B, V]) -> next token [B]


@dataclass(frozen=True, eq=False)
class Generation:
    """What `Engine.generate` was asked for; its docstring explains each."""

    max_new_tokens: int
    ends: tuple[int, ...]
    choose: Choose | None
    on_token: Callable[[Tensor], None] | None
    stop: Callable[[Tensor], bool] | None = None

    def deliver(self, rank: int, token: Tensor) -> None:
        """Hands out new tokens. What the host's function raises ends this call, and no more."""
        if self.on_token is None:
            return
        try:
            self.on_token(token.clone())
        except AstraError:
            raise
        except Exception as error:
            raise CallEnded(rank, f"on_token raised {type(error).__name__}: {error}") from error

    def is_last(self, rank: int, ids: Tensor) -> bool:
        """Whether the host wants no further token behind `ids`."""
        try:
            return self.stop is not None and bool(self.stop(ids.clone()))
        except Exception as error:
            raise CallEnded(rank, f"stop raised {type(error).__name__}: {error}") from error

    def check_prompt(self, call: Call, ids: Tensor, config: Any) -> None:
        """Refuses a prompt that nothing can be generated behind, with a ValueError."""
        tokens, limit = ids.shape[1], int(config.max_position_embeddings)
        if tokens + self.max_new_tokens - 1 > limit:
            raise ValueError(
                f"max_new_tokens: expected at most {limit - tokens + 1} after {tokens} tokens, as "
                f"the model's limit is {limit}, got {self.max_new_tokens}"
            )
        if call.last_tokens is not None:
            raise ValueError(
                "attention_mask: expected the last column to be a token of every row, as "
                "generation goes on behind it; pad shorter rows on the left"
            )


def guarded(
    name: str, function: Callable[[T], None] | None, rank: int
) -> Callable[[T], None] | None:
    """The host's `function`, of whose errors one ends this call, and no more."""
    if function is None:
        return None

    def call(block: T) -> None:
        try:
            with without_listener():  # it may run the model itself
                function(block)
        except AstraError:
            raise
        except Exception as error:
            raise CallEnded(rank, f"{name} raised {type(error).__name__}: {error}") from error

    return call


def end_tokens(model: Any, eos_token_id: Any, vocabulary: int) -> tuple[int, ...]:
    """The tokens that end a sequence; None: the model's own, of which those that it has no
    embeddings of, and so never gives, are left out, as transformers does."""
    config = getattr(model, "generation_config", model.config)
    own = getattr(config, "eos_token_id", None)
    if hasattr(eos_token_id, "tolist"):  # a tensor, or numpy's
        eos_token_id = eos_token_id.tolist()
    given = own if eos_token_id is None else eos_token_id
    if given is None:
        return ()
    several = isinstance(given, Iterable) and not isinstance(given, str)
    ids = given if several else [given]
    if given == own:
        ids = [token for token in ids if not isinstance(token, int) or 0 <= token < vocabulary]
    return tuple(check_integer("eos_token_id", token, 0, vocabulary - 1) for token in ids)


def run(
    engine: EngineParts,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None,
    max_new_tokens: int | None,
    eos_token_id: int | Sequence[int] | None,
    choose: Choose | None,
    on_token: Callable[[Tensor], None] | None,
    stop: Callable[[Tensor], bool] | None,
    on_block: Callable[[int], None] | None,
    request: int | None,
    within_ms: float | None,
) -> Tensor:
    """`Engine.generate` without a generation config, of the engine given."""
    new_tokens = DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    new_tokens = check_integer("max_new_tokens", new_tokens, 1)
    request, within_ms = check_request(request), check_bound(within_ms)
    functions = (("choose", choose), ("on_token", on_token), ("stop", stop), ("on_block", on_block))
    for name, function in functions:
        check_function(name, function)
    with engine.calling():
        config: Any = engine.model.config
        ends = end_tokens(engine.model, eos_token_id, vocabulary_of(engine.model))
        if attention_mask is None:
            own: Any = getattr(engine.model, "generation_config", None)
            attention_mask = inferred_mask(input_ids, getattr(own, "pad_token_id", None), ends)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        call, kwargs, given = prepare(engine, inputs, "last", False, request, new_tokens, ends)
        on_block = guarded("on_block", on_block, call.mesh.device_rank)
        call = replace(call, between=on_block)
        asked = Generation(new_tokens, ends, choose, on_token, stop)
        asked.check_prompt(call, given["input_ids"], config)
        with engine._ending_together(call, request, within_ms), engine.adapter.installed():
            ids = generate(engine.model, engine.adapter, call, given, kwargs, asked)
        engine._report(call)
        return ids


def generate(
    model: nn.Module,
    adapter: Adapter,
    call: Call,
    inputs: dict[str, Tensor],
    kwargs: dict[str, Any],
    asked: Generation,
) -> Tensor:
    """Prefill, and then token after token from the owner to all others: int64 [B, T + new]."""
    ids = inputs["input_ids"].long()
    owner = call.plan.owner
    others = [n for n in range(call.plan.world_size) if n != call.rank]
    decoder = None
    if call.rank == owner:
        decoder = _Decoder(model, adapter, call, inputs, kwargs, asked.max_new_tokens)
    else:
        with adapter.listening(Layer(call)), stage("compute"):
            model(**kwargs)
    ends = torch.tensor(asked.ends, dtype=torch.int64, device=ids.device)
    done = torch.zeros(call.batch, dtype=torch.bool, device=ids.device)
    last = torch.zeros_like(ids[:, 0])  # the end token of each sequence that has ended
    for _ in range(asked.max_new_tokens):
        call.check_running()
        if decoder is not None:
            call.mesh.check_cancelled()
            scores, known = decoder.scores(ids), vocabulary_of(model)
            token = next_token(call.rank, ids, scores, asked.choose, known)
            token = torch.where(done, last, token)
            new_ids = torch.cat([ids, token[:, None]], 1)
            stopped = asked.is_last(call.mesh.device_rank, new_ids)
            # the complement of a token says that it is the last one
            sent = ~token if stopped else token
            send_tensor(call, sent, block=Control.TOKEN, to=others)
        else:
            shapes = {owner: (call.batch,)}
            token = receive_tensors(call, shapes, ids, block=Control.TOKEN)[owner]
            stopped = bool((token < 0).all())
            token = ~token if stopped else token
        ids = torch.cat([ids, token[:, None]], 1)
        last = torch.where(torch.isin(token, ends), token, last)
        done |= torch.isin(token, ends)
        asked.deliver(call.mesh.device_rank, token)
        if stopped or bool(done.all()):
            break
    return ids


def next_token(rank: int, ids: Tensor, scores: Tensor, choose: Choose | None, known: int) -> Tensor:
    """The next token of each sequence, int64 [B].

    Args:
        known: how many tokens the model has embeddings of, with which it goes on.

    Raises:
        InvalidChoice: `choose` gave no token, or the likeliest is one without an embedding.
        NotFinite: `scores` hold NaN, of which any token could be the likeliest.
    """
    if bool(scores.isnan().any()):
        raise NotFinite(rank, "the logits behind its tokens hold NaN")
    batch, vocabulary = len(scores), min(scores.shape[1], known)
    if choose is None:
        token = scores.argmax(-1)
        if vocabulary < scores.shape[1] and int(token.max()) >= vocabulary:
            raise InvalidChoice(
                rank,
                f"the likeliest token is {int(token.max())}, and the model has embeddings of 0 to "
                f"{vocabulary - 1}",
            )
        return token
    try:
        token = choose(ids.clone(), scores)
    except AstraError:
        raise
    except Exception as error:
        raise InvalidChoice(rank, f"choose raised {type(error).__name__}: {error}") from error
    wanted = f"choose: expected the next token of each sequence, integers of shape [{batch}]"
    if not isinstance(token, Tensor):
        raise InvalidChoice(rank, f"{wanted}, got {type(token).__name__}")
    whole = not (token.is_floating_point() or token.is_complex() or token.dtype == torch.bool)
    if not whole or tuple(token.shape) not in ((batch,), (batch, 1)):
        raise InvalidChoice(rank, f"{wanted}, got {token.dtype} of shape {list(token.shape)}")
    token = token.to(ids.device, ids.dtype).reshape(batch)
    least, most = (int(bound) for bound in torch.aminmax(token))
    if least < 0 or most >= vocabulary:
        got = least if least < 0 else most
        raise InvalidChoice(rank, f"choose: expected tokens from 0 to {vocabulary - 1}, got {got}")
    return token


class _Decoder:
    """Decoding on the rank that holds the last token: its cache is dense for its own tokens."""

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        call: Call,
        inputs: dict[str, Tensor],
        kwargs: dict[str, Any],
        max_new_tokens: int,
    ) -> None:
        from transformers import DynamicCache

        if call.views.local_mask is not None:
            mask = F.pad(call.views.local_mask, (0, max_new_tokens), value=True)
            call = replace(call, views=replace(call.views, local_mask=mask))
        self.model, self.adapter = model, adapter
        self.cache = DynamicCache()
        positions = adapter.positions(inputs)
        assert positions is not None, "every decoder takes positions"
        self.call = call
        self.position = positions[:, -1:].expand(call.batch, 1)
        self.output = self._run(kwargs)
        self.num_read = inputs["input_ids"].shape[1]

    def _run(self, kwargs: dict[str, Any]) -> Any:
        with self.adapter.listening(Layer(self.call)), stage("compute"):
            return self.model(**kwargs | with_cache(self.model, self.cache))

    def scores(self, ids: Tensor) -> Tensor:
        """fp32 logits [B, V] after `ids` [B, t], which is at most one token more than before."""
        if ids.shape[1] > self.num_read:
            self.num_read, self.call.state.decoding = ids.shape[1], True
            self.position = self.position + 1
            self.output = self._run({"input_ids": ids[:, -1:], "position_ids": self.position})
        return self.output.logits[:, -1].float()
