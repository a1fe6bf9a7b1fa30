"""What a fit is given, and refuses before hours are spent: in a sentence, in every space."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from astra_runtime import Codebook, Engine
from astra_runtime.costs import engine_plan
from astra_runtime.evaluate import Measured, answer_of, measure, run_ranks
from astra_runtime.models import adapt
from astra_runtime.train.finetune import finetune
from astra_runtime.train.schedule import Settings
from astra_runtime.train.simulate import Simulation

from ..models import tiny, windows_for

SPACES = ("kv", "hidden", "differential", "transform")
WINDOWS = windows_for("llama")


def fit(model: Any, windows: Any, space: str = "kv", **options: Any) -> Codebook:
    return Codebook.fit(model, windows, space=space, codewords=16, held_back=0, **options)


@pytest.mark.parametrize("space", SPACES)
def test_a_decoder_of_one_block_is_fitted(space: str) -> None:
    model = tiny("llama", num_hidden_layers=1)
    ids = windows_for("llama", count=1, tokens=20)
    book = fit(model, WINDOWS, space)
    with torch.no_grad():
        exact = model(ids).logits

    def work(mesh: Any) -> Any:
        with Engine(model, book, mesh, halo=0) as engine:
            return engine(input_ids=ids, logits="all").logits

    output = run_ranks(2, work, timeout=20)[0]
    free = space in ("differential", "transform")  # every rank computes block 0 of token ids
    assert (book.bits == 0) is free
    assert torch.allclose(output, exact, atol=1e-3) is free


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("space", SPACES)
def test_weights_that_are_not_finite_are_named(space: str, name: str) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"weights that are not finite: {name}"):
        fit(model, WINDOWS, space)


@pytest.mark.parametrize("space", SPACES)
def test_outputs_that_are_not_finite_are_refused(space: str) -> None:
    model = tiny("llama")
    model.model.layers[2].mlp.register_forward_hook(lambda module, given, out: out / 0.0)
    with pytest.raises(ValueError, match="its output is not finite on the calibration data"):
        fit(model, WINDOWS, space)


@pytest.mark.filterwarnings("ignore")
def test_models_without_gradients_are_refused_where_they_are_needed() -> None:
    quantized = torch.ao.quantization.quantize_dynamic(
        tiny("llama"), {torch.nn.Linear}, dtype=torch.qint8
    )
    with pytest.raises(ValueError, match="expected one that gradients pass through"):
        fit(quantized, WINDOWS, "transform")
    with pytest.raises(ValueError, match="expected fp32 weights to train, got quantized ones"):
        finetune(quantized, Codebook.dense(), WINDOWS, Settings(1, ranks=(2, 2)))
    assert fit(quantized, WINDOWS, "kv").coded


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (WINDOWS[:0], "expected at least one window, got none"),
        (torch.tensor(3), "calibration: expected windows, got a single number"),
        (WINDOWS.to("meta"), "expected tensors in memory"),
        (WINDOWS[:, :0], "window 0: input_ids: expected at least one token"),
        (WINDOWS[:, :1], "expected windows of at least [23] tokens, got 1 in window 0"),
        (WINDOWS[:3, :4], "codewords: expected 2 to 65536 and at most the (9|12) calibration"),
        ([WINDOWS[0], WINDOWS[1, :1]], "at least [23] tokens, got 1 in window 1"),
        (torch.full((6, 40), 3), "expected windows of several values, got 3 only"),
        ([WINDOWS], r"expected windows of token ids, .* of shape \[6, 40\]"),
        (WINDOWS.float(), "expected windows of token ids"),
        ([WINDOWS[0], torch.rand(1, 4, 4)], "expected windows of token ids"),
        (WINDOWS > 3, "window 0: input_ids: expected integers"),
        (WINDOWS + 60, "window 0: input_ids: expected values from 0 to 96, got"),
        (WINDOWS - 97, "window 0: input_ids: expected values from 0 to 96, got -"),
        (WINDOWS.repeat(1, 7), "window 0: input_ids: expected at most 256 tokens"),
    ],
)
@pytest.mark.parametrize("space", SPACES)
def test_windows_that_cannot_be_fitted_on_are_refused(
    space: str, windows: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tiny("llama"), windows, space)


@pytest.mark.parametrize("windows", ["a text", [[1, 2, 3]], {"input_ids": WINDOWS}, None, 3])
def test_windows_that_are_no_tensors_are_refused(windows: Any) -> None:
    with pytest.raises(TypeError, match="calibration: expected tensors, got"):
        fit(tiny("llama"), windows)


def test_more_windows_are_checked_alike() -> None:
    with pytest.raises(ValueError, match="window 6: input_ids: expected values from 0 to 96"):
        fit(tiny("llama"), WINDOWS, extra=[WINDOWS[0] + 97])
    assert fit(tiny("llama"), WINDOWS, extra=WINDOWS[:1]) != fit(tiny("llama"), WINDOWS)


@pytest.mark.parametrize(
    "options", [{"groups": 2.0}, {"iterations": "8"}, {"seed": None, "groups": True}]
)
def test_numbers_of_another_type_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="expected an integer, got"):
        fit(tiny("llama"), WINDOWS, **options)
    for other in ({"bits": "100"}, {"fine_bits": [1]}, {"extra": None}, {"progress": 5}):
        with pytest.raises(TypeError, match=f"{next(iter(other))}: expected"):
            fit(tiny("llama"), WINDOWS, "transform", **other)
    with pytest.raises(TypeError, match="space: expected a string"):
        fit(tiny("llama"), WINDOWS, ["kv"])  # type: ignore[arg-type]
    inside = pytest.raises(ValueError, match="expected a call outside of torch.inference_mode")
    with inside, torch.inference_mode():
        fit(tiny("llama"), WINDOWS, "transform")
    with pytest.raises(ValueError, match="seed: expected at most 62 bits"):
        fit(tiny("llama"), WINDOWS, seed=2**70)
    with pytest.raises(ValueError, match="codewords: expected 2 to 65536, got 0"):
        Codebook.fit(tiny("llama"), WINDOWS, codewords=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        fit(tiny("llama"), WINDOWS, foo=1)


def test_images_are_checked_alike() -> None:
    images = windows_for("vit")
    for wrong, message in (
        (images * torch.nan, "window 0: pixel_values: expected finite values"),
        (images[..., :16, :16], r"window 0: pixel_values: expected \[B, 1, 20, 20\]"),
        (torch.ones(4, 1, 20, 20), "expected windows of several values, got 1 only"),
        (images[None], "expected windows of token ids"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(tiny("vit"), wrong, "transform")


def test_images_of_another_dtype_are_converted() -> None:
    """As they come from NumPy."""
    model, images = tiny("vit"), windows_for("vit")
    assert fit(model, images.double()) == fit(model, images)
    settings = Settings(1, batch=1, ranks=(2, 2), shard=4)
    assert finetune(model, Codebook.dense(), images.double(), settings, held_back=0) is not None


def test_training_checks_its_windows_alike() -> None:
    settings = Settings(1, ranks=(2, 2))
    with pytest.raises(ValueError, match="data: window 0: input_ids: expected values from 0"):
        finetune(tiny("llama"), Codebook.dense(), WINDOWS + 97, settings)
    with pytest.raises(ValueError, match="data: expected windows of several values"):
        finetune(tiny("llama"), Codebook.dense(), torch.full((6, 40), 3), settings)


@pytest.mark.parametrize(
    ("figures", "recovered"),
    [
        (("perplexity", 10.0, 15.0, 20.0), math.log(20 / 15) / math.log(2)),
        (("perplexity", 10.0, 9.9, 10.001), math.nan),  # 2014 % of rounding noise
        (("perplexity", 10.0, 9.9, 9.5), math.nan),
        (("error", 0.0, 0.02, 0.2), 0.9),
        (("error", 0.0, 0.02, 1e-9), math.nan),
    ],
)
def test_a_gap_within_rounding_is_no_gap(
    figures: tuple[str, float, float, float], recovered: float
) -> None:
    measured = Measured(*figures, bits_per_token_block=8)
    assert measured.gap_recovered == pytest.approx(recovered, nan_ok=True)


def test_a_target_without_a_gap_is_refused_at_once() -> None:
    """Attention that sees next to nothing: remote tokens are worth nothing."""
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    tried: list[str] = []
    with pytest.raises(ValueError, match="target_gap: remote tokens are worth nothing"):
        Codebook.fit(
            model,
            WINDOWS,
            space="transform",
            target_gap=0.5,
            codewords=16,
            world_size=2,
            progress=lambda what, done, steps: tried.append(what),
        )
    assert tried.count("clustering") == 3  # one budget


@pytest.mark.parametrize(
    ("name", "space", "labels"),
    [
        ("LlamaForSequenceClassification", "kv", 1),
        ("GPT2ForSequenceClassification", "transform", 3),
        ("Qwen2ForQuestionAnswering", "kv", 2),
        ("BertForQuestionAnswering", "transform", 2),
        ("BertForSequenceClassification", "transform", 1),
    ],
)
def test_models_with_heads_are_fitted(name: str, space: str, labels: int) -> None:
    """A head that looks for a token by its column, two answers, a single number."""
    family = next(f for f in ("Llama", "GPT2", "Qwen2", "Bert") if name.startswith(f))
    config = tiny(family.lower(), pad_token_id=96, num_labels=labels).config
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    windows = windows_for(family.lower(), count=3, tokens=30)
    options: dict[str, Any] = {"space": space, "codewords": 8, "iterations": 2}
    book = Codebook.fit(model, windows, held_back=1, world_size=2, **options)
    assert 0 <= book.notes["held_back"]["astra"] < 10
    ids = windows[:1]
    plan = engine_plan(adapt(model), book, ids.shape[1] - adapt(model).class_tokens, 2, halo=0)

    def work(mesh: Any) -> Tensor:
        with Engine(model, book, mesh, halo=0) as engine:
            return answer_of(engine(input_ids=ids, logits="all"))

    with torch.no_grad():
        simulated = answer_of(Simulation(model, book, plan, {"input_ids": ids}).run())
    torch.testing.assert_close(run_ranks(2, work)[0], simulated, atol=1e-3, rtol=1e-3)


def test_what_cannot_be_measured_on_is_refused() -> None:
    with pytest.raises(ValueError, match="windows: expected at least one, got none"):
        measure(tiny("llama"), Codebook.dense(), [], world_size=2)
    with pytest.raises(TypeError, match="windows: expected the inputs of a call each"):
        measure(tiny("llama"), Codebook.dense(), [WINDOWS[:1]], world_size=2)  # type: ignore[list-item]
    padded = {"input_ids": WINDOWS[:1], "attention_mask": (WINDOWS[:1] > 50).long()}
    with pytest.raises(ValueError, match="windows: expected no padding"):
        measure(tiny("llama"), Codebook.dense(), [padded], world_size=2)
