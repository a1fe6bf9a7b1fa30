"""Text that a model writes: its own distribution, the same for the same seed."""

from __future__ import annotations

import torch

from astra_runtime.models import with_cache
from astra_runtime.train.sample import BATCH, document_token, sampled_windows

from ..models import tiny


def test_windows_are_many_and_repeatable() -> None:
    model = tiny("llama")
    seen: list[int] = []
    made = sampled_windows(model, BATCH + 2, 6, seed=3, progress=seen.append)
    assert [w.shape for w in made] == [(6,)] * (BATCH + 2)
    assert seen == list(range(1, 13))  # two batches
    again = sampled_windows(model, BATCH + 2, 6, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))
    other = sampled_windows(model, BATCH + 2, 6, seed=4)
    assert not all(torch.equal(a, b) for a, b in zip(made, other, strict=True))
    assert sampled_windows(model, 0, 6) == []


def test_tokens_come_as_often_as_the_model_says() -> None:
    model, start = tiny("gpt2"), 5
    first = torch.stack(sampled_windows(model, 2000, 1, start=start))[:, 0]
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([[start]])).logits[0, -1].softmax(-1)
    counted = first.bincount(minlength=97) / len(first)
    assert float((counted - chances).abs().max()) < 0.04


def test_later_tokens_follow_from_earlier_ones() -> None:
    """Of a model that is sure of itself there is one text: the one that it would decode."""
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight *= 1e4
    (window,) = sampled_windows(model, 1, 12, start=7)
    ids = model.generate(torch.tensor([[7]]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(window, ids[0, 1:])


def test_the_cache_is_passed_by_the_name_that_the_model_takes() -> None:
    class Before(torch.nn.Module):
        def forward(self, input_ids: object, past_key_values: object = None) -> None: ...

    class After(torch.nn.Module):
        def forward(self, input_ids: object, cache: object = None) -> None: ...

    assert with_cache(Before(), "it") == {"past_key_values": "it", "use_cache": True}
    assert with_cache(After(), "it") == {"cache": "it", "use_cache": True}


class Words:
    def __init__(self, words: dict[str, int], bos: int | None, eos: int | None) -> None:
        self.words, self.bos_token_id, self.eos_token_id = words, bos, eos

    def get_vocab(self) -> dict[str, int]:
        return self.words


def test_documents_begin_with_what_parts_them() -> None:
    assert document_token(Words({"<|endoftext|>": 9}, 1, 2)) == 9
    assert document_token(Words({}, 1, 2)) == 1
    assert document_token(Words({}, None, 2)) == 2
    assert document_token(Words({}, None, None)) == 0
