"""An engine leaves nothing in a model between calls, and a pass that went past it is an error."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from astra_runtime import Codebook, Engine
from astra_runtime.errors import AstraError, ModelChanged
from astra_runtime.evaluate import run_ranks
from astra_runtime.models import adapt
from astra_runtime.models.attention import PLAIN
from astra_runtime.models.hooks import _Clean
from astra_runtime.transport import Mesh

from .models import KINDS, inputs_for, tiny, windows_for


def answer_of(model: Any, kind: str, ranks: int = 2) -> Tensor:
    """All logits (or hidden states) of `ranks` ranks with dense exchange."""

    def work(mesh: Mesh) -> Tensor:
        with Engine(model, Codebook.none(), mesh) as engine:
            output = engine(**inputs_for(kind), logits="all")
        return output.logits if "logits" in output else output.last_hidden_state

    return run_ranks(ranks, work, timeout=20)[0]


def own_answer(model: Any, kind: str) -> Tensor:
    with torch.no_grad():
        output = model(**inputs_for(kind))
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_of_an_open_model_are_clean_models(kind: str, way: str) -> None:
    model = tiny(kind)
    with Engine(model) as engine:
        engine(**inputs_for(kind))
        twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    for module in twin.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert twin.config._attn_implementation == model.config._attn_implementation != "astra"
    torch.testing.assert_close(answer_of(twin, kind), own_answer(model, kind), atol=1e-3, rtol=1e-3)


def test_a_copy_made_during_a_call_works_and_hears_nothing() -> None:
    model = tiny("llama")
    twins: list[Any] = []

    def on_token(token: Tensor) -> None:
        twins.append(copy.deepcopy(model))
        twins.append(pickle.loads(pickle.dumps(model)))

    with Engine(model) as engine:
        engine.generate(inputs_for("llama")["input_ids"], max_new_tokens=1, on_token=on_token)
    for twin in twins:
        hooks = [h for m in twin.modules() for h in m._forward_pre_hooks.values()]
        assert all(isinstance(hook, _Clean) for hook in hooks)
        assert twin.model.layers[0].self_attn.config._attn_implementation == "sdpa"
        got = answer_of(twin, "llama")
        torch.testing.assert_close(got, own_answer(model, "llama"), atol=1e-3, rtol=1e-3)


def test_models_of_one_configuration_share_nothing() -> None:
    first = tiny("llama")
    second = transformers.LlamaForCausalLM(first.config).eval()

    def work(mesh: Mesh) -> Tensor:
        one = Engine(first, Codebook.none(), mesh)
        with Engine(second, Codebook.none(), mesh) as two:
            one(**inputs_for("llama"))
            one.close()
            mesh.agree({"first": "closed"})
            logits: Tensor = two(**inputs_for("llama"), logits="all").logits
            return logits

    got = run_ranks(2, work, timeout=20)[0]
    torch.testing.assert_close(got, own_answer(second, "llama"), atol=1e-3, rtol=1e-3)


def test_a_model_and_its_base_may_both_have_engines() -> None:
    model = tiny("llama")
    ids = inputs_for("llama")["input_ids"]
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state

    def work(mesh: Mesh) -> tuple[Tensor, Tensor]:
        whole, base = (Engine(m, Codebook.none(), mesh) for m in (model, model.model))
        inner = base(input_ids=ids, logits="all").last_hidden_state
        return inner, whole(input_ids=ids, logits="all").logits

    inner, logits = run_ranks(2, work, timeout=20)[0]
    torch.testing.assert_close(inner, hidden, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(logits, own_answer(model, "llama"), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_models_own_calls_stay_as_they_were(implementation: str) -> None:
    """Also while an engine's call runs in another thread."""
    model = tiny("gpt2", attn_implementation=implementation)
    inputs = inputs_for("gpt2")
    want = model(**inputs, output_attentions=implementation == "eager")
    started, go_on = threading.Event(), threading.Event()

    def on_token(token: Tensor) -> None:
        started.set()
        assert go_on.wait(20)

    with Engine(model) as engine:
        options: dict[str, Any] = {"max_new_tokens": 1, "on_token": on_token}
        thread = threading.Thread(
            target=engine.generate, args=(inputs["input_ids"],), kwargs=options
        )
        thread.start()
        assert started.wait(20)
        got = model(**inputs, output_attentions=implementation == "eager")
        go_on.set()
        thread.join()
    assert torch.equal(got.logits, want.logits)
    if implementation == "eager":
        assert len(got.attentions) == 3
        assert all(map(torch.equal, got.attentions, want.attentions))


def _capped(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> Any:
    return torch.zeros_like(query).transpose(1, 2), None


@pytest.mark.parametrize("kind", KINDS)
def test_attention_of_the_users_own_is_refused_by_name(kind: str) -> None:
    transformers.AttentionInterface.register("capped", _capped)
    model = tiny(kind)
    model.set_attn_implementation("capped")
    with pytest.raises(ValueError, match="expected plain attention.*got 'capped' in block 0"):
        Engine(model)
    model.set_attn_implementation(PLAIN[1])
    with Engine(model) as engine:
        model.set_attn_implementation("capped")
        with pytest.raises(ValueError, match="got 'capped'"):
            engine(**inputs_for(kind))
        model.set_attn_implementation("sdpa")
        engine(**inputs_for(kind))  # the refusal ended nothing


class Fused(nn.Module):
    """An attention module that computes attention by itself."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.query, self.key, self.value = old.query, old.key, old.value
        self.size = old.attention_head_size

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        parts = (
            layer(hidden).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2), None


class FusedWithConfig(Fused):
    def __init__(self, old: Any) -> None:
        super().__init__(old)
        self.config = old.config


@pytest.mark.parametrize("moment", ["before", "adapted", "open"])
@pytest.mark.parametrize("kind", [Fused, FusedWithConfig])
def test_replaced_attention_modules_are_named(kind: type[Fused], moment: str) -> None:
    model = tiny("bert")

    def replace() -> None:
        for layer in model.encoder.layer:
            layer.attention.self = kind(layer.attention.self)

    if moment == "adapted":
        adapt(model)
    if moment != "open":
        replace()

    def work(mesh: Mesh) -> None:
        with Engine(model, Codebook.none(), mesh) as engine:
            mesh.agree({"at": "open"})
            if moment == "open" and mesh.rank == 0:
                replace()
            mesh.agree({"at": "replaced"})
            engine(**inputs_for("bert"))

    with pytest.raises((ValueError, AstraError), match="attention|blocks"):
        run_ranks(2, work, timeout=20)


def test_a_patched_block_that_skips_attention_is_an_error() -> None:
    model = tiny("llama")
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    with (
        Engine(model) as engine,
        pytest.raises(ModelChanged, match="attention of block 1 .*LlamaAttention"),
    ):
        engine(**inputs_for("llama"))


def test_a_window_that_no_layer_uses_is_not_refused() -> None:
    Engine(tiny("llama", sliding_window=8)).close()  # Llama knows no windows
    Engine(tiny("mistral", sliding_window=256)).close()  # as long as the model's limit
    with pytest.raises(ValueError, match="sliding-window attention is not supported"):
        Engine(tiny("mistral", sliding_window=8))
    qwen = {"sliding_window": 8, "use_sliding_window": True}
    Engine(tiny("qwen2", **qwen, max_window_layers=3)).close()  # windows from layer 3 on
    with pytest.raises(ValueError, match="sliding-window attention is not supported"):
        Engine(tiny("qwen2", **qwen, max_window_layers=2))


def test_adapted_projections_are_called() -> None:
    """What a hook adds to GPT-2's c_attn, as adapters do, is in looked-up keys and values."""
    model = tiny("gpt2")
    for block in model.transformer.h:
        extra = nn.Linear(48, 144)
        block.attn.c_attn.register_forward_hook(lambda _, x, out, f=extra: out + f(x[0]))
    ids = torch.randint(0, 97, (1, 20), generator=torch.Generator().manual_seed(3))
    book = Codebook.fit(model, ids, space="hidden", codewords=20, held_back=0)  # lossless

    def work(mesh: Mesh) -> Tensor:
        with Engine(model, book, mesh, halo=0) as engine:
            logits: Tensor = engine(input_ids=ids, logits="all").logits
            return logits

    with torch.no_grad():
        want = model(ids).logits
    torch.testing.assert_close(run_ranks(2, work, timeout=20)[0], want, atol=1e-3, rtol=1e-3)


CONFIGURATIONS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in KINDS),
    ("gpt2", {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}),
    ("bert", {"layer_norm_eps": 1e-3, "hidden_act": "relu"}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
]


@pytest.mark.parametrize(("kind", "changes"), CONFIGURATIONS)
def test_numbers_come_of_the_configuration(kind: str, changes: dict[str, Any]) -> None:
    assert adapt(tiny(kind, **changes)).other_numbers() == ""


NUMBERS: dict[str, tuple[str, Any, str]] = {
    "a scale": (
        "gpt2",
        lambda model: setattr(model.transformer.h[1].attn, "scaling", 1.0),
        "transformer.h.1.attn.scaling=1",
    ),
    "an epsilon": (
        "vit",
        lambda model: setattr(model.vit.layernorm, "eps", 0.5),
        "vit.layernorm.eps=0.5",
    ),
    "frequencies": (
        "qwen2",
        lambda model: model.model.rotary_emb.inv_freq.mul_(2),
        "rotary frequencies of ",
    ),
    "an activation": (
        "llama",
        lambda model: setattr(model.model.layers[2].mlp, "act_fn", nn.ReLU()),
        "model.layers.2.mlp.act_fn=ReLU",
    ),
    "a factor": (
        "llama",
        lambda model: setattr(model.model.rotary_emb, "attention_scaling", 2.0),
        "rotary attention_scaling=2",
    ),
    "many": (
        "bert",
        lambda model: [setattr(m, "eps", 0.5) for m in model.modules() if hasattr(m, "eps")],
        "embeddings.LayerNorm.eps=0.5, encoder.layer.0.attention.output.LayerNorm.eps=0.5, "
        "encoder.layer.0.output.LayerNorm.eps=0.5 and 4 more (",
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_the_configuration_does_not_say(name: str) -> None:
    kind, change, words = NUMBERS[name]
    model = tiny(kind)
    digest = adapt(model).digest()
    change(model)
    assert adapt(model).other_numbers().startswith(words)
    assert adapt(model).digest() == digest


def test_parts_of_a_dtype_that_does_not_fit_are_refused() -> None:
    model = tiny("llama")
    model.lm_head.half()
    with pytest.raises(ValueError, match=r"torch\.float32 in lm_head\.weight.*got torch\.float16"):
        Engine(model)
    model = tiny("llama", tie_word_embeddings=True)
    model.lm_head.half()
    with pytest.raises(ValueError, match=r"torch\.float32 in model\.embed_tokens\.weight"):
        Engine(model)


def test_dtypes_that_are_mixed_on_purpose_are_taken() -> None:
    model = tiny("llama").bfloat16()
    model.lm_head.float()
    model.lm_head.register_forward_pre_hook(lambda _, given: (given[0].float(),))
    answer = answer_of(model, "llama")
    assert answer.dtype == torch.float32
    want = own_answer(model, "llama")
    torch.testing.assert_close(answer, want, atol=0.5, rtol=0.05)
    model = tiny("llama")
    model.model.embed_tokens.bfloat16()  # the first weight of all, and no key's
    torch.testing.assert_close(
        answer_of(model, "llama"), own_answer(model, "llama"), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("where", ["attention", "configuration"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_attention_in_the_other_direction_is_refused(kind: str, where: str) -> None:
    """Decoders that were made encoders, as some embedding models are, and the other way about."""
    model, causal = tiny(kind), kind != "bert"
    with Engine(model) as engine:
        owners = adapt(model).attentions if where == "attention" else [model.config]
        for owner in owners:
            owner.is_causal = not causal
        for make in (lambda: engine(**inputs_for(kind)), lambda: Engine(model)):
            with pytest.raises(ValueError, match=f"expected is_causal={causal}.*{where}"):
                make()


def test_dropout_at_work_in_one_part_is_refused() -> None:
    model = tiny("gpt2", resid_pdrop=0.5)
    with Engine(model) as engine:
        want = engine(**inputs_for("gpt2")).logits
        model.transformer.h[1].ln_1.train()  # computes the same in either mode
        assert torch.equal(engine(**inputs_for("gpt2")).logits, want)
        model.transformer.h[1].train()
        with pytest.raises(ValueError, match=r"expected evaluation mode, got training in .*h\.1"):
            engine(**inputs_for("gpt2"))
    with pytest.raises(ValueError, match="expected evaluation mode"):
        Engine(model)


def test_weights_that_are_not_in_memory_are_refused() -> None:
    model = tiny("llama")
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match=r"expected weights in memory, got lm_head\.weight"):
        Engine(model)


def test_words_in_a_configuration_make_no_other_model() -> None:
    model = tiny("llama")
    book = Codebook.fit(model, windows_for("llama"), groups=6, codewords=16, held_back=0)
    model.config.pad_token_id = 0
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    model.config.attention_dropout = 0.1
    model.config.max_length, model.config.note = 100, "somebody's own"  # no module reads them
    Engine(model, book).close()
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000}  # no float
    Engine(model, book).close()
    model.config.rms_norm_eps = 1e-3  # this is the function
    with pytest.raises(ValueError, match="made for a model with weights"):
        Engine(model, book)


def test_codebooks_of_models_that_were_named_by_all_words_stay_good() -> None:
    """A codebook fitted earlier names a model with words that its class does not know."""
    model = tiny("llama")
    book = Codebook.fit(model, windows_for("llama"), groups=6, codewords=16, held_back=0)
    now, before, _ = adapt(model)._own_digests()
    assert now == before  # as long as there are no such words
    model.config.license = "apache-2.0"
    older = {name for name in adapt(model).digests() if name != book.model}
    assert older
    for name in older:
        Engine(model, replace(book, model=name)).close()


@pytest.mark.parametrize("kind", ["gpt2", "bert", "vit"])
def test_words_about_heads_that_no_module_reads(kind: str) -> None:
    """Ranks took them for the model's sizes, and sent frames of another length."""
    model = tiny(kind, num_key_value_heads=2)
    if kind != "vit":  # whose modules read it
        model.config.head_dim = 4
    want = own_answer(model, kind)
    torch.testing.assert_close(answer_of(model, kind), want, atol=1e-4, rtol=1e-4)


class Wrapped(nn.Module):
    base_model_prefix = "base_model"

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model, self.config = model, model.config


def test_wrapped_models_and_unknown_heads_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"Wrapped; pass the model inside \(.base_model\)"):
        Engine(Wrapped(tiny("llama")).eval())
    with pytest.raises(ValueError, match="pass the model inside"):
        Engine(torch.compile(tiny("llama"), backend="eager"))
    vit = tiny("vit").config
    with pytest.raises(ValueError, match="ViTForMaskedImageModeling"):
        Engine(transformers.ViTForMaskedImageModeling(vit).eval())

    class Own(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    with pytest.raises(ValueError, match="Own"):
        Engine(Own(tiny("llama").config).eval())

    class Renamed(transformers.LlamaForCausalLM):
        """Computes what its parent does."""

    Engine(Renamed(tiny("llama").config).eval()).close()
