"""Several answers to one prompt, drawn by all ranks at once: `num_return_sequences`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..costs import EXACT_TOKENS
from ..decoding import Choose, Generation
from ..engine_parts import EngineParts
from ..errors import InvalidChoice
from .answers import decode_together, moved, token_limit
from .checks import check_ids
from .codes import confirm, most_lacking, session_tag
from .decoder import Asked
from .files import broadcast
from .passes import read_tokens
from .session import Session, one_call
from .state import SessionState

Warp = Callable[[Tensor, Tensor], Tensor]  # (ids [1, t], logits [1, V]) -> scores [1, V]

# Of codes, or of keys and values, that other ranks may have to receive before they can answer.
MOST_SHARED = 4 << 20  # bytes


def draw_several(
    engine: EngineParts,
    session: Session,
    ids: Tensor,
    count: int,
    warp: Warp,
    asked: Generation,
    *,
    named: str,
    request: int | None,
    within_ms: float | None,
) -> Tensor:
    """`count` answers to one prompt, each drawn by a rank; collective.

    The prompt is read once. Up to `EXACT_TOKENS` tokens each rank reads them by itself; of longer
    ones the ranks receive the codes that they lack, unless these are more than `MOST_SHARED` bytes:
    then their owner draws all answers. It draws the first one in any case.

    Args:
        session: an empty one, which is of no use afterwards.
        ids: int64 [1, T].
        warp: what is done to the logits of an answer before one draws from them.
        asked: `choose` and `stop` are not used.
        named: what `warp` does, in words that have to be the same on all ranks.

    Returns:
        int64 [count, T + new], on every rank. With dense exchange, to rounding, what the owner
        draws by itself from torch's generator, which is as far afterwards as it would be then.
    """
    engine._check_model()
    ids = check_ids(engine, ids, 0)
    options = Asked(asked.max_new_tokens, asked.ends)
    options.check_room(ids.shape[1], token_limit(engine))
    if ids.shape[1] > EXACT_TOKENS:
        session.append(ids, request=request, within_ms=within_ms)
        if within_ms is not None:
            within_ms = max(1e-3, within_ms - 1e3 * engine.seconds)
    state = session._state
    with one_call(engine, request, within_ms) as running:
        places = [(state.owner + n) % engine.mesh.world_size for n in range(count)]
        if not state.read:
            _read_alone(engine, state, ids)
        elif most_lacking(engine, state) > MOST_SHARED:
            places = [state.owner] * count
        tag = session_tag(state, request, options.max_new_tokens, options.ends, count, named)
        draws = Draws(_generator(engine, state.owner, tag), count, ids.shape[1])
        works = moved(engine, [state] * count, places, running)
        rows = [replace(options, choose=draws.chooser(n, engine.rank, warp)) for n in range(count)]
        on_step = _columns(asked, engine.rank, count)
        tokens = decode_together(engine, works, places, rows, on_step, request, running)
        confirm(engine, running, tag)
    steps = max(map(len, tokens))
    if engine.rank == state.owner and engine.adapter.device.type == "cpu":
        torch.set_rng_state(draws.state_after(steps))
    new = [row + row[-1:] * (steps - len(row)) for row in tokens]
    return torch.cat([ids.expand(count, -1), torch.tensor(new, device=ids.device)], 1)


class Draws:
    """Draws of several rows by several ranks: each as if one had drawn all rows at once.

    A token is the first to arrive in a race of exponential times, at the tokens' probabilities, as
    in `torch.multinomial`. Each rank knows all rows' times, as it has the owner's generator.

    Args:
        prompt: tokens before the first that is drawn.
    """

    def __init__(self, generator: torch.Generator, rows: int, prompt: int) -> None:
        self._generator, self._rows, self._prompt = generator, rows, prompt
        self._steps = 0
        self._times = torch.empty(0, dtype=torch.float32, device="cpu")  # [rows, V]

    def chooser(self, row: int, rank: int, warp: Warp) -> Choose:
        def choose(ids: Tensor, logits: Tensor) -> Tensor:
            probabilities = warp(ids, logits).softmax(-1)[0].cpu()
            if not bool(probabilities.isfinite().all()):
                raise InvalidChoice(rank, "the model's logits are not finite")
            self._advance(ids.shape[1] - self._prompt + 1, len(probabilities))
            return (probabilities / self._times[row]).argmax()[None]

        return choose

    def _advance(self, steps: int, vocabulary: int) -> None:
        while self._steps < steps:
            times = torch.empty(self._rows, vocabulary, dtype=torch.float32, device="cpu")
            self._times = times.exponential_(1, generator=self._generator)
            self._steps += 1

    def state_after(self, steps: int) -> Tensor:
        """The generator's, when so many tokens of each row are drawn."""
        self._advance(steps, self._times.shape[1])
        return self._generator.get_state()


def _generator(engine: EngineParts, owner: int, tag: int) -> torch.Generator:
    """That of torch on the owner, in the same state on all ranks; on a CPU."""
    generator, state = torch.Generator("cpu"), None
    if engine.rank == owner:
        device = engine.adapter.device
        if device.type == "cpu":
            generator.set_state(torch.get_rng_state())
        else:
            generator.manual_seed(int(torch.randint(1 << 62, (1,), device=device)))
        state = generator.get_state().numpy().tobytes()
    state = broadcast(engine, state, owner, tag)
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


def _read_alone(engine: EngineParts, state: SessionState, ids: Tensor) -> None:
    """This rank reads all but the last token, which each answer begins with."""
    state.ids, before = ids, ids[:, :-1]
    if before.shape[1]:
        read_tokens(engine, [state.cache], [before])
    state.read = before.shape[1]


def _columns(asked: Generation, rank: int, count: int) -> Callable[[Tensor], None] | None:
    """Hands out a token of each answer at each step; of those that have ended, the last again."""
    if asked.on_token is None:
        return None
    last = torch.zeros(count, dtype=torch.int64, device="cpu")

    def on_step(step: Tensor) -> None:
        nonlocal last
        last = torch.where(step < 0, last.to(step.device), step)
        asked.deliver(rank, last)

    return on_step
