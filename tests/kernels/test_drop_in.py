"""The drop-in claim: equal to dense attention, in unmodified models, compiled and not."""

from __future__ import annotations

import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests import examples

drop_in = examples.load("drop_in")

LENGTHS = ((11, 5), (14, 9), (20, 12), (33, 7))  # prefix and rest; first no two sizes are equal


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block(layer, hidden, before):
    """From a prefix's hidden states to codes, and attention over them: two ops of ours."""
    prefix = drop_in.to_codes(*layer.keys_values(before))
    return layer(hidden, prefix).relu()


def inputs(before, rest, batch=3):
    return torch.randn(batch, rest, 64), torch.randn(batch, before, 64)


def assert_equal_to_dense(differences, tolerance):
    coded, without = differences
    assert coded <= tolerance
    assert without > 1000 * tolerance  # the prefix matters


@pytest.mark.parametrize(("tokens", "cut"), [(96, 64), (40, 1), (33, 32)])
def test_module_equals_dense_attention(tokens, cut):
    assert_equal_to_dense(drop_in.plain_module("cpu", tokens, cut), 1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_unmodified_model_equals_dense_attention(kind):
    pytest.importorskip("transformers")
    assert_equal_to_dense(drop_in.hugging_face(kind, "cpu"), 5e-5)  # logits reach 20


def with_prefix(kind, batch):
    """A model that attends to 8 coded tokens before its own, and these."""
    model, prefix = drop_in.tiny(kind), []
    for _ in range(3):
        key = torch.randn(batch, 2 if kind == "llama" else 4, 8, 16)
        prefix.append(drop_in.to_codes(key, torch.randn_like(key)))
    drop_in.register()
    model.set_attn_implementation("coded_prefix")
    return model, prefix


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_padding_is_not_attended_to(kind):
    """A row with padding on the left answers as it does alone."""
    pytest.importorskip("transformers")
    model, prefix = with_prefix(kind, 2)
    ids, mask = torch.randint(0, 99, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    positions = 8 + (mask.cumsum(-1) - 1).clamp(min=0)
    rest = {"use_cache": False}
    both = model(ids, attention_mask=mask, position_ids=positions, prefix=prefix, **rest).logits
    second = [(codes[1:], *tables) for codes, *tables in prefix]
    alone = model(ids[1:, 5:], position_ids=positions[1:, 5:], prefix=second, **rest).logits
    torch.testing.assert_close(both[1, 5:], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(kind):
    pytest.importorskip("transformers")
    model, prefix = with_prefix(kind, 1)
    ids, rest = torch.randint(0, 99, (1, 12)), {"prefix": prefix, "use_cache": False}
    positions = 8 + torch.cat([torch.arange(7), torch.arange(5)])[None]
    both = model(ids, position_ids=positions, **rest).logits
    for part in (slice(7), slice(7, 12)):
        alone = model(ids[:, part], position_ids=positions[:, part], **rest).logits
        torch.testing.assert_close(both[:, part], alone, rtol=1e-4, atol=1e-4)


def test_the_program(monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", ["drop_in.py", "--device", "cpu"])
    drop_in.main()
    assert capsys.readouterr().out.count("prefix as codes") == 3


@pytest.mark.parametrize(
    ("dynamic", "compilations"),
    [
        pytest.param(None, 2, id="None"),
        pytest.param(True, 1, id="True", marks=pytest.mark.slow),
        pytest.param(False, len(LENGTHS), id="False", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_compiles_whole_for_any_length(dynamic, compilations):
    """Left to itself, torch compiles for the first lengths and then once more, for all."""
    layer = drop_in.SelfAttention()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend=counter)
    for lengths in LENGTHS:
        hidden, before = inputs(*lengths)
        torch.testing.assert_close(
            compiled(layer, hidden, before), block(layer, hidden, before), rtol=0, atol=0
        )
    assert counter.frame_count == compilations
    for graph in counter.graphs:
        ops = [str(node.target) for node in graph.graph.nodes if "astra" in str(node.target)]
        assert sorted(op.split(".")[1] for op in ops) == ["encode", "mixed_attention"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
@torch.no_grad()
def test_compiles_with_inductor():
    layer = drop_in.SelfAttention()
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for lengths in LENGTHS[:2]:
        hidden, before = inputs(*lengths)
        torch.testing.assert_close(compiled(layer, hidden, before), block(layer, hidden, before))
