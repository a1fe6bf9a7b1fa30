"""The command with the models that have a name here, and its own defaults."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

Here = Callable[..., tuple[str, str]]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_question_gets_one_answer_from_any_number_of_ranks(here: Here) -> None:
    asked = ["run", "--prompt", "What is the capital of France?", "--max-new-tokens", "8"]
    alone, told = here(*asked)
    assert "Paris" in alone
    assert "chat template" in told
    together, told = here(*asked, "--world-size", "2")  # no codes, so none are fitted
    assert together == alone
    assert "fitting" not in told


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_encoder_is_evaluated_and_planned_with_the_defaults(here: Here) -> None:
    asked = ["--model", "minilm", "--codebook", "none", "--json"]
    assert json.loads(here("eval", *asked, "--windows", "1")[0])["tokens"] == 512
    assert json.loads(here("plan", *asked, "--world-size", "2")[0])["tokens"] == 512
