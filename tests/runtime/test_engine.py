"""N ranks over real sockets against the single device and against the simulation."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from astra_kernels import _direct as direct
from astra_runtime import AstraError, Codebook, Engine, HandshakeRefused, WireError
from astra_runtime.evaluate import run_ranks
from astra_runtime.plan import Plan
from astra_runtime.transport import Mesh
from astra_runtime.wire import HEADER_SIZE

from .models import KINDS, SPACES, fitted, inputs_for, options_for, tiny
from .outputs import logits_of, ranks_output, rounding
from .simulation import Simulation


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [
        *((kind, ranks) for kind in ("llama", "bert") for ranks in (1, 2, 3, 4, 5, 7)),
        *((kind, ranks) for kind in KINDS if kind not in ("llama", "bert") for ranks in (1, 3, 7)),
    ],
)
def test_dense_exchange_equals_the_single_device(kind: str, world_size: int) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 23, batch=2)
    single, tolerance = rounding(model, inputs)
    outputs = ranks_output(model, Codebook.none(), inputs, world_size, logits="all")
    for output in outputs:
        assert output.shape == single.shape
        assert float((output - single).abs().max()) <= tolerance


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit"])
def test_weighted_shards_equal_the_single_device(kind: str) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 23)
    single, tolerance = rounding(model, inputs)
    outputs = ranks_output(model, None, inputs, 3, logits="all", weights=[5, 1, 3])
    assert float((outputs[0] - single).abs().max()) <= tolerance


# A ViT has no token ids: differential codes are refused, see test_differential.py.
SIMULATED = [
    (kind, name, (1, 1, 1))
    for kind in ("llama", "gpt2", "vit", "bert")
    for name in SPACES
    if not (kind == "vit" and name.startswith("differential"))
] + [
    (kind, name, (3, 1))
    for kind in ("llama", "bert")
    for name in ("kv-per-head", "hidden-4", "differential-4")
]


@pytest.mark.parametrize(("kind", "name", "weights"), SIMULATED)
def test_codes_equal_the_simulation(
    kind: str, name: str, weights: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    world_size = len(weights)
    model, inputs = tiny(kind), inputs_for(kind, 23, batch=2)
    book = fitted(kind, model, **options_for(kind, name))
    sent: list[Tensor] = []
    encode = direct.encode
    monkeypatch.setattr(direct, "encode", lambda *a: sent.append(encode(*a)) or sent[-1])
    outputs = ranks_output(model, book, inputs, world_size, logits="all", weights=weights)
    monkeypatch.undo()
    tokens = 25 if kind == "vit" else 22 if kind == "bert" else 23
    causal = kind in ("llama", "gpt2")
    plan = Plan.make(tokens, world_size, causal=causal, copies=0 if causal else 1, weights=weights)
    simulation = Simulation(model, book, plan, inputs)
    expected = logits_of(simulation.run())
    for output in outputs:
        torch.testing.assert_close(output, expected, rtol=2e-4, atol=2e-4)
    copies = torch.tensor(simulation.is_copy)
    made = {tuple(codes.flatten().tolist()) for codes in sent}
    assert sorted(simulation.codes) == ([1, 2] if name.startswith("differential") else [0, 1, 2])
    for block in simulation.codes:
        codes = simulation.codes[block][:, ~copies]
        for rank in range(world_size):
            if plan.receivers(rank):
                own = slice(plan.bounds[rank], plan.bounds[rank + 1])
                assert tuple(codes[:, own].flatten().tolist()) in made


def test_codes_differ_from_exact_and_from_dropped() -> None:
    """The simulation test would pass if nothing were coded at all; this one would not."""
    model, inputs = tiny("llama"), inputs_for("llama")
    book = fitted("llama", model, space="kv", groups=3)
    exact, coded, dropped = (
        ranks_output(model, b, inputs, 2)[0] for b in (Codebook.none(), book, Codebook.drop())
    )
    assert float((exact - coded).abs().max()) > 1e-3
    assert float((exact - dropped).abs().max()) > 1e-3
    assert float((coded - dropped).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_padding_is_never_seen(kind: str) -> None:
    model = tiny(kind)
    inputs = inputs_for(kind, 23, batch=2)
    mask = torch.ones_like(inputs["input_ids"])
    if kind == "bert":
        mask[1, 15:] = 0  # encoders pad on the right
    else:
        mask[1, :9] = 0
    books = [fitted(kind, model, space=s, groups=6) for s in ("kv", "differential")]
    seen = mask.bool()
    for codebook in (Codebook.none(), *books):
        outputs = []
        for filler in (3, 50):
            ids = inputs["input_ids"].clone()
            ids[~seen] = filler
            given = {"input_ids": ids, "attention_mask": mask}
            outputs.append(ranks_output(model, codebook, given, 3, logits="all")[0][seen])
        torch.testing.assert_close(outputs[0], outputs[1])
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if kind == "gpt2" else {}
    with torch.inference_mode():
        single = logits_of(model(**inputs, attention_mask=mask, **positions))
    dense = ranks_output(model, None, {**inputs, "attention_mask": mask}, 3, logits="all")[0]
    torch.testing.assert_close(dense[seen], single[seen], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit"])
def test_last_and_local_logits_are_parts_of_all(kind: str) -> None:
    model, inputs = tiny(kind), inputs_for(kind)
    whole = ranks_output(model, None, inputs, 3, logits="all")[0]
    last = ranks_output(model, None, inputs, 3)
    local = ranks_output(model, None, inputs, 3, logits="local")
    if kind == "vit":
        torch.testing.assert_close(last[2], whole)
        return
    torch.testing.assert_close(last[0], whole[:, -1:])
    torch.testing.assert_close(torch.cat(local, 1), whole)


def test_one_rank_alone_can_have_the_output() -> None:
    model, inputs = tiny("llama"), inputs_for("llama")

    def work(mesh: Mesh) -> Any:
        with Engine(model, None, mesh) as engine:
            return engine(**inputs, outputs="one")

    outputs = run_ranks(3, work)
    assert outputs[0] is None
    assert outputs[1] is None
    torch.testing.assert_close(outputs[2].logits, model(**inputs).logits[:, -1:].detach())


@pytest.mark.parametrize("world_size", [5, 8])
def test_class_tokens_of_many_ranks_are_added_up_on_their_way(world_size: int) -> None:
    model, inputs = tiny("vit"), inputs_for("vit", batch=2)
    single, tolerance = rounding(model, inputs)

    def work(mesh: Mesh) -> tuple[Tensor, int]:
        with Engine(model, None, mesh) as engine:
            everywhere = engine(**inputs).logits
        with Engine(model, Codebook.local_only(), mesh) as engine:
            before = mesh.stats
            engine(**inputs, outputs="one")
            received = (mesh.stats - before).messages_received
        return everywhere, received

    outputs, received = zip(*run_ranks(world_size, work), strict=True)
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert float((outputs[0] - single).abs().max()) <= tolerance
    pictures = world_size - 1
    sums = [  # of 1, 2 and up to 4 class tokens
        [rank + step for step in (1, 2, 4) if rank % (2 * step) == 0 and rank + step < world_size]
        for rank in range(world_size)
    ]
    assert received == tuple(pictures + len(senders) for senders in sums)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("padded", [False, True])
def test_dense_generation_equals_the_models_own(kind: str, padded: bool) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 17, batch=2)
    mask = torch.ones_like(inputs["input_ids"])
    if padded:
        mask[1, :5] = 0
    expected = model.generate(
        **inputs, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0
    )

    def work(mesh: Mesh) -> Tensor:
        heard: list[Tensor] = []
        with Engine(model, None, mesh) as engine:
            ids = engine.generate(
                inputs["input_ids"], attention_mask=mask, max_new_tokens=9, on_token=heard.append
            )
        assert torch.equal(torch.stack(heard, 1), ids[:, 17:])
        return ids

    for ids in run_ranks(3, work):
        assert torch.equal(ids, expected)


@pytest.mark.parametrize("space", ["kv", "differential"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_generation_from_codes_equals_repeated_prefill(kind: str, space: str) -> None:
    """The cache of codes says what a fresh pass says, while the prompt's shards stay the same."""
    model, inputs = tiny(kind), inputs_for(kind, 18)
    book = fitted(kind, model, space=space, groups=6)

    def work(mesh: Mesh) -> tuple[Tensor, Tensor]:
        with Engine(model, book, mesh, weights=(6, 6, 6)) as engine:
            ids = engine.generate(inputs["input_ids"], max_new_tokens=4)
        with Engine(model, book, mesh, weights=(6, 6, 9)) as engine:  # 21 tokens: 6, 6 and 9
            again = engine(input_ids=ids[:, :-1]).logits[:, -1].argmax(-1)
        return ids, again

    ids, again = run_ranks(3, work)[0]
    assert torch.equal(ids[:, -1], again)


def test_ranks_must_agree_on_what_to_generate() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 12)

    def work(mesh: Mesh) -> None:
        with Engine(model, None, mesh) as engine:
            if mesh.rank:
                with pytest.raises(WireError, match="runs another plan"):
                    engine.generate(inputs["input_ids"], max_new_tokens=3)
            else:
                with contextlib.suppress(AstraError):
                    engine.generate(inputs["input_ids"], max_new_tokens=4)

    run_ranks(2, work)


def test_a_choice_of_ones_own_reaches_every_rank() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 12, batch=2)

    def second(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.topk(2).indices[:, 1:].int()  # [B, 1] and int32: neither matters

    def work(mesh: Mesh) -> Tensor:
        with Engine(model, None, mesh) as engine:
            return engine.generate(inputs["input_ids"], max_new_tokens=2, choose=second)

    first, other = run_ranks(2, work)
    assert torch.equal(first, other)
    with torch.inference_mode():
        scores = model(**inputs).logits[:, -1]
    assert torch.equal(first[:, 12], scores.topk(2).indices[:, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_half_precision_run(dtype: torch.dtype) -> None:
    model, inputs = tiny("llama").to(dtype), inputs_for("llama", batch=2)
    with torch.inference_mode():
        single = model(**inputs).logits
        error = float((tiny("llama")(**inputs).logits - single).abs().max())
    dense = ranks_output(model, None, inputs, 3, logits="all")[0]
    assert dense.dtype == dtype
    assert float((dense - single).abs().max()) <= 2 * error
    for space in ("kv", "differential"):
        book = fitted("llama", model, space=space, groups=3)
        assert ranks_output(model, book, inputs, 2)[0].isfinite().all()


def test_one_token_a_rank() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 5)
    single, tolerance = rounding(model, inputs)
    output = ranks_output(model, None, inputs, 5, logits="all")[0]
    assert float((output - single).abs().max()) <= tolerance


def test_one_engine_takes_inputs_of_any_shape() -> None:
    model = tiny("gpt2")
    shapes = [(23, 1), (9, 3), (40, 2), (23, 1)]

    def work(mesh: Mesh) -> list[Tensor]:
        with Engine(model, None, mesh) as engine:
            return [engine(**inputs_for("gpt2", t, b), logits="all").logits for t, b in shapes]

    for output, (tokens, batch) in zip(run_ranks(2, work)[1], shapes, strict=True):
        single, tolerance = rounding(model, inputs_for("gpt2", tokens, batch))
        assert float((output - single).abs().max()) <= tolerance


def test_generation_ends_at_the_end_token() -> None:
    model, inputs = tiny("gpt2"), inputs_for("gpt2", 12)
    free = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    end = int(free[0, 14])
    first = int((free[0, 12:] == end).nonzero()[0]) + 1

    def work(mesh: Mesh) -> Tensor:
        with Engine(model, None, mesh) as engine:
            return engine.generate(inputs["input_ids"], max_new_tokens=8, eos_token_id=end)

    for ids in run_ranks(2, work):
        assert torch.equal(ids, free[:, : 12 + first])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_dense_exchange_in_fewer_bits_is_close(dtype: str) -> None:
    model, inputs = tiny("llama"), inputs_for("llama")
    exact = ranks_output(model, None, inputs, 2)[0]
    near = ranks_output(model, Codebook.none(dtype), inputs, 2)[0]
    dropped = ranks_output(model, Codebook.drop(), inputs, 2)[0]
    assert 0 < float((near - exact).norm()) < 0.1 * float((dropped - exact).norm())


@pytest.mark.parametrize(
    ("book", "bits"),
    [
        (Codebook.none(), 2 * 3 * 16 * 32),
        (Codebook.none("float16"), 2 * 3 * 16 * 16),
        (Codebook.none("int8"), 2 * 3 * (16 * 8 + 16)),
        (Codebook.drop(), 0),
        ("kv", 15),
        ("differential", 10),  # 15 in two of the three blocks
    ],
)
def test_bits_are_what_crosses_the_sockets(book: Any, bits: float) -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 32)
    if isinstance(book, str):
        book = fitted("llama", model, space=book, groups=3)
        assert book.bits == bits

    def work(mesh: Mesh) -> tuple[float, int, int]:
        with Engine(model, book, mesh, weights=(1, 1), halo=0) as engine:
            before = mesh.stats
            engine(**inputs, logits="local")
            sent = mesh.stats - before
            return engine.bits_per_token_block, sent.bytes_sent_payload, sent.bytes_sent_total

    told, payload, total = run_ranks(2, work)[0]
    assert told == bits
    assert payload == bits * 16 * 3 / 8  # 16 tokens, 3 blocks, one receiver
    assert total - payload <= (HEADER_SIZE * 3 if bits else 0)  # no frame where there are no codes


def test_ranks_that_differ_refuse_each_other() -> None:
    model, other = tiny("llama"), tiny("llama", seed=5)

    def work(mesh: Mesh) -> str:
        with pytest.raises(HandshakeRefused) as refused:
            Engine(model if mesh.rank == 0 else other, None, mesh)
        return str(refused.value)

    for reason in run_ranks(2, work):
        assert "model" in reason

    def books(mesh: Mesh) -> str:
        with pytest.raises(HandshakeRefused) as refused:
            Engine(model, Codebook.none("float32" if mesh.rank else "int8"), mesh)
        return str(refused.value)

    for reason in run_ranks(2, books):
        assert "codebook" in reason

    scaled = tiny("llama")
    scaled.model.layers[1].self_attn.scaling *= 2

    def numbers(mesh: Mesh) -> str:
        with pytest.raises(HandshakeRefused) as refused:
            Engine(scaled if mesh.rank else model, None, mesh)
        return str(refused.value)

    for reason in run_ranks(2, numbers):
        assert "module numbers" in reason
        assert "model.layers.1.self_attn.scaling=0.5" in reason


def test_ranks_with_other_inputs_find_out() -> None:
    model = tiny("llama")

    def work(mesh: Mesh) -> str:
        inputs = inputs_for("llama", seed=mesh.rank)
        with Engine(model, None, mesh) as engine:
            if mesh.rank == 0:  # waits for nobody; its send may find rank 1 gone
                with contextlib.suppress(AstraError):
                    engine(**inputs, logits="local")
                return ""
            with pytest.raises(WireError) as found:
                engine(**inputs, logits="local")
            return str(found.value)

    assert "runs another plan" in run_ranks(2, work)[1]


def test_the_model_works_by_itself_before_between_and_after() -> None:
    model, inputs = tiny("llama"), inputs_for("llama")
    before = model(**inputs).logits
    with Engine(model) as engine:
        torch.testing.assert_close(model(**inputs).logits, before)
        called = engine(**inputs, logits="all").logits
        torch.testing.assert_close(called, before, rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(model(**inputs).logits, before)
    assert model.config._attn_implementation == "sdpa"
    assert not any(block._forward_pre_hooks for block in model.model.layers)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e(input_ids=torch.zeros(1, 4)), "input_ids: expected integers"),
        (lambda e: e(input_ids=torch.zeros(1, 400, dtype=torch.long)), "at most 256 tokens"),
        (lambda e: e(pixel_values=torch.zeros(1, 1, 4, 4)), "expected inputs among"),
        (
            lambda e: e(input_ids=torch.zeros(1, 4, dtype=torch.long), logits="x"),
            "logits: expected",
        ),
        (
            lambda e: e(
                input_ids=torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 5)
            ),
            "attention_mask: expected the shape of input_ids",
        ),
        (
            lambda e: e.generate(torch.zeros(1, 4, dtype=torch.long), max_new_tokens=0),
            "max_new_tokens: expected at least 1",
        ),
        (
            lambda e: e.generate(torch.zeros(1, 250, dtype=torch.long), max_new_tokens=8),
            "max_new_tokens: expected at most 7 after 250 tokens",
        ),
    ],
)
def test_bad_calls_are_refused(call: Any, message: str) -> None:
    with Engine(tiny("llama")) as engine, pytest.raises(ValueError, match=message):
        call(engine)


def test_unsupported_models_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="expected a Hugging Face model of type .*got 'Linear'"):
        Engine(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="sliding-window"):
        Engine(tiny("mistral", sliding_window=8))
    model = tiny("mistral")
    Engine(model).close()
    model.config.sliding_window = 8
    with pytest.raises(ValueError, match="sliding-window"):
        Engine(model)
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="'dynamic' depend"):
        Engine(tiny("llama", rope_parameters=scaling))
