"""Drawing a token: whatever may be asked for gives one, and any rank goes on with the draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from astra_runtime.serve.sampling import Sampler
from astra_runtime.serve.service import Sampling

LOGITS = 10 * torch.randn(97, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 5e-324},
        {"temperature": 1e-40},
        {"temperature": 1e-9},
        {"top_p": 0.0},
        {"top_p": 1e-300},
        {"top_p": 0.0, "top_k": 3, "temperature": 2.0},
        {"top_k": 1},
    ],
)
def test_extremes_give_the_likeliest_token(asked: dict[str, Any]) -> None:
    sampler = Sampler(Sampling(seed=1, **asked))
    assert {sampler.draw(LOGITS).token for _ in range(5)} == {int(LOGITS.argmax())}


def test_equally_likely_tokens_are_all_drawn_at_any_temperature() -> None:
    sampler = Sampler(Sampling(seed=1, temperature=1e-30))
    drawn = {sampler.draw(torch.tensor([5.0, 7.0, 7.0])).token for _ in range(50)}
    assert drawn == {1, 2}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_of_any_size_is_a_bias(temperature: float) -> None:
    def drawn(**bias: float) -> set[int]:
        named = {int(name[1:]): value for name, value in bias.items()}
        sampler = Sampler(Sampling(seed=1, temperature=temperature, logit_bias=named))
        return {sampler.draw(torch.tensor([5.0, 7.0, 6.0])).token for _ in range(20)}

    assert drawn(_0=1e308) == {0}
    assert drawn(_0=-math.inf, _1=-math.inf) == {2}
    assert 0 not in drawn(_0=-1e308)
    with pytest.raises(ValueError, match="expected one that leaves a token"):
        drawn(_0=-math.inf, _1=-math.inf, _2=-math.inf)
    with pytest.raises(ValueError, match=r"the model's head knows, 0 to 2, got 3"):
        drawn(_3=1.0)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.3, top_p=0.95, top_k=60, seed=11, presence_penalty=0.5),
        Sampling(seed=3),
        Sampling(temperature=0),
    ],
)
def test_a_sampler_goes_on_where_another_was(sampling: Sampling) -> None:
    one, other = Sampler(sampling, 2), Sampler(sampling, 2)
    first = [one.draw(LOGITS).token for _ in range(2)]
    other.resume(first, 97)
    assert [other.draw(LOGITS) for _ in range(9)] == [one.draw(LOGITS) for _ in range(9)]
