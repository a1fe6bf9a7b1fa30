"""A model or codebook that changes under an open engine is an error that names what changed."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn

from astra_runtime import Engine
from astra_runtime.errors import AstraError, ModelChanged
from astra_runtime.evaluate import run_ranks
from astra_runtime.models import adapt
from astra_runtime.transport import Mesh

from .models import book_of, inputs_for, tiny

WRITES: dict[str, Any] = {
    "data": lambda p: p.data.mul_(2.0),
    "in place": lambda p: p.mul_(2.0),
    "one of many": lambda p: p.data.view(-1)[0].add_(1.0),
    "one that no sample has": lambda p: p[3, 5].zero_(),
    "replaced": lambda p: setattr(p, "data", p.data.clone()),
}


@pytest.mark.parametrize("write", WRITES)
def test_weights_that_change_while_an_engine_is_open(write: str) -> None:
    model = tiny("llama")
    with Engine(model) as engine:
        engine(**inputs_for("llama"))
        with torch.no_grad():
            WRITES[write](model.model.layers[2].self_attn.v_proj.weight)
        with pytest.raises(ModelChanged, match=r"layers\.2\.self_attn\.v_proj\.weight"):
            engine(**inputs_for("llama"))
    Engine(model)(**inputs_for("llama"))  # another engine takes the model as it is


def test_dtype_training_and_modules_that_change_while_an_engine_is_open() -> None:
    model = tiny("llama")
    with Engine(model) as engine:
        model.train()
        with pytest.raises(ValueError, match="expected evaluation mode"):
            engine(**inputs_for("llama"))
        with pytest.raises(ValueError, match="expected evaluation mode"):
            engine.generate(inputs_for("llama")["input_ids"])
        model.eval()
        engine(**inputs_for("llama"))
        model.double()
        with pytest.raises(ModelChanged):
            engine(**inputs_for("llama"))
    model = tiny("llama")
    with Engine(model) as engine:
        norm = model.model.norm
        norm.weight = nn.Parameter(norm.weight.detach().clone())
        with pytest.raises(ModelChanged, match=r"model\.norm\.weight"):
            engine(**inputs_for("llama"))


def test_a_module_that_does_not_fit_any_more_is_named_on_every_rank() -> None:
    """Transform codes begin a call with a product of the first block's."""
    models = [tiny("llama"), tiny("llama")]
    book = book_of(models[0], "llama", space="transform", bits=20, codewords=8, held_back=0)

    def work(mesh: Mesh) -> None:
        model = models[mesh.rank]
        with Engine(model, book, mesh, halo=0) as engine:
            engine(**inputs_for("llama", 80))
            if mesh.rank == 0:
                model.model.layers[0].self_attn.k_proj = nn.Linear(7, 9)
            ids = inputs_for("llama", 80)["input_ids"]
            for call in (engine, lambda **inputs: engine.generate(**inputs, max_new_tokens=2)):
                with pytest.raises(AstraError, match=r"a module in model\.layers\.0\.self_attn"):
                    call(input_ids=ids)

    run_ranks(2, work, timeout=20)


def test_a_codebook_that_changes_while_an_engine_is_open() -> None:
    """Its rank would code by it, and the others read the codes by theirs."""
    model = tiny("llama")
    own = copy.deepcopy(book_of(model, "llama", space="hidden", codewords=16, held_back=0))
    assert own.tables is not None
    with Engine(model, own) as engine:
        engine(**inputs_for("llama"))
        own.tables[1, 0, 3] += 1
        with pytest.raises(ModelChanged, match="the codebook's tables has changed"):
            engine(**inputs_for("llama"))


PARTS: dict[str, tuple[Any, str]] = {
    "a module": (lambda layer: setattr(layer, "mlp", nn.Identity()), r"in model\.layers\.1 "),
    "a buffer": (lambda layer: layer.noted.mul_(2), r"layers\.1\.noted"),
    "a hook": (
        lambda layer: layer.self_attn.k_proj.register_forward_hook(lambda _, x, out: 2 * out),
        r"layers\.1\.self_attn\.k_proj computes",
    ),
    "an epsilon": (
        lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 1.0),
        r"layers\.1\.input_layernorm computes",
    ),
    "a bias where there was none": (
        lambda layer: setattr(layer.self_attn.v_proj, "bias", nn.Parameter(torch.ones(48))),
        r"number of parameters in model\.layers\.1\.self_attn\.v_proj",
    ),
    "a scale": (
        lambda layer: setattr(layer.self_attn, "scaling", 1.0),
        r"layers\.1\.self_attn\.scaling",
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_that_change_while_an_engine_is_open(part: str) -> None:
    """Tables of a projection that is another by now, too."""
    model = tiny("llama")
    layer, (change, words) = model.model.layers[1], PARTS[part]
    layer.register_buffer("noted", torch.ones(3), persistent=False)
    book = book_of(model, "llama", space="hidden", codewords=16, held_back=0)
    with Engine(model, book) as engine:
        engine(**inputs_for("llama"))
        change(layer)
        with pytest.raises(ModelChanged, match=words):
            engine(**inputs_for("llama"))


def test_hidden_states_and_attentions_of_the_model_beside_an_open_engine() -> None:
    """transformers puts hooks into the model for them."""
    model, inputs = tiny("llama", attn_implementation="eager"), inputs_for("llama")
    book = book_of(model, "llama", space="hidden", codewords=16, held_back=0)
    with Engine(model, book) as engine:
        want = engine(**inputs).logits
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
        assert len(output.attentions) == len(output.hidden_states) - 1 == 3
        assert torch.equal(engine(**inputs).logits, want)


def test_a_hook_that_no_table_knows_of_is_welcome() -> None:
    model, seen = tiny("llama"), []
    with Engine(model) as engine:
        want = engine(**inputs_for("llama")).logits
        layer = model.model.layers[1]
        layer.self_attn.k_proj.register_forward_hook(lambda *_: seen.append(True))
        assert torch.equal(engine(**inputs_for("llama")).logits, want)
    assert seen


def test_a_configuration_that_changes_while_an_engine_is_open() -> None:
    model = tiny("mistral")
    with Engine(model) as engine:
        want = engine(**inputs_for("mistral")).logits
        model.config.pad_token_id, model.config.use_cache = 5, False  # about other things
        assert torch.equal(engine(**inputs_for("mistral")).logits, want)
        model.config.sliding_window = 4
        with pytest.raises(ModelChanged, match="sliding_window of the model's configuration"):
            engine(**inputs_for("mistral"))


def test_a_configuration_may_hold_anything() -> None:
    """A tensor of class weights there ended the mesh at the first call."""
    model = tiny("llama")
    model.config.class_weights, model.config.callbacks = torch.ones(3), [object()]
    assert adapt(model).digest() == adapt(model).digest()
    with Engine(model) as engine:
        engine(**inputs_for("llama"))
        model.config.class_weights = torch.ones(3)
        with pytest.raises(ModelChanged, match="class_weights of the model's configuration"):
            engine(**inputs_for("llama"))
    model.config.lock = threading.Lock()
    with pytest.raises(ValueError, match="expected a configuration that can be saved"):
        Engine(model)


def _swap_function(layer: Any) -> None:
    layer.intermediate.intermediate_act_fn = torch.relu


def _swap_inside(layer: Any) -> None:
    layer.intermediate.intermediate_act_fn.act = torch.relu


@pytest.mark.parametrize(
    ("swap", "activation"),
    [(_swap_function, torch.nn.functional.gelu), (_swap_inside, "gelu")],
)
def test_activation_functions_that_are_swapped(swap: Any, activation: Any) -> None:
    """On one rank alone, or while an engine is open."""
    model = tiny("bert", hidden_act="gelu")
    for layer in model.encoder.layer:
        if activation != "gelu":
            del layer.intermediate.intermediate_act_fn
            layer.intermediate.intermediate_act_fn = activation
    assert adapt(model).other_numbers() == ""
    with Engine(model) as engine:
        engine(**inputs_for("bert"))
        swap(model.encoder.layer[1])
        with pytest.raises(ModelChanged, match=r"layer\.1\.intermediate\..*act.* has changed"):
            engine(**inputs_for("bert"))
    assert adapt(model).other_numbers().startswith("encoder.layer.1.intermediate.")
