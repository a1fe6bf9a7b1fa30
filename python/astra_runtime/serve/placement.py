"""Which ranks read a prompt: all of them together, or one by itself."""

from __future__ import annotations

from typing import Literal

from ..costs import EXACT_TOKENS
from .admission import Admission
from .costs import PromptCosts
from .work import Work

Place = Literal["all", "one", "later"]


class Placement:
    """Decides for the request that comes next, from what the ranks do and what it would cost.

    A lone prompt is read by all ranks together, as that is fastest for it. Of several that wait,
    each rank reads one by itself where the first tokens come sooner so: nothing is exchanged then.

    Args:
        admission: what waits and what runs.
        costs: of the prompts so far.
        keeps: whether prompts are kept.
    """

    def __init__(self, admission: Admission, costs: PromptCosts, keeps: bool) -> None:
        self._admission, self._costs, self._keeps = admission, costs, keeps

    def of(self, work: Work) -> Place:
        """Who reads its prompt: "all" ranks; "one", its owner, which may be chosen anew here; or
        nobody yet, as ranks are busy with prompts of their own."""
        busy = {running.owner for running in self._admission.running if running.reading}
        base = work.base
        if base is not None and 2 * base[1] < work.prompt_tokens:
            work.base = None  # what little it shares is read again, if it is read by one rank
        if work.base is None and self._is_apart(work, len(busy)):
            return self._of_one(work, busy)
        work.base = base
        if not self._is_for_all(work):
            return "one"
        return "later" if busy else "all"

    def _is_apart(self, work: Work, busy: int) -> bool:
        tokens, waiting = work.prompt_tokens, len(self._admission) + busy
        return tokens > EXACT_TOKENS and self._costs.apart_is_faster(tokens, waiting)

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
