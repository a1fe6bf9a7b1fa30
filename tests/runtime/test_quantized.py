"""Models of integers and of half precision: loading, memory, ranks, the codebook of all forms."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from astra_kernels import _direct as direct
from astra_kernels.attention import native
from astra_runtime import Codebook, Engine, costs
from astra_runtime.costs import Paces, engine_plan
from astra_runtime.errors import HandshakeRefused
from astra_runtime.evaluate import run_ranks
from astra_runtime.models import adapt
from astra_runtime.models.quantize import quantize
from astra_runtime.models.quantized import (
    QuantizedLinear,
    form_of,
    quantize_groups,
    quantize_signed,
    weight_bytes,
)
from astra_runtime.store import DamagedModel, load_model

from .models import KINDS, inputs_for, tiny, windows_for


def output(model: Any, kind: str) -> torch.Tensor:
    with torch.inference_mode():
        answer = model(**inputs_for(kind))
    found: torch.Tensor = answer.logits if "logits" in answer else answer.last_hidden_state
    return found


def in_form(model: Any, form: str) -> Any:
    quantized = copy.deepcopy(model)
    quantize(quantized, form)
    return quantized


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama", hidden_size=96)


@pytest.fixture(scope="module")
def codes(llama: Any) -> Codebook:
    return Codebook.fit(llama, windows_for("llama"), space="kv", groups=3, codewords=8)


def test_weights_are_within_half_a_step_of_their_integers() -> None:
    weight = torch.randn(50, 64) * torch.rand(50, 1)
    integers, scale = quantize_signed(weight)
    assert integers.dtype == torch.int8
    assert scale.shape == (50, 1)
    assert ((integers * scale - weight).abs() <= 0.5001 * scale).all()
    halves, scales, minima = quantize_groups(weight)
    assert halves.shape == (50, 32)
    assert scales.shape == minima.shape == (50, 2)
    layer = QuantizedLinear(halves, scales, minima, None)
    whole = layer(torch.eye(64)).T  # a vector of one 1 is rounded without loss
    step = scales.float().repeat_interleave(32, 1)
    assert ((whole - weight).abs() <= 0.6 * step).all()
    with pytest.raises(ValueError, match="expected finite values"):
        quantize_signed(torch.full((2, 4), torch.nan))


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_of_integers_equal_one_device_of_the_same(kind: str) -> None:
    model = tiny(kind)
    quantized = in_form(model, "int8")
    alone, before = output(quantized, kind), output(model, kind)
    assert 0 < float((alone - before).norm() / before.norm()) < 0.1

    def work(mesh: Any) -> torch.Tensor:
        with Engine(quantized, None, mesh) as engine:
            answer = engine(**inputs_for(kind), logits="all")
        found: torch.Tensor = answer.logits if "logits" in answer else answer.last_hidden_state
        return found

    for answer in run_ranks(2, work):
        torch.testing.assert_close(answer, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit"])
def test_integers_may_be_converted_to_another_dtype(kind: str, dtype: torch.dtype) -> None:
    model = in_form(tiny(kind), "int8")
    want = output(model, kind)
    model.to(dtype)
    inputs = {
        name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs_for(kind).items()
    }
    with Engine(model) as engine:
        answer = engine(**inputs, logits="all")
    got = answer.logits if "logits" in answer else answer.last_hidden_state
    assert got.dtype == dtype
    assert float((got.float() - want).norm() / want.norm()) < 0.1


@pytest.mark.parametrize("form", ["int8", "int4", "bfloat16"])
def test_loading_tensor_by_tensor_gives_what_converting_the_whole_does(
    llama: Any, form: str, tmp_path: Any
) -> None:
    llama.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype=form)
    if form == "bfloat16":
        whole = type(llama).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    else:
        whole = in_form(llama, form)
    adapter = adapt(loaded)
    assert (adapter.form(), form_of(whole)) == (form, form)
    assert adapter.digest() == adapt(whole).digest()
    assert adapter.checkpoint() == adapt(llama).digest() != adapter.digest()
    assert loaded.config._attn_implementation == llama.config._attn_implementation
    assert not loaded.training
    torch.testing.assert_close(output(loaded, "llama"), output(whole, "llama"))


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_may_share_the_embeddings_integers(tied: bool, tmp_path: Any) -> None:
    model = tiny("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="int8")
    shared = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert shared == tied
    assert adapt(loaded).checkpoint() == adapt(model).digest()
    torch.testing.assert_close(output(loaded, "llama"), output(in_form(model, "int8"), "llama"))


def test_files_of_another_layout_are_left_to_transformers(tmp_path: Any) -> None:
    import transformers

    inner = tiny("gpt2").transformer
    inner.save_pretrained(tmp_path)  # without the head's names
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="int8")
    assert adapt(loaded).form() == "int8"
    assert adapt(loaded).checkpoint() == adapt(load_model(str(tmp_path))).digest()


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("kind", "saved"), [("llama", "int8"), ("llama", "int4"), ("vit", "int8")])
def test_integers_that_were_saved_are_not_taken_for_numbers(
    kind: str, saved: str, form: str, tmp_path: Any
) -> None:
    in_form(tiny(kind), saved).save_pretrained(tmp_path)
    with pytest.raises(DamagedModel, match="expected floating-point numbers in its files, got int"):
        load_model(str(tmp_path), form)


def test_threads_may_load_models_at_once(tmp_path: Any) -> None:
    tiny("llama").save_pretrained(tmp_path)
    done = threading.Event()

    def load(_: int) -> torch.Tensor:
        return output(load_model(str(tmp_path), "int8"), "llama")

    def others() -> bool:
        """Whether modules that another thread makes meanwhile are as ever."""
        plain = True
        while plain and not done.is_set():
            plain = not torch.nn.Linear(2, 2).weight.is_meta
        return plain

    with ThreadPoolExecutor(4) as pool:
        beside = pool.submit(others)
        try:
            answers = list(pool.map(load, range(12)))
        finally:
            done.set()
        assert beside.result()
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_bytes_of_weights() -> None:
    sizes = {"hidden_size": 192, "intermediate_size": 512, "vocab_size": 2000}
    model = tiny("llama", head_dim=32, tie_word_embeddings=True, **sizes)
    whole = weight_bytes(model)
    assert whole == sum(4 * p.numel() for p in model.parameters())  # shared ones count once
    assert weight_bytes(in_form(model, "int8")) < 0.3 * whole
    assert weight_bytes(in_form(model, "int4")) < 0.24 * whole


def test_a_codebook_serves_every_form_of_its_checkpoint(llama: Any, codes: Codebook) -> None:
    for form in ("int8", "int4"):
        quantized = in_form(llama, form)

        def work(mesh: Any, model: Any = quantized) -> torch.Tensor:
            with Engine(model, codes, mesh) as engine:
                found: torch.Tensor = engine(input_ids=inputs_for("llama")["input_ids"]).logits
            return found

        first, second = run_ranks(2, work)
        assert torch.equal(first, second)
    other = in_form(tiny("llama", seed=3, hidden_size=96), "int8")
    with pytest.raises(ValueError, match="fit a codebook for this model"):
        Engine(other, codes)


def test_weights_that_changed_after_loading_are_no_form_any_more(
    llama: Any, codes: Codebook
) -> None:
    quantized = in_form(llama, "int8")
    quantized.lm_head.scale.data *= 1.5
    with pytest.raises(ValueError, match=f"say checkpoint='{codes.model}'"):
        Engine(quantized, codes)


def test_a_form_that_somebody_else_made_needs_the_checkpoints_name(
    llama: Any, codes: Codebook
) -> None:
    half = copy.deepcopy(llama).bfloat16()
    with pytest.raises(ValueError, match="is of bfloat16.*say checkpoint="):
        Engine(half, codes)
    Engine(half, codes, checkpoint=codes.model).close()
    with pytest.raises(ValueError, match="checkpoint: expected .*, as the weights say"):
        Engine(llama, codes, checkpoint="0123456789abcdef")


def test_ranks_of_different_forms_are_refused_unless_asked_for(llama: Any, codes: Codebook) -> None:
    forms = [llama, in_form(llama, "int8")]

    def work(mesh: Any, mixed: bool) -> torch.Tensor:
        with Engine(forms[mesh.rank], codes, mesh, mixed_forms=mixed) as engine:
            found: torch.Tensor = engine(input_ids=inputs_for("llama")["input_ids"]).logits
        return found

    with pytest.raises(HandshakeRefused, match="form"):
        run_ranks(2, lambda mesh: work(mesh, False))
    first, second = run_ranks(2, lambda mesh: work(mesh, True))
    assert 0 < float((first - second).norm() / second.norm()) < 0.1  # each has a head of its own
    with pytest.raises(HandshakeRefused, match="form"):
        run_ranks(2, lambda mesh: work(mesh, mesh.rank == 1))


def test_shares_take_about_as_long_in_every_form(llama: Any) -> None:
    """A token's linear layers take less time in int8, what it attends to as much: the later ranks
    of a decoder compute fewer tokens. Ranks of different forms cut alike."""
    book = Codebook.dense()
    models = {"float32": llama} | {form: in_form(llama, form) for form in ("int8", "int4")}
    first = {name: engine_plan(adapt(m), book, 900, 2).size(0) for name, m in models.items()}
    assert first["int8"] > first["int4"] > first["float32"] > 450
    forms = [llama, models["int8"]]

    def work(mesh: Any) -> int:
        with Engine(forms[mesh.rank], book, mesh, mixed_forms=True) as engine:
            return engine.plan(900).size(0)

    assert run_ranks(2, work) == [first["float32"]] * 2


def test_ranks_of_unlike_processors_cut_by_the_slowest(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [llama, copy.deepcopy(llama)]
    told = {id(models[0]): Paces(0.4, 1.0), id(models[1]): Paces(0.7, 0.6)}
    monkeypatch.setattr(Paces, "of", lambda adapter, book: told[id(adapter.model)])

    def work(mesh: Any) -> tuple[Paces, Any]:
        with Engine(models[mesh.rank], Codebook.dense(), mesh) as engine:
            return engine.paces, engine.plan(900)

    plan = engine_plan(adapt(llama), Codebook.dense(), 900, 2, paces=Paces(0.7, 1.0))
    assert run_ranks(2, work) == [(Paces(0.7, 1.0), plan)] * 2


def test_paces_are_those_of_what_the_processor_has(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_form(llama, "int8")
    adapter, exact = adapt(model), Codebook.dense()
    rounding: Any = SimpleNamespace(codec=SimpleNamespace(rounds=lambda book: True))
    monkeypatch.setattr(direct, "HAS_VNNI", True)
    monkeypatch.setattr(direct, "MAY_ROUND", True)
    monkeypatch.setattr(native, "HAS_ROUNDED", True)
    assert Paces.of(adapter, exact) == (costs.LINEAR_PACE["int8"], 1.0)
    assert Paces.of(adapter, rounding) == (costs.LINEAR_PACE["int8"], costs.ROUNDED_PACE)
    monkeypatch.setattr(direct, "HAS_VNNI", False)
    monkeypatch.setattr(direct, "MAY_ROUND", False)
    assert Paces.of(adapter, rounding) == (costs.LINEAR_PACE_WITHOUT_VNNI["int8"], 1.0)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_layers_with_one_input_round_it_once(
    llama: Any, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During calls queries, keys and values, and gate and up: the same numbers, but where a hook
    is on one of them."""
    quantized, inputs = in_form(llama, form), inputs_for("llama")
    asked: list[int] = []
    own = direct.quantized_linears

    def counted(vectors: torch.Tensor, layers: Any) -> Any:
        asked.append(len(layers))
        return own(vectors, layers)

    with Engine(quantized) as engine:
        monkeypatch.setattr(direct, "quantized_linears", lambda *given: None)
        alone = engine(**inputs, logits="all").logits
        monkeypatch.setattr(direct, "quantized_linears", counted)
        assert torch.equal(engine(**inputs, logits="all").logits, alone)
    assert sorted(asked) == [2] * 3 + [3] * 3  # of three blocks
    asked.clear()
    block = quantized.model.layers[1]
    block.self_attn.k_proj.register_forward_hook(lambda module, args, out: 2 * out)
    with Engine(quantized) as engine:
        assert not torch.equal(engine(**inputs, logits="all").logits, alone)
    assert sorted(asked) == [2] * 3 + [3] * 2


def test_only_floating_point_is_quantized_and_only_to_known_forms(llama: Any) -> None:
    with pytest.raises(ValueError, match="form: expected one of int8, int4, got 'int3'"):
        quantize(copy.deepcopy(llama), "int3")
    with pytest.raises(ValueError, match="expected floating-point weights, got int8"):
        quantize(in_form(llama, "int8"), "int4")
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, int8, int4"):
        load_model("smollm2", dtype="int2")
