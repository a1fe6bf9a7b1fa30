"""Calls and generations as Hugging Face scripts write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.generation import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.logits_process import (
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from astra_runtime import Engine, InvalidChoice
from astra_runtime.decoding import end_tokens
from astra_runtime.evaluate import run_ranks

from .models import inputs_for, tiny

IDS = inputs_for("llama", 9, batch=2)["input_ids"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def engine(model: Any) -> Any:
    with Engine(model) as made:
        yield made


def test_a_call_takes_what_means_something(model: Any, engine: Any) -> None:
    given = {"use_cache": False, "output_attentions": False, "output_hidden_states": None}
    output = engine(IDS, return_dict=True, **given)
    want = model(IDS).logits
    torch.testing.assert_close(output.logits, want[:, -1:], rtol=1e-4, atol=5e-5)
    for keep, columns in ((0, slice(None)), (1, slice(-1, None))):
        kept = engine(input_ids=IDS, logits_to_keep=keep).logits
        torch.testing.assert_close(kept, want[:, columns], rtol=1e-4, atol=5e-5)
    as_tuple = engine(IDS, return_dict=False, logits="all")
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], want, rtol=1e-4, atol=5e-5)


def test_a_picture_by_position() -> None:
    model, inputs = tiny("vit"), inputs_for("vit")
    with Engine(model) as engine:
        found = engine(inputs["pixel_values"], interpolate_pos_encoding=False)
        with pytest.raises(ValueError, match="interpolate_pos_encoding: expected False, got True"):
            engine(inputs["pixel_values"], interpolate_pos_encoding=True)
    torch.testing.assert_close(found[0], model(**inputs)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"use_cache": True}, "use_cache: expected False, got True: sessions"),
        ({"output_attentions": True}, "output_attentions: expected False"),
        ({"output_hidden_states": True}, "output_hidden_states: expected False"),
        ({"labels": IDS}, "labels: expected none, got one: compute the loss"),
        ({"past_key_values": object()}, "past_key_values: expected none"),
        ({"inputs_embeds": torch.zeros(1, 2, 3)}, "inputs_embeds: expected none"),
        ({"position_ids": IDS}, "position_ids: expected none"),
        ({"logits_to_keep": 3}, "logits_to_keep: expected 0"),
        ({"logits_to_keep": 1, "logits": "all"}, "logits_to_keep: expected none beside"),
        ({"bogus": 1}, "got also bogus"),
    ],
)
def test_a_call_refuses_by_name(engine: Any, given: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        engine(IDS, **given)
    with pytest.raises(TypeError, match="input_ids: expected once"):
        engine(IDS, input_ids=IDS)


@pytest.mark.parametrize(
    "keywords",
    [
        {"max_new_tokens": 6, "repetition_penalty": 1.3},
        {"max_length": 14, "no_repeat_ngram_size": 2, "use_cache": True, "num_beams": 1},
        {"max_new_tokens": 5, "suppress_tokens": [1, 2, 3], "min_new_tokens": 3, "eos_token_id": 7},
        {"max_new_tokens": 6, "bad_words_ids": [[5], [6, 7]]},
        {"max_new_tokens": 5, "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
        {"max_new_tokens": 5, "do_sample": True, "min_p": 0.01, "num_return_sequences": 3},
        {"generation_config": GenerationConfig(do_sample=True, typical_p=0.9, max_new_tokens=4)},
        {
            "max_new_tokens": 4,
            "logits_processor": LogitsProcessorList([TemperatureLogitsWarper(2.0)]),
        },
        {"max_new_tokens": 9, "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(12)])},
        {  # warpers come last: the likeliest tokens are gone before they are counted
            "max_new_tokens": 4,
            "do_sample": True,
            "top_k": 3,
            "logits_processor": LogitsProcessorList(
                [SuppressTokensLogitsProcessor([*range(70)], device="cpu")]
            ),
        },
        {
            "max_new_tokens": 5,
            "do_sample": True,
            "logits_processor": LogitsProcessorList([TopKLogitsWarper(2)]),
        },
        {
            "max_new_tokens": 8,
            "min_new_tokens": 5,
            "eos_token_id": [*range(0, 97, 2)],
            "pad_token_id": 96,
        },
    ],
)
def test_generation_is_that_of_the_model(model: Any, engine: Any, keywords: dict[str, Any]) -> None:
    """With the same seed, which one device draws from."""
    torch.manual_seed(5)
    want = model.generate(IDS, attention_mask=torch.ones_like(IDS), **keywords)
    torch.manual_seed(5)
    assert engine.generate(IDS, **keywords).tolist() == want.tolist()


def test_finished_rows_are_padded(model: Any, engine: Any) -> None:
    plain = engine.generate(IDS, max_new_tokens=6)
    end = int(plain[0, IDS.shape[1] + 1])
    keywords = {"max_new_tokens": 6, "eos_token_id": end, "pad_token_id": 0}
    want = model.generate(IDS, attention_mask=torch.ones_like(IDS), do_sample=False, **keywords)
    found = engine.generate(IDS, do_sample=False, **keywords)
    assert found[:, : want.shape[1]].tolist() == want.tolist()


class _Hits:
    """A criterion that a row meets at one step, and not any more at the next."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = lengths

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([ids.shape[1] == IDS.shape[1] + n for n in self.lengths])


@pytest.mark.parametrize("keywords", [{}, {"eos_token_id": 96, "pad_token_id": 95}])
def test_rows_that_a_criterion_has_ended_stay_so(
    model: Any, engine: Any, keywords: dict[str, Any]
) -> None:
    """One row by one, and filled up where an end token is known."""
    asked = {"max_new_tokens": 9, "stopping_criteria": StoppingCriteriaList([_Hits(2, 5)])}
    want = model.generate(IDS, attention_mask=torch.ones_like(IDS), **asked, **keywords)
    assert want.shape[1] == IDS.shape[1] + 5
    assert engine.generate(IDS, **asked, **keywords).tolist() == want.tolist()


@pytest.mark.parametrize("ends", [50256, -1, [50256, 7]])
@pytest.mark.parametrize("keywords", [{}, {"do_sample": False}, {"min_new_tokens": 2}])
def test_an_end_that_the_model_never_gives_ends_nothing(ends: Any, keywords: Any) -> None:
    """GPT2Config names its end token 50256, whatever the vocabulary."""
    model = tiny("gpt2")
    model.generation_config = GenerationConfig(eos_token_id=ends, max_new_tokens=5)
    mask = torch.ones_like(IDS)
    want = model.generate(IDS, attention_mask=mask, **keywords)
    with Engine(model) as engine:
        engine.warmup(8)
        got = engine.generate(IDS, attention_mask=mask, max_new_tokens=5, **keywords)
        session = engine.session()
        session.append(IDS[:1])
        assert session.generate(max_new_tokens=5).shape[-1]
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize(
    ("made", "got"),
    [
        (lambda ids, scores: None, "got NoneType"),
        (lambda ids, scores: scores[0], r"got shape \[97\]"),
        (lambda ids, scores: scores * float("nan"), "got NaN"),
        (lambda ids, scores: scores - float("inf"), "or no token that is left"),
    ],
)
def test_scores_of_which_no_token_is_the_likeliest_are_refused(
    engine: Any, made: Any, got: str
) -> None:
    with pytest.raises(InvalidChoice, match=rf"logits_processor: expected .* \[2, V\], .*{got}"):
        engine.generate(IDS, max_new_tokens=2, logits_processor=[made])


def test_a_processor_may_force_a_token(engine: Any) -> None:
    def force(ids: Any, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor([7]), float("inf"))

    made = engine.generate(IDS, max_new_tokens=2, logits_processor=[force])
    assert made[:, -2:].tolist() == [[7, 7]] * 2


@pytest.mark.parametrize(
    "given",
    [[5, 7], (5, 7), torch.tensor([5, 7]), np.array([5, 7])],
    ids=lambda v: type(v).__name__,
)
def test_ends_are_given_in_any_sequence(given: Any) -> None:
    assert end_tokens(tiny("llama"), given, 97) == (5, 7)


def test_a_generation_config_is_filled_by_the_models(model: Any, engine: Any) -> None:
    own = model.generation_config
    model.generation_config = GenerationConfig(do_sample=True, top_k=4, max_length=30)
    try:
        torch.manual_seed(3)
        asked = GenerationConfig(max_new_tokens=6)
        want = model.generate(IDS, attention_mask=torch.ones_like(IDS), generation_config=asked)
        torch.manual_seed(3)
        assert engine.generate(IDS, generation_config=asked).tolist() == want.tolist()
        long = IDS.repeat(1, 4)  # longer than the config's max_length, which is not what counts
        assert engine.generate(long, max_new_tokens=2, top_k=2).shape[1] == long.shape[1] + 2
    finally:
        model.generation_config = own


@pytest.mark.parametrize("repetition_penalty", [None, 1.5])
def test_padding_tokens_are_padding(model: Any, repetition_penalty: float | None) -> None:
    """As transformers infers it: without a mask, and where they end no text."""
    ids, own = IDS.clone(), model.generation_config
    ids[1, :4] = 0
    keywords: dict[str, Any] = {"max_new_tokens": 5}
    if repetition_penalty is not None:
        keywords["repetition_penalty"] = repetition_penalty
    model.generation_config = GenerationConfig(pad_token_id=0)
    try:
        want = model.generate(ids, do_sample=False, **keywords).tolist()
        found = run_ranks(2, lambda mesh: Engine(model, None, mesh).generate(ids, **keywords))
        assert [found[0].tolist(), found[1].tolist()] == [want, want]
        alone = model.generate(ids[1:, 4:], do_sample=False, **keywords)
        assert want[1][4:] == alone[0].tolist()
    finally:
        model.generation_config = own


def test_every_rank_returns_what_the_owner_drew(model: Any) -> None:
    def work(mesh: Any) -> list[list[int]]:
        with Engine(model, None, mesh) as engine:
            return engine.generate(IDS, do_sample=True, top_k=4, max_new_tokens=4).tolist()

    torch.manual_seed(1)
    first, second = run_ranks(2, work)
    assert first == second


def test_a_streamer_hears_prompt_and_tokens(engine: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.parts: list[torch.Tensor] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.parts.append(value)

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    ids = engine.generate(IDS[:1], max_new_tokens=3, streamer=streamer)
    assert streamer.ended
    assert torch.equal(torch.cat([p.flatten() for p in streamer.parts]), ids.flatten())


@pytest.mark.parametrize(
    ("keywords", "error", "wanted"),
    [
        ({"num_beams": 4}, ValueError, "num_beams: expected 1"),
        ({"assistant_model": object()}, ValueError, "assistant_model: expected none"),
        ({"inputs_embeds": torch.zeros(2, 3, 48)}, ValueError, "inputs_embeds: expected none"),
        ({"past_key_values": DynamicCache()}, ValueError, "past_key_values: expected none"),
        ({"penalty_alpha": 0.6}, ValueError, "penalty_alpha: expected None"),
        ({"return_dict_in_generate": True}, ValueError, "return_dict_in_generate: expected False"),
        (
            {"generation_config": GenerationConfig(num_beams=2)},
            ValueError,
            "generation_config.num_b",
        ),
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences: expected 1"),
        ({"num_return_sequences": 0}, ValueError, "num_return_sequences: expected at least 1"),
        ({"num_return_sequences": 1.5}, TypeError, "num_return_sequences: expected an integer"),
        ({"generation_config": {"do_sample": True}}, TypeError, "generation_config: expected"),
        ({"logits_processor": len}, TypeError, "logits_processor: expected a list of functions"),
        ({"streamer": []}, TypeError, "streamer: expected an object with put and end"),
        ({"max_length": 9}, ValueError, "max_length: expected more than the prompt's 9"),
        ({"max_length": 14.5}, TypeError, "max_length: expected an integer"),
        ({"do_sample": True, "attention_mask": [[1]]}, TypeError, "attention_mask: expected a ten"),
        ({"top_k": 2, "eos_token_id": 1.5}, TypeError, "eos_token_id: expected an integer"),
        ({"pad_token_id": 1.5}, TypeError, "pad_token_id: expected an integer"),
        ({"bogus": 1}, TypeError, "got 'bogus'"),
        ({"do_sample": True, "choose": lambda ids, logits: ids[:, 0]}, ValueError, "choose: exp"),
        ({"max_new_tokens": 0, "do_sample": True}, ValueError, "max_new_tokens"),
    ],
)
def test_generation_refuses_by_name(
    engine: Any, keywords: dict[str, Any], error: type[Exception], wanted: str
) -> None:
    with pytest.raises(error, match=wanted):
        engine.generate(IDS, **keywords)


@pytest.mark.parametrize("ids", [IDS.tolist(), None, IDS[0], IDS[:0], IDS.float()])
def test_prompts_that_are_none(engine: Any, ids: Any) -> None:
    for keywords in ({}, {"do_sample": True}, {"num_return_sequences": 2, "do_sample": True}):
        with pytest.raises((TypeError, ValueError), match="input_ids: expected"):
            engine.generate(ids, **keywords)
    with pytest.raises((TypeError, ValueError), match="input_ids: expected"):
        engine.prefill(ids)
