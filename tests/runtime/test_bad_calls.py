"""Arguments that are refused before anything is sent: the next answer is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from astra_runtime import Engine
from astra_runtime.evaluate import run_ranks
from astra_runtime.transport import Mesh

from .models import inputs_for, tiny
from .outputs import answer_of


def _bad_calls() -> dict[str, Any]:
    ids = inputs_for("llama", 24, batch=2)["input_ids"]
    ones = torch.ones_like(ids)
    beyond, negative = ids.clone(), ids.clone()
    beyond[0, 3], negative[1, 0] = 10**6, -1
    half = ones.float()
    half[0, 0] = 0.5
    return {
        "an id beyond the vocabulary": {"input_ids": beyond},
        "a negative id": {"input_ids": negative},
        "no sequence": {"input_ids": ids[:0]},
        "no token": {"input_ids": ids[:, :0]},
        "one token for two ranks": {"input_ids": ids[:, :1]},
        "ids as floats": {"input_ids": ids.float()},
        "ids as booleans": {"input_ids": ids.bool()},
        "one dimension": {"input_ids": ids[0]},
        "a list": {"input_ids": ids.tolist()},
        "nothing": {"input_ids": None},
        "an array": {"input_ids": ids.numpy()},
        "sparse": {"input_ids": ids.to_sparse()},
        "meta": {"input_ids": ids.to("meta")},
        "a mask of twos": {"input_ids": ids, "attention_mask": 2 * ones},
        "a mask of halves": {"input_ids": ids, "attention_mask": half},
        "a mask of NaN": {"input_ids": ids, "attention_mask": half * float("nan")},
        "a mask of another shape": {"input_ids": ids, "attention_mask": ones[:, :5]},
        "a mask that hides a row": {"input_ids": ids, "attention_mask": ones * 0},
        "a picture": {"pixel_values": torch.zeros(1, 1, 4, 4)},
        "an unknown name": {"input_ids": ids, "position_ids": ids},
        "no such answer": {"input_ids": ids, "logits": "first"},
        "no such outputs": {"input_ids": ids, "outputs": "none"},
        "more tokens than the model's": {"input_ids": ids.repeat(1, 100)},
    }


BAD_CALLS = _bad_calls()
BAD_GENERATIONS: dict[str, Any] = {
    "tokens as a float": {"max_new_tokens": 2.0},
    "no tokens": {"max_new_tokens": 0},
    "tokens as a truth": {"max_new_tokens": True},
    "an end that is text": {"eos_token_id": "5"},
    "an end beyond the vocabulary": {"eos_token_id": [5, 10**6]},
    "an end that is a float": {"eos_token_id": 5.0},
    "a choice that is none": {"choose": 5},
    "a callback that is none": {"on_token": "print"},
    "a mask with a hole at the end": {"attention_mask": torch.tensor([[1] * 23 + [0]] * 2)},
}


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.permutations(sorted(BAD_CALLS)), st.permutations(sorted(BAD_GENERATIONS)))
def test_good_answers_between_bad_requests_are_the_same(
    calls: list[str], generations: list[str]
) -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 24, batch=2)

    def work(mesh: Mesh) -> None:
        with Engine(model, None, mesh) as engine:
            good = engine(**inputs).logits
            made = engine.generate(inputs["input_ids"], max_new_tokens=2)
            for number, name in enumerate(calls):
                with pytest.raises((TypeError, ValueError), match="expected") as caught:
                    engine(**BAD_CALLS[name])
                assert "got" in str(caught.value), name
                if number % 5 == 0:
                    assert torch.equal(engine(**inputs).logits, good)
            for name in generations:
                with pytest.raises((TypeError, ValueError), match="expected"):
                    engine.generate(inputs["input_ids"], **BAD_GENERATIONS[name])
            assert torch.equal(engine.generate(inputs["input_ids"], max_new_tokens=2), made)
            assert torch.equal(engine(**inputs).logits, good)

    run_ranks(2, work, timeout=30)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(1, 1, 4, 4),
        torch.zeros(0, 1, 20, 20),
        torch.zeros(1, 3, 20, 20),
        torch.zeros(1, 1, 20, 20, dtype=torch.uint8),
        torch.full((1, 1, 20, 20), float("nan")),
    ],
    ids=["size", "none", "channels", "bytes", "NaN"],
)
def test_pictures_that_the_model_cannot_take(pixels: Tensor) -> None:
    model, inputs = tiny("vit"), inputs_for("vit")

    def work(mesh: Mesh) -> None:
        with Engine(model, None, mesh) as engine:
            good = answer_of(engine, inputs)
            with pytest.raises(ValueError, match="pixel_values: expected"):
                engine(pixel_values=pixels)
            assert torch.equal(answer_of(engine, inputs), good)

    run_ranks(2, work, timeout=20)


def test_token_types_that_the_model_does_not_have() -> None:
    model, inputs = tiny("bert"), inputs_for("bert", 24)
    ids = inputs["input_ids"]
    with Engine(model) as engine:
        for types in (ids * 0 + 7, ids * 0 - 1, ids.float()):
            with pytest.raises(ValueError, match="token_type_ids: expected"):
                engine(input_ids=ids, token_type_ids=types)
        with pytest.raises(ValueError, match="logits_to_keep: expected 0, as an encoder"):
            engine(input_ids=ids, logits_to_keep=1)
        engine(input_ids=ids, token_type_ids=None)


def test_autocast_is_refused() -> None:
    with Engine(tiny("llama")) as engine, torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match="autocast: expected"):
            engine(**inputs_for("llama"))
        with pytest.raises(ValueError, match="autocast: expected"):
            engine.generate(inputs_for("llama")["input_ids"])
