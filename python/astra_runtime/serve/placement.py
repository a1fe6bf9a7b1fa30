"""Which ranks read a prompt, all together or one by itself, and which decode its answers; and how
much of it each reads, where some decode meanwhile."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Literal

from ..costs import EXACT_TOKENS
from .admission import Admission
from .costs import ROUND_SECONDS, AnswerCosts, PromptCosts
from .prompt import Move
from .segments import Course
from .work import Answer, Work

Place = Literal["all", "one", "later"]


class Placement:
    """Decides for the request that comes next, from what the ranks do and what it would cost.

    A lone prompt is read by all ranks together, as that is fastest for it. Of several that wait,
    each rank reads one by itself where that is better for all: nothing is exchanged then.

    Args:
        admission: what waits and what runs.
        costs, answer_costs: of the prompts and answers so far.
        keeps: whether prompts are kept.
        uneven: whether the ranks' shares of a prompt can be chosen.
    """

    def __init__(
        self,
        admission: Admission,
        costs: PromptCosts,
        answer_costs: AnswerCosts,
        keeps: bool,
        uneven: bool = False,
    ) -> None:
        self._admission, self._costs, self._keeps = admission, costs, keeps
        self._answer_costs, self._uneven = answer_costs, uneven

    def of(self, work: Work) -> Place:
        """Who reads its prompt: "all" ranks; "one", its owner, which may be chosen anew here; or
        nobody yet, as ranks are busy with prompts of their own."""
        busy = self._busy()
        base = work.base
        if base is not None and 2 * base[1] < work.prompt_tokens:
            work.base = None  # what little it shares is read again, if it is read by one rank
        if work.base is None and self._is_apart(work, len(busy)):
            return self._of_one(work, busy)
        work.base = base
        if not self._is_for_all(work):
            return "one"
        return "later" if busy else "all"

    def course(self, work: Work, answers: Collection[Answer], patience: float) -> Course:
        """How all ranks read its prompt.

        Args:
            answers: that wait for tokens meanwhile, and are decoded in pauses.
            patience: seconds; without them each rank shows so often that it goes on.
        """
        tokens, size = work.new_tokens, self._admission.world_size
        if not answers:
            return Course(self._costs.blocks, self._costs.checks(tokens, patience))
        counts = Counter(answer.rank for answer in answers)
        in_order = [(work.owner + 1 + n) % size for n in range(size)]  # of the shards
        known = [self._answer_costs.step(counts[rank]) for rank in in_order]
        steps = [seconds or 0.0 for seconds in known] if any(known) else None
        if work.base is not None or not self._uneven or steps is None:
            equal = None if steps is None else [max(steps)] * size
            return Course(self._costs.blocks, self._costs.pauses(tokens, equal))
        pauses = self._costs.pauses(tokens, steps)
        beside = self._costs.beside(tokens, steps, len(pauses))
        by_rank = dict(zip(in_order, beside, strict=True))
        return Course(self._costs.blocks, pauses, [by_rank[rank] for rank in range(size)])

    def _busy(self) -> set[int]:
        """The ranks that read prompts by themselves."""
        return {rank for running in self._admission.running for rank in running.reading}

    def spread_short(self, work: Work) -> list[int]:
        """By answer, who decodes it after a prompt that is read by one rank, or by each of several
        where it is short: that takes no longer."""
        is_short = work.prompt_tokens <= EXACT_TOKENS
        return self._spread(work, 0.0) if is_short else [work.owner] * work.request.n

    def spread(self, work: Work, patience: float) -> list[int]:
        """The same after a prompt that all ranks have read. They have to receive codes before, and
        to rebuild what these stand for: in less than `patience` seconds."""
        seconds = self._answer_costs.sharing(work.prompt_tokens)
        others = len(self._admission.running) > 1
        if seconds is None or seconds > (ROUND_SECONDS if others else patience):
            return [work.owner] * work.request.n
        return self._spread(work, seconds)

    def move(self, work: Work, ends: tuple[int, ...], patience: float) -> Move | None:
        """Which answers to a prompt that all ranks have read others than its owner go on with, now
        that their first tokens are drawn. `ends`: as of `Work.prompt`."""
        places = self.spread(work, patience)
        drawn = [
            (answer.index, answer.ids[0])
            for answer in work.answers
            if places[answer.index] != work.owner and answer.ids and not answer.done
        ]
        if not drawn:
            return None
        return Move(replace(work.prompt(ends), ids=(), places=places), drawn)

    def _spread(self, work: Work, seconds: float) -> list[int]:
        """The first answer stays at the owner, which keeps the prompt; the next go to whoever has
        fewest, where all are whole sooner so."""
        admission, owner, n = self._admission, work.owner, work.request.n
        ranks, busy = range(admission.world_size), self._busy()
        counts = {rank: admission.answers_of(rank) - work.num_answers(rank) for rank in ranks}
        together, apart = max(counts[owner] + n, *counts.values()), {owner: 1}
        for _ in range(n - 1):
            free = [
                rank
                for rank in ranks
                if rank == owner or (rank not in busy and self._has_room(work, rank, apart))
            ]
            chosen = min(
                free,
                key=lambda rank: (
                    counts[rank] + apart.get(rank, 0),
                    (rank - owner) % admission.world_size,
                ),
            )
            apart[chosen] = apart.get(chosen, 0) + 1
        most = max(counts[rank] + apart.get(rank, 0) for rank in ranks)
        if not self._answer_costs.is_sooner(together - most, work.max_new_tokens, seconds):
            return [owner] * n
        return [rank for rank, count in apart.items() for _ in range(count)]

    def _has_room(self, work: Work, rank: int, apart: dict[int, int]) -> bool:
        count = apart.get(rank, 0) + 1
        return self._admission.has_room(rank, count * work.answer_bytes, count)

    def _is_apart(self, work: Work, busy: int) -> bool:
        if work.prompt_tokens <= EXACT_TOKENS:
            return False
        running, waiting = self._admission.running, len(self._admission) + busy
        reading = [one for one in running if one.reading]
        others = len(reading) < len(running)
        rest = max(map(self._rest, reading), default=None)
        return self._costs.apart_is_faster(work.prompt_tokens, waiting, others, rest)

    def _rest(self, work: Work) -> float:
        """Seconds until the ranks that read its prompt by themselves have done so."""
        taken = time.monotonic() - work.admitted
        others = any(not one.reading for one in self._admission.running)
        return max(0.0, self._costs.alone(work.prompt_tokens, others) - taken)

    def _of_one(self, work: Work, busy: set[int]) -> Place:
        if work.owner not in busy:
            return "one"
        ranks = range(self._admission.world_size)
        free = [n for n in ranks if n not in busy and self._admission.may_own(work, n)]
        work.owner = min(free, key=self._admission.answers_of, default=work.owner)
        return "one" if free else "later"

    def _is_for_all(self, work: Work) -> bool:
        """Whether all ranks would read its prompt if no other waited."""
        if work.base is not None:
            return True
        if self._admission.world_size == 1:
            return self._keeps and work.prompt_tokens > EXACT_TOKENS
        return self._costs.together_is_faster(work.prompt_tokens)
