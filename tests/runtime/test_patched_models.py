"""Models that their users have changed: hooks, patches, heads and layers of their own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from astra_runtime import AstraError, Codebook, Engine
from astra_runtime.evaluate import run_ranks
from astra_runtime.models import adapt
from astra_runtime.transport import Mesh, local_mesh

from .models import inputs_for, tiny


def _twice(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (args[0] * 2, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 2}


def _hook_attention(model: Any) -> None:
    for module in adapt(model).attentions:
        module.register_forward_pre_hook(_twice, with_kwargs=True)


def _patch_attention(model: Any) -> None:
    for module in adapt(model).attentions:
        own: Callable[..., Any] = module.forward
        module.forward = lambda hidden_states, *args, own=own, **kwargs: own(
            hidden_states * 2, *args, **kwargs
        )


def _hook_block(model: Any) -> None:
    adapt(model).blocks[0].register_forward_pre_hook(_twice, with_kwargs=True)


@pytest.mark.parametrize(
    ("kind", "space", "change", "words"),
    [
        ("llama", "hidden", _hook_attention, "attention of block 0 "),
        ("gpt2", "hidden", _patch_attention, "attention of block 0 "),
        ("bert", "differential", _hook_attention, "attention of block 0 "),
        ("llama", "differential", _hook_block, "input of block 0 "),
    ],
)
def test_keys_that_other_ranks_would_compute_otherwise(
    kind: str, space: str, change: Callable[[Any], None], words: str
) -> None:
    """Codes of block inputs are projected by whoever receives them: a hook in front of the
    attention was left out there, without a word. Key/value codes need none of it."""
    model, inputs = tiny(kind), inputs_for(kind, 24)
    change(model)
    count = 23 if kind == "bert" else 24  # lossless
    options: dict[str, Any] = {"groups": 1, "codewords": count, "held_back": 0}
    books = [
        Codebook.fit(model, inputs["input_ids"], space=name, **options) for name in (space, "kv")
    ]

    def work(mesh: Mesh) -> Tensor:
        with (
            Engine(model, books[0], mesh, halo=0) as engine,
            pytest.raises(AstraError, match=words),
        ):
            engine(**inputs, logits="all")
        with Engine(model, books[1], mesh, halo=0) as engine:
            answer: Tensor = engine(**inputs, logits="all")[0]
            return answer

    with torch.no_grad():
        want = model(**inputs)[0]
    for got in run_ranks(2, work, timeout=20):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


def test_a_hook_on_the_attention_that_comes_later() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 24)
    book = Codebook.fit(
        model, inputs["input_ids"], space="hidden", groups=2, codewords=24, held_back=0
    )
    with Engine(model, book) as engine:
        engine(**inputs)
        _hook_attention(model)
        with pytest.raises(AstraError, match=r"layers\.0\.self_attn computes"):
            engine(**inputs)


class Switched(nn.Module):
    """An adapter of a projection, which can be switched off."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.on = base, True

    def forward(self, hidden: Tensor) -> Tensor:
        given: Tensor = self.base(hidden)
        return given * 2 if self.on else given


def test_an_adapter_that_is_switched_off_while_an_engine_is_open() -> None:
    """Tables made with it would be mixed with keys made without it."""
    model, inputs = tiny("llama"), inputs_for("llama", 24)
    adapter = model.model.layers[1].self_attn.k_proj = Switched(
        model.model.layers[1].self_attn.k_proj
    )
    ids = inputs["input_ids"]
    book = Codebook.fit(model, ids, space="hidden", groups=1, codewords=16, held_back=0)
    with Engine(model, book) as engine:
        engine(**inputs)
        adapter.on = False
        with pytest.raises(AstraError, match=r"layers\.1\.self_attn\.k_proj computes"):
            engine(**inputs)
        adapter.on = True
        engine(**inputs)


class Mixing(nn.Module):
    """A head that reads all tokens."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        mixed: Tensor = self.head(hidden + hidden.mean(1, keepdim=True))
        return mixed


class Adapted(Mixing):
    """One that reads each by itself, as adapters do."""

    def forward(self, hidden: Tensor) -> Tensor:
        adapted: Tensor = self.head(hidden) + self.head(hidden.tanh())
        return adapted


def test_heads_that_read_tokens_together_are_refused() -> None:
    model = tiny("llama")
    own = model.lm_head
    for change in (lambda: None, lambda: setattr(model, "lm_head", Adapted(own))):
        change()
        Engine(model).close()
    model.lm_head = Mixing(own)
    with pytest.raises(ValueError, match="lm_head"):
        Engine(model)
    model.lm_head = own
    handle = own.register_forward_hook(lambda _, x, out: out - out.mean(1, keepdim=True))
    with pytest.raises(ValueError, match="lm_head"):
        Engine(model)
    handle.remove()
    Engine(model).close()


@pytest.mark.parametrize("where", ["the model", "its base"])
def test_a_forward_that_was_set_on_the_model_is_refused(where: str) -> None:
    """It would see a shard's hidden states for the sequence's."""
    model = tiny("llama")
    patched = model if where == "the model" else model.model
    with Engine(model) as engine:
        own = patched.forward
        patched.forward = lambda *args, **kwargs: own(*args, **kwargs)
        for call in (lambda: Engine(model), lambda: engine(**inputs_for("llama"))):
            with pytest.raises(ValueError, match="forward of Llama"):
                call()
        del patched.forward
        engine(**inputs_for("llama"))


def test_blocks_that_cannot_be_cut_are_refused() -> None:
    shared = tiny("llama")
    shared.model.layers[2] = shared.model.layers[0]
    with pytest.raises(ValueError, match="several share"):
        Engine(shared)
    cut = tiny("llama")
    cut.model.layers[1] = nn.Identity()
    with pytest.raises(ValueError, match="blocks of transformers' llama with their attention"):
        Engine(cut)
    gone = tiny("llama")
    Engine(gone).close()
    del gone.model.layers
    with pytest.raises(ValueError, match="with their attention, got others: .*layers"):
        Engine(gone)
    with pytest.raises(ValueError, match="chunk_size_feed_forward=0"):
        Engine(tiny("bert", chunk_size_feed_forward=4))
    with pytest.raises(ValueError, match="at least one Transformer block, got none"):
        Engine(tiny("llama", num_hidden_layers=0))


def test_blocks_that_the_configuration_leaves_out_run_nowhere() -> None:
    model, inputs = tiny("llama"), inputs_for("llama")
    Engine(model).close()
    model.config.num_hidden_layers = 2
    with Engine(model) as engine, torch.no_grad():
        got, want = engine(**inputs, logits="all").logits, model(**inputs).logits
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
        model.config.num_hidden_layers = 3
        with pytest.raises(AstraError, match="num_hidden_layers of the model's configuration"):
            engine(**inputs)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_configuration_that_asks_for_tuples(kind: str) -> None:
    """A head of transformers' own does not find the hidden states in them."""
    model, inputs = tiny(kind), inputs_for(kind)
    base = getattr(model, model.base_model_prefix, model)
    with torch.no_grad():
        want = base(**inputs)[0]
    model.config.return_dict = False
    if base is not model:
        with pytest.raises(ValueError, match="expected return_dict=True in its configuration"):
            Engine(model)
    with Engine(base) as engine:
        got = engine(**inputs, logits="all").last_hidden_state
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_norm_of_the_users_own_is_not_folded() -> None:
    """It may be named like transformers' and compute something else."""

    class OneMoreRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(48)), 1e-6

    for norm in (OneMoreRMSNorm(), nn.RMSNorm(48)):
        model = tiny("llama")
        assert adapt(model).projection(0) is not None
        model.model.layers[0].input_layernorm = norm
        assert adapt(model).projection(0) is None


def test_an_engine_closes_a_mesh_of_its_own_alone() -> None:
    """Its descriptors stayed until the collector came, which a host may have switched off."""
    model, given = tiny("llama"), local_mesh(1)[0]
    for mesh in (None, given):
        engine = Engine(model, mesh=mesh)
        engine.close()
        assert (engine.mesh.ended is None) == (mesh is given)
    given.close()


@pytest.mark.parametrize("what", ["engine", "mesh", "session"])
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_engines_and_meshes_are_not_copied(what: str, way: Callable[[Any], Any]) -> None:
    """What had been copied of a mesh before its sockets closed the mesh's own descriptors."""
    meshes = local_mesh(2)
    engine = Engine(tiny("llama"))
    with pytest.raises(TypeError, match=f"{what} .*copied"):
        way({"engine": engine, "mesh": meshes[0], "session": engine.session()}[what])
    for mesh in meshes:
        mesh.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"codebook": "folder"}, "codebook: expected Codebook"),
        ({"mesh": "mesh"}, "mesh: expected Mesh"),
        ({"halo": 2.5}, "halo: expected an integer"),
        ({"weights": "1"}, "weights: expected numbers"),
        ({"deadline_ms": "5"}, "deadline_ms: expected milliseconds"),
        ({"checkpoint": 5}, "checkpoint: expected str"),
    ],
    ids=str,
)
def test_arguments_of_other_types(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        Engine(tiny("llama"), **options)
    with pytest.raises(ValueError, match="weights: expected 1 positive numbers"):
        Engine(tiny("llama"), weights=[1, 1])
    with pytest.raises(TypeError, match="model: expected"):
        Engine(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="agree: expected"):
        local_mesh(1)[0].agree({"step": 1})  # type: ignore[dict-item]


def _write_to_the_last(module: nn.Module, args: Any, output: Any) -> None:
    """As vectors that steer a model are added to the last token."""
    hidden = output[0] if isinstance(output, tuple) else output
    hidden[:, -1] += 1.0


def _add_mean(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + output.mean(1, keepdim=True)


def _center(module: nn.Module, args: Any, output: Any) -> Any:
    output.logits = output.logits - output.logits.mean(1, keepdim=True)
    return output


class Shifted(nn.Module):
    """A layer that mixes each token with the one before."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.layer(hidden)
        return out + out.roll(1, 1)


def _shift(model: Any) -> None:
    layer = model.encoder.layer[1].intermediate
    layer.dense = Shifted(layer.dense)


def _patch_mlp(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda hidden: own(hidden) * hidden.norm(dim=1, keepdim=True)


_MIXING: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a block": ("llama", lambda m: m.model.layers[1].register_forward_hook(_write_to_the_last)),
    "the base": ("qwen2", lambda m: m.model.norm.register_forward_hook(_add_mean)),
    "a hook on an MLP": ("gpt2", lambda m: m.transformer.h[0].mlp.register_forward_hook(_add_mean)),
    "a patched MLP": ("llama", _patch_mlp),
    "a layer": ("bert", _shift),
    "the model": ("llama", lambda m: m.register_forward_hook(_center)),
    "a block of a ViT": ("vit", lambda m: adapt(m).blocks[2].register_forward_hook(_add_mean)),
}


@pytest.mark.parametrize("where", _MIXING)
def test_what_reads_tokens_together_is_an_error(where: str) -> None:
    """Each rank did it to its own part of the sequence, without a word. The mesh stays."""
    kind, change = _MIXING[where]
    model, other, inputs = tiny(kind), tiny(kind, seed=1), inputs_for(kind, 70)
    change(model)

    def work(mesh: Mesh) -> None:
        with Engine(model, None, mesh) as engine:
            for _ in range(2):
                with pytest.raises(AstraError, match="depends on other tokens"):
                    engine(**inputs)
        with Engine(other, None, mesh) as engine:
            engine(**inputs)

    run_ranks(2, work, timeout=20)
    with Engine(model) as alone, torch.no_grad():
        torch.testing.assert_close(
            alone(**inputs, logits="all")[0], model(**inputs)[0], atol=1e-3, rtol=1e-3
        )


def test_ids_that_a_hook_on_the_model_moves_are_an_error() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 70)

    def shift(module: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        return args, given | {"input_ids": given["input_ids"].roll(1, 1)}

    def swap(module: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        return args, given | {"input_ids": 96 - given["input_ids"]}

    def work(mesh: Mesh) -> Any:
        with Engine(model, None, mesh) as engine:
            return engine(**inputs, logits="all").logits

    handle = model.register_forward_pre_hook(shift, with_kwargs=True)
    with pytest.raises(AstraError, match="depends on other tokens"):
        run_ranks(2, work, timeout=20)
    handle.remove()
    model.register_forward_pre_hook(swap, with_kwargs=True)
    with torch.no_grad():
        want = model(**inputs).logits
    torch.testing.assert_close(run_ranks(2, work, timeout=20)[0], want, atol=1e-3, rtol=1e-3)


def test_hooks_that_torch_calls_for_every_module_are_looked_at() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 70)
    mlps = {block.mlp for block in adapt(model).blocks}

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return _add_mean(module, args, output) if module in mlps else None

    def work(mesh: Mesh) -> None:
        with Engine(model, None, mesh) as engine:
            engine(**inputs)

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        with pytest.raises(AstraError, match="depends on other tokens"):
            run_ranks(2, work, timeout=20)
    finally:
        handle.remove()
    run_ranks(2, work, timeout=20)


@pytest.mark.parametrize("when", ["before", "open"])
def test_a_forward_that_was_set_on_a_class(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As libraries patch all models of a family: what reads each token by itself is welcome."""
    model, inputs = tiny("llama"), inputs_for("llama", 70)
    kind = type(model.model.layers[0].mlp)
    own = kind.forward

    def mixed(self: Any, hidden: Tensor) -> Tensor:
        out: Tensor = own(self, hidden)
        return out + out.mean(1, keepdim=True)

    def doubled(self: Any, hidden: Tensor) -> Tensor:
        out: Tensor = own(self, hidden)
        return 2 * out

    def work(mesh: Mesh) -> Any:
        if when == "before" and mesh.rank == 0:
            monkeypatch.setattr(kind, "forward", patch)
        mesh.agree({"at": "begin"})
        with Engine(model, None, mesh) as engine:
            engine(**inputs)
            mesh.agree({"at": "open"})
            if mesh.rank == 0:
                monkeypatch.setattr(kind, "forward", patch)
            mesh.agree({"at": "patched"})
            return engine(**inputs, logits="all").logits

    patch: Any = mixed
    with pytest.raises(AstraError, match="depends on other tokens"):
        run_ranks(2, work, timeout=20)
    monkeypatch.setattr(kind, "forward", own)
    patch = doubled
    got = run_ranks(2, work, timeout=20)[0]
    with torch.no_grad():
        torch.testing.assert_close(got, model(**inputs).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("where", ["the model", "its base"])
def test_a_head_or_base_whose_class_was_patched_is_refused(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    kind: Any = type(model if where == "the model" else model.model)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **given: own(self, *args, **given))
    with pytest.raises(ValueError, match="forward of transformers' own in .*got that of .*lambda"):
        Engine(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit", "bert"])
def test_hooks_that_treat_each_token_by_itself_are_welcome(kind: str) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 70)
    blocks, seen = adapt(model).blocks, []
    handle = blocks[1].register_forward_hook(lambda *_: seen.append(True))

    def work(mesh: Mesh) -> Tensor:
        with Engine(model, None, mesh) as engine:
            answer: Tensor = engine(**inputs, logits="all")[0]
            return answer

    run_ranks(2, work, timeout=20)
    assert len(seen) == 2  # once a rank
    handle.remove()
    blocks[1].register_forward_hook(lambda _, x, out: out + 0.5)
    blocks[0].register_forward_pre_hook(_twice, with_kwargs=True)
    with torch.no_grad():
        want = model(**inputs)[0]
    for got in run_ranks(2, work, timeout=20):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    for block in blocks:
        for hook in (*block._forward_hooks.values(), *block._forward_pre_hooks.values()):
            assert hook is _twice or type(hook).__name__ == "function"
