"""The differentiable simulation against the engine's ranks, and against the plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from astra_runtime import Codebook
from astra_runtime.codes.differential import SimulatedDifferential
from astra_runtime.codes.layouts import merge_groups, split_groups
from astra_runtime.codes.rotary import rotate
from astra_runtime.models import adapt
from astra_runtime.plan import Plan
from astra_runtime.train.simulate import Layout, Simulation, quantizers
from bench.finetune import OneMask, make_mask

from ..models import fitted, inputs_for, options_for, tiny
from ..outputs import logits_of, ranks_output, rounding

FAMILIES = ("llama", "gpt2", "bert", "vit")
CODES = ("kv-per-head", "kv-one-code", "hidden-1", "hidden-4")


def plan_for(model: Any, inputs: dict[str, Tensor], weights: tuple[int, ...]) -> Plan:
    adapter = adapt(model)
    return Plan.make(
        adapter.count(inputs)[1],
        len(weights),
        causal=adapter.causal,
        copies=adapter.class_tokens,
        weights=weights,
    )


@torch.no_grad()
def simulated(
    model: Any, book: Codebook, inputs: dict[str, Tensor], weights: tuple[int, ...], **options: Any
) -> Tensor:
    plan = plan_for(model, inputs, weights)
    return logits_of(Simulation(model, book, plan, inputs, **options).run())


@pytest.mark.parametrize(
    ("kind", "name", "weights"),
    [
        *((kind, name, (5, 1, 3)) for kind in FAMILIES for name in CODES),
        *((kind, CODES[0], (1, 1)) for kind in FAMILIES),
    ],
)
def test_it_equals_the_engine(kind: str, name: str, weights: tuple[int, ...]) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 23, batch=2)
    book = fitted(kind, model, **options_for(kind, name))
    found = simulated(model, book, inputs, weights)
    for output in ranks_output(model, book, inputs, len(weights), logits="all", weights=weights):
        torch.testing.assert_close(found, output, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_differential_codes_equal_the_engine(kind: str) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 23, batch=2)
    book = fitted(kind, model, space="differential", groups=4)
    found = simulated(model, book, inputs, (5, 1, 3))
    for output in ranks_output(model, book, inputs, 3, logits="all", weights=(5, 1, 3)):
        torch.testing.assert_close(found, output, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_dropped_tokens_equal_the_engine(kind: str) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 23)
    found = simulated(model, Codebook.drop(), inputs, (2, 1))
    output = ranks_output(model, Codebook.drop(), inputs, 2, logits="all", weights=(2, 1))[0]
    torch.testing.assert_close(found, output, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_dense_tensors_of_few_bits_equal_the_engine(kind: str, dtype: str) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 23)
    book = Codebook.none(dtype)
    found = simulated(model, book, inputs, (2, 1))
    output = ranks_output(model, book, inputs, 2, logits="all", weights=(2, 1))[0]
    torch.testing.assert_close(found, output, rtol=2e-4, atol=2e-4)
    assert not torch.equal(found, simulated(model, Codebook.none(), inputs, (2, 1)))


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_exact_exchange_equals_the_plain_model(kind: str, single: bool) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 23, batch=2)
    plain, tolerance = rounding(model, inputs)
    found = simulated(model, Codebook.none(), inputs, (5, 1, 3), single_class_token=single)
    assert found.shape == plain.shape
    assert float((found - plain).abs().max()) <= tolerance


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_padding_is_as_the_engine_has_it(kind: str) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 23, batch=2)
    mask = torch.ones_like(inputs["input_ids"])
    if kind == "bert":
        mask[1, 15:] = 0  # encoders pad on the right
    else:
        mask[1, :9] = 0
    inputs["attention_mask"] = mask
    book = fitted(kind, model, space="kv", groups=6)
    found = simulated(model, book, inputs, (1, 1, 1))
    output = ranks_output(model, book, inputs, 3, logits="all", weights=(1, 1, 1))[0]
    assert bool(found.isfinite().all())
    seen = mask.bool()
    torch.testing.assert_close(found[seen], output[seen], rtol=2e-4, atol=2e-4)


def test_who_sees_a_class_token() -> None:
    plan = Plan((0, 2, 5), causal=False, copies=1)
    shared = Layout.make(plan, torch.device("cpu"))
    assert shared.token.tolist() == [0, 1, 2, 0, 3, 4, 5]
    assert shared.sent.tolist() == [False, True, True, False, True, True, True]
    seen = make_mask(shared, plan, None)[0, 0].int().tolist()
    assert seen[0] == [1, 1, 1, 0, 0, 0, 0] + [0, 0, 1, 1, 1]
    assert seen[3] == [0, 0, 0, 1, 1, 1, 1] + [1, 1, 0, 0, 0]
    single = Layout.make(plan, torch.device("cpu"), single_class_token=True)
    assert single.token.tolist() == [0, 1, 2, 3, 4, 5]
    seen = make_mask(single, plan, None)[0, 0].int().tolist()
    assert seen[4] == [0, 0, 0, 1, 1, 1] + [1, 1, 1, 0, 0, 0]


def gradients(
    kind: type, model: Any, book: Codebook, plan: Plan, inputs: Any, **options: Any
) -> Any:
    """Of a loss to every weight, and the output; a third of the noise is there."""
    layers = quantizers(book, "cpu", noise=0.3, commitment=0.1).double()
    run = kind(model, book, plan, inputs, layers, **options)
    output = logits_of(run.run())
    model.zero_grad()
    seen = run.adapter.visible(inputs)
    read = output if seen is None else output[seen]
    (read.square().mean() + run.commitment).backward()
    return read.detach(), {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


@pytest.mark.parametrize(
    ("kind", "space", "changes"),
    [
        ("llama", "kv", {}),
        ("llama", "kv", {"halo": 3, "copies": 2}),
        ("llama", "hidden", {"padded": True}),
        ("gpt2", "differential", {"missed": ((2, 0, 1),)}),
        ("gpt2", "kv", {"padded": True, "missed": ((1, 0, 0), (2, 1, 2))}),
        ("vit", "kv", {}),
        ("vit", "hidden", {"single_class_token": True}),
        ("vit", "kv", {"missed": ((0, 1, 1), (0, 2, 1))}),
        ("bert", "kv", {"padded": True}),
    ],
)
def test_gradients_are_those_of_one_masked_softmax(
    kind: str, space: str, changes: dict[str, Any]
) -> None:
    model, inputs = tiny(kind).double(), inputs_for(kind, 23, batch=2)
    if kind == "vit":
        inputs["pixel_values"] = inputs["pixel_values"].double()
    options = dict(changes)
    if options.pop("padded", False):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        hidden = slice(15, None) if kind == "bert" else slice(9)
        inputs["attention_mask"][1, hidden] = 0
    book = fitted(kind, tiny(kind), space=space, groups=6)
    plan = plan_for(model, inputs, (5, 1, 3))
    copies = options.pop("copies", 0)
    if copies:
        plan = Plan.make(23 - copies, 3, causal=True, copies=copies, halo=options.pop("halo"))
    found, grads = gradients(Simulation, model, book, plan, inputs, **options)
    wanted, of_one_mask = gradients(OneMask, model, book, plan, inputs, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert grads.keys() == of_one_mask.keys()
    for name, grad in of_one_mask.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_single_and_distributed_class_tokens_differ(kind: str) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 23)
    book = fitted(kind, model, space="kv", groups=6)
    pair = [
        simulated(model, book, inputs, (1, 1, 1), single_class_token=single)
        for single in (False, True)
    ]
    assert pair[0].shape == pair[1].shape
    assert float((pair[0] - pair[1]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("kind", "space"),
    [(kind, space) for kind in FAMILIES for space in ("kv", "hidden")]
    + [(kind, "differential") for kind in FAMILIES if kind != "vit"],  # images have no token ids
)
def test_gradients_reach_every_weight(kind: str, space: str) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 23)
    book = fitted(kind, model, space=space, groups=6)
    layers = quantizers(book, "cpu", noise=0.5, commitment=0.1)
    run = Simulation(model, book, plan_for(model, inputs, (1, 1, 1)), inputs, layers)
    loss = logits_of(run.run()).square().mean() + run.commitment
    assert float(run.commitment.detach()) > 0
    loss.backward()  # type: ignore[no-untyped-call]
    for name, weight in model.named_parameters():
        if "pooler" not in name and "token_type" not in name and "query.bias" not in name:
            assert weight.grad is not None, name
            assert bool(weight.grad.isfinite().all()), name
    first = adapt(model).blocks[0]
    assert all(float(w.grad.abs().max()) > 0 for w in first.parameters() if w.dim() == 2)  # type: ignore[union-attr]


def test_remote_tokens_carry_gradient_to_their_keys() -> None:
    """Only the second shard's output is read, yet the first shard's tokens feel it: the codes are
    straight-through."""
    model, inputs = tiny("llama"), inputs_for("llama", 24)
    book = fitted("llama", model, space="kv", groups=3)
    plan = plan_for(model, inputs, (1, 1))
    for codebook, felt in ((book, True), (Codebook.drop(), False)):
        embedded = model.model.embed_tokens(inputs["input_ids"]).detach().requires_grad_()
        run = Simulation(model, codebook, plan, inputs)
        del run.kwargs["input_ids"]
        run.kwargs["inputs_embeds"] = embedded
        run.run().logits[:, 12:].square().sum().backward()
        assert (float(embedded.grad[:, :12].abs().max()) > 0) is felt  # type: ignore[index]


@pytest.mark.parametrize(("groups", "shared"), [(3, False), (12, False), (1, True), (4, True)])
def test_merging_is_the_inverse_of_splitting(groups: int, shared: bool) -> None:
    key, value = torch.randn(2, 2, 3, 5, 16).unbind()
    scales = torch.rand(3, 2) + 0.5
    vectors = split_groups(key, value, scales, groups, shared)
    found = merge_groups(vectors, scales, 3, shared)
    torch.testing.assert_close(found[0], key)
    torch.testing.assert_close(found[1], value)


def test_activations_that_are_not_finite_name_their_block() -> None:
    model, inputs = tiny("llama"), inputs_for("llama")
    book = fitted("llama", model, space="kv", groups=3)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="block 1: activations: expected finite values"):
        simulated(model, book, inputs, (1, 1))


@pytest.mark.parametrize("space", ["kv", "hidden"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_it_runs_in_mixed_precision(kind: str, space: str) -> None:
    model, inputs = tiny(kind, initializer_range=0.05), inputs_for(kind, 23)
    book = fitted(kind, model, space=space, groups=6)
    single = simulated(model, book, inputs, (1, 1, 1))
    layers, plan = quantizers(book, "cpu"), plan_for(model, inputs, (1, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = simulated(model, book, inputs, (1, 1, 1))
        run = Simulation(model, book, plan, inputs, layers)
        (logits_of(run.run()).float().square().mean() + run.commitment).backward()  # type: ignore[no-untyped-call]
    assert float((mixed.float() - single).abs().mean()) < 0.2 * float(single.abs().mean())
    assert all(bool(w.grad.isfinite().all()) for w in model.parameters() if w.grad is not None)


def test_a_plan_of_another_length_is_refused() -> None:
    model, inputs = tiny("gpt2"), inputs_for("gpt2", 20)
    plan = Plan.make(19, 2, causal=True)
    with pytest.raises(ValueError, match="plan: expected one of 20 tokens, got 19"):
        Simulation(model, Codebook.drop(), plan, inputs)


SPACES_OF_LOSS = [
    ("kv", {"space": "kv", "groups": 6}),
    ("hidden", {"space": "hidden", "groups": 4}),
    ("differential", {"space": "differential", "groups": 4}),
]
LOSS_IDS = [name for name, _ in SPACES_OF_LOSS]


@pytest.mark.parametrize(("name", "options"), SPACES_OF_LOSS, ids=LOSS_IDS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_nothing_lost_changes_no_bit(kind: str, name: str, options: dict[str, Any]) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 23, batch=2)
    book = fitted(kind, model, **options)
    plain = simulated(model, book, inputs, (5, 1, 3))
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    found = simulated(model, book, inputs, (5, 1, 3), lost=0.0, generator=generator)
    assert torch.equal(found, plain)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(("name", "options"), SPACES_OF_LOSS[:2], ids=LOSS_IDS[:2])
@pytest.mark.parametrize("kind", FAMILIES)
def test_all_lost_is_all_dropped(kind: str, name: str, options: dict[str, Any]) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 23, batch=2)
    book = fitted(kind, model, **options)
    found = simulated(model, book, inputs, (5, 1, 3), lost=1.0, generator=torch.Generator())
    dropped = simulated(model, Codebook.drop(), inputs, (5, 1, 3))
    torch.testing.assert_close(found, dropped, rtol=2e-4, atol=2e-4)


class Deaf(Simulation):
    """Some frames are lost, and it is known which: those into rank `to` of blocks `blocks`."""

    to: int
    blocks: tuple[int, ...]

    def _frames_received(self, block: int) -> Tensor | None:
        if block not in self.blocks:
            return None
        arrived = torch.ones(self.plan.world_size, self.plan.world_size, dtype=torch.bool)
        arrived[self.to] = False
        return arrived


class Estimates(Simulation):
    """The same by hand, for the receiver alone: what it adds up, and what it leaves out."""

    to: int
    blocks: tuple[int, ...]

    def _remote_pairs(
        self, block: int, key: Tensor, value: Tensor, received: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        assert isinstance(self.codec, SimulatedDifferential)
        before = self.codec.estimate
        super()._remote_pairs(block, key, value, received)
        estimate = self.codec.estimate
        assert estimate is not None
        if before is None:
            self.mine = estimate
        elif block not in self.blocks:
            self.mine = self.mine + (estimate - before)
        remote_key, remote_value = self.adapter.project(block, self.mine)
        return [(rotate(remote_key, self.rope), remote_value)]

    def attend(self, block: int, *tensors: Any) -> Tensor:
        self.block = block
        return super().attend(block, *tensors)

    def _attended(self, received: Tensor | None) -> Tensor | None:
        if self.block not in self.blocks:
            return None
        return torch.zeros(self.plan.world_size, self.plan.tokens, dtype=torch.bool)


def run_with(kind: type, model: Any, book: Codebook, inputs: Any, **given: Any) -> Tensor:
    run = kind(model, book, plan_for(model, inputs, (1, 1)), inputs)
    run.__dict__.update(given)
    with torch.no_grad():
        return logits_of(run.run())


@pytest.mark.parametrize("blocks", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_differential_receiver_stays_behind(kind: str, blocks: tuple[int, ...]) -> None:
    """Of two ranks of a decoder only the second hears anything, so one estimate is all."""
    model, inputs = tiny(kind), inputs_for(kind, 24, batch=2)
    book = fitted(kind, model, space="differential", groups=4)
    found = run_with(Deaf, model, book, inputs, to=1, blocks=blocks)
    wanted = run_with(Estimates, model, book, inputs, to=1, blocks=blocks)
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)
    assert float((found - run_with(Simulation, model, book, inputs)).abs().max()) > 1e-2


def test_one_differential_receiver_s_loss_is_its_own() -> None:
    """What rank 1 misses of rank 0, rank 2 still has."""
    model, inputs = tiny("gpt2"), inputs_for("gpt2", 24)
    book = fitted("gpt2", model, space="differential", groups=4)
    run = Deaf(model, book, plan_for(model, inputs, (1, 1, 1)), inputs)
    run.to, run.blocks = 1, (1,)
    with torch.no_grad():
        run.run()
    assert isinstance(run.codec, SimulatedDifferential)
    lacking = run.codec.lacking
    assert lacking is not None
    assert lacking.shape == (3, 1, 24, 48)
    assert float(lacking[1].abs().min(-1).values.max()) > 0
    assert not bool(lacking[::2].any())


@pytest.mark.parametrize(("name", "options"), SPACES_OF_LOSS, ids=LOSS_IDS)
def test_the_right_share_is_lost(name: str, options: dict[str, Any]) -> None:
    model, inputs = tiny("gpt2"), inputs_for("gpt2", 24)
    book = fitted("gpt2", model, **options)
    plan = plan_for(model, inputs, (1,) * 6)
    generator = torch.Generator().manual_seed(5)
    run = Simulation(model, book, plan, inputs, lost=0.05, generator=generator)
    drawn = [run._frames_received(1) for _ in range(2000)]
    arrived = torch.stack([found for found in drawn if found is not None])
    assert arrived.shape == (2000, 6, 6)
    off = (~arrived).float().mean(0) - 0.05  # of each pair, ±4.5 standard deviations
    assert float(off.abs().max()) < 0.022
    assert abs(float(off.mean())) < 0.004
    assert (run._frames_received(0) is None) is (name == "differential")  # sends nothing to lose


def test_losses_depend_on_the_generator_only() -> None:
    model, inputs = tiny("gpt2"), inputs_for("gpt2", 24)
    book = fitted("gpt2", model, space="differential", groups=4)

    def lossy(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return simulated(model, book, inputs, (1, 1, 1), lost=0.5, generator=generator)

    assert torch.equal(lossy(3), lossy(3))
    assert not torch.equal(lossy(3), lossy(4))


def test_losses_that_cannot_be_are_refused() -> None:
    model, inputs = tiny("gpt2"), inputs_for("gpt2", 20)
    plan = Plan.make(20, 2, causal=True)
    with pytest.raises(ValueError, match="lost: expected a share between 0 and 1, got 1.5"):
        Simulation(model, Codebook.drop(), plan, inputs, lost=1.5)
    with pytest.raises(ValueError, match="generator: expected one"):
        Simulation(model, Codebook.drop(), plan, inputs, lost=0.5)
