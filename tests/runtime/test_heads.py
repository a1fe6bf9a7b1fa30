"""Heads get what they read, whatever is padded: the model's own answer, or a refusal by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from astra_runtime import Codebook, Engine
from astra_runtime.evaluate import run_ranks
from astra_runtime.limits import configured_limit
from astra_runtime.models import adapt, is_language_model
from astra_runtime.transport import Mesh

from .models import tiny

DECODERS = ("Llama", "Mistral", "Qwen2", "Qwen3", "GPT2")
PAD = 0
TOKENS = 17


def with_head(name: str) -> Any:
    """A tiny model of 3 blocks with the head of transformers' class `name`."""
    family = next(f for f in (*DECODERS, "Bert", "XLMRoberta", "ViT") if name.startswith(f))
    labels = 2 if "QuestionAnswering" in name else 4
    config = tiny(family.lower().removeprefix("xlm"), pad_token_id=PAD, num_labels=labels).config
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


def answers(model: Any, inputs: dict[str, Tensor], ranks: int, **options: Any) -> list[Any]:
    def work(mesh: Mesh) -> Any:
        with Engine(model, Codebook.none(), mesh) as engine:
            return engine(**inputs, **options)

    return run_ranks(ranks, work, timeout=20)


def ids_of(batch: int = 3, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (batch, TOKENS), generator=generator)


def padded_right() -> dict[str, Tensor]:
    """Rows of 17, 11 and 2 tokens: on three ranks their last tokens lie on different ones."""
    ids, mask = ids_of(), torch.ones(3, TOKENS, dtype=torch.int64)
    for row, length in ((1, 11), (2, 2)):
        ids[row, length:], mask[row, length:] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("family", DECODERS)
def test_classifiers_on_decoders(family: str, ranks: int) -> None:
    model, inputs = with_head(f"{family}ForSequenceClassification"), padded_right()
    with torch.no_grad():
        want = model(**inputs).logits
    for logits in ("last", "all"):
        for got in answers(model, inputs, ranks, logits=logits):
            torch.testing.assert_close(got.logits, want, atol=1e-3, rtol=1e-3)
    one = answers(model, inputs, ranks, outputs="one")
    assert [got is not None for got in one] == [False] * (ranks - 1) + [True]
    torch.testing.assert_close(one[-1].logits, want, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="expected 'last' or 'all'"):
        answers(model, inputs, ranks, logits="local")


def test_a_classifier_without_a_padding_token_takes_one_row() -> None:
    model = with_head("LlamaForSequenceClassification")
    model.config.pad_token_id = None
    row = {"input_ids": ids_of(1)}
    with torch.no_grad():
        want = model(**row).logits
    torch.testing.assert_close(answers(model, row, 2)[0].logits, want, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="names no pad_token_id"):
        answers(model, {"input_ids": ids_of()}, 2)


EVERY_TOKEN = [
    *(f"{family}For{head}" for family in DECODERS for head in ("TokenClassification",)),
    *(f"{family}ForQuestionAnswering" for family in (*DECODERS, "Bert", "XLMRoberta")),
    "BertForMaskedLM",
    "BertForTokenClassification",
    "XLMRobertaForMaskedLM",
    "XLMRobertaForTokenClassification",
    "GPT2LMHeadModel",
]


@pytest.mark.parametrize("name", EVERY_TOKEN)
def test_heads_of_every_token(name: str) -> None:
    model, inputs = with_head(name), {"input_ids": ids_of()}
    with torch.no_grad():
        want = model(**inputs)
    got = answers(model, inputs, 2, logits="all")[0]
    for field in ("logits", "start_logits", "end_logits"):
        if field in want:
            torch.testing.assert_close(got[field], want[field], atol=2e-3, rtol=1e-3)
    if "QuestionAnswering" in name:
        for logits in ("last", "local"):
            with pytest.raises(ValueError, match="expected 'all' for"):
                answers(model, inputs, 2, logits=logits)


CLASS = [
    "BertForSequenceClassification",
    "BertForNextSentencePrediction",
    "XLMRobertaForSequenceClassification",
]


@pytest.mark.parametrize("name", CLASS)
def test_heads_of_the_class_token(name: str) -> None:
    model, inputs = with_head(name), padded_right()
    with torch.no_grad():
        want = model(**inputs).logits
    for logits in ("last", "all"):
        got = answers(model, inputs, 2, logits=logits)[0].logits
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


UNKNOWN = [
    "GPT2DoubleHeadsModel",
    "BertForPreTraining",
    "BertForMultipleChoice",
    "XLMRobertaForCausalLM",
]


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_heads_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"got transformers.*{name}"):
        Engine(with_head(name))


def test_a_question_head_of_more_labels_is_refused() -> None:
    """transformers unpacks two of them behind the last block, which ended the mesh."""
    config = tiny("bert", num_labels=4).config
    with pytest.raises(ValueError, match="of 2 labels, start and end, got 4; set num_labels=2"):
        Engine(transformers.BertForQuestionAnswering(config).eval())


def test_roberta_s_places_count_what_is_no_padding() -> None:
    """Behind padding's own id, which ids inside a text may be, too, and its table ends earlier."""
    model = tiny("roberta", pad_token_id=3)
    ids = ids_of(2)
    ids[0, 5:9], ids[1, 0] = 3, 3
    with torch.no_grad():
        want = model(input_ids=ids).last_hidden_state
    for got in answers(model, {"input_ids": ids}, 3, logits="all"):
        torch.testing.assert_close(got.last_hidden_state, want, atol=2e-3, rtol=1e-3)
    with Engine(model) as engine:
        engine(input_ids=ids_of(1).repeat(1, 8)[:, :126])
        with pytest.raises(ValueError, match="expected 2 to 126 tokens, the class token first"):
            engine(input_ids=ids_of(1).repeat(1, 8)[:, :127])


@torch.no_grad()
def test_a_roberta_without_padding_s_id_is_refused() -> None:
    """transformers itself counts no positions then; with another id the limit would be another."""
    with pytest.raises(ValueError, match="pad_token_id to be a number, .* got None"):
        Engine(tiny("roberta", pad_token_id=None))
    model = tiny("roberta")
    model.config.pad_token_id = 7
    with pytest.raises(ValueError, match="pad_token_id to be 1, as its embeddings .* got 7"):
        Engine(model)
    config = SimpleNamespace(model_type="roberta", max_position_embeddings=130, pad_token_id=None)
    assert configured_limit(config) == 130


def test_a_roberta_is_named_by_padding_s_id_too() -> None:
    """Ranks of two ids would count positions from two beginnings, and agree on all else."""
    one, other, same = (tiny("roberta", pad_token_id=pad) for pad in (1, 3, 1))
    other.load_state_dict(one.state_dict())
    assert adapt(one).digest() == adapt(same).digest() != adapt(other).digest()
    bert, other = tiny("bert", pad_token_id=1), tiny("bert", pad_token_id=3)
    other.load_state_dict(bert.state_dict())
    assert adapt(bert).digest() == adapt(other).digest()


def test_a_head_for_masked_tokens_is_no_language_model() -> None:
    assert is_language_model(with_head("Qwen3ForCausalLM"))
    assert not is_language_model(with_head("XLMRobertaForMaskedLM"))


def rows_alone(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The last token's logits of each row without its padding, [B, V]."""
    with torch.no_grad():
        rows = [model(ids[n, mask[n].bool()][None]).logits[0, -1] for n in range(len(ids))]
    return torch.stack(rows)


_MODELS = {kind: tiny(kind) for kind in ("llama", "gpt2")}


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(sorted(_MODELS)),
    ranks=st.integers(1, 3),
    rows=st.lists(
        st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS).filter(any),
        min_size=1,
        max_size=3,
    ),
)
def test_any_mask_gives_what_the_rows_alone_give(
    kind: str, ranks: int, rows: list[list[bool]]
) -> None:
    """Padding on the left, on the right and in between; the last token of a row on any rank."""
    model, mask = _MODELS[kind], torch.tensor(rows).long()
    ids = ids_of(len(rows))
    inputs = {"input_ids": ids, "attention_mask": mask}
    want = rows_alone(model, ids, mask)
    for got in answers(model, inputs, ranks):
        torch.testing.assert_close(got.logits[:, -1], want, atol=2e-3, rtol=1e-3)


_WITH_HEADS = {
    name: with_head(name)
    for name in (
        "LlamaForSequenceClassification",
        "GPT2ForTokenClassification",
        "Qwen2ForCausalLM",
        "BertForQuestionAnswering",
        "BertForTokenClassification",
        "BertForSequenceClassification",
        "XLMRobertaForTokenClassification",
        "XLMRobertaForSequenceClassification",
    )
}


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(sorted(_WITH_HEADS)),
    ranks=st.integers(1, 3),
    lengths=st.lists(st.integers(1, TOKENS), min_size=1, max_size=3),
)
def test_any_head_reads_what_it_reads_alone(name: str, ranks: int, lengths: list[int]) -> None:
    """Rows of any lengths, padded on the right."""
    model, ids = _WITH_HEADS[name], ids_of(len(lengths))
    mask = (torch.arange(TOKENS) < torch.tensor(lengths)[:, None]).long()
    ids = ids.where(mask.bool(), PAD)
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask)
    for got in answers(model, {"input_ids": ids, "attention_mask": mask}, ranks, logits="all"):
        for field in ("logits", "start_logits", "end_logits"):
            if field in want:
                shown = mask.bool() if want[field].shape[:2] == mask.shape else slice(None)
                torch.testing.assert_close(
                    got[field][shown], want[field][shown], atol=2e-3, rtol=2e-3
                )


def test_generation_behind_padding_is_refused_before_anything_is_sent() -> None:
    model = tiny("llama")

    def work(mesh: Mesh) -> list[int]:
        with Engine(model, Codebook.none(), mesh) as engine:
            inputs = padded_right()
            with pytest.raises(ValueError, match="pad shorter rows on the left"):
                engine.generate(**inputs, max_new_tokens=2)
            hidden = {"attention_mask": torch.zeros(3, TOKENS, dtype=torch.int64)}
            for call in (engine, engine.generate):
                with pytest.raises(ValueError, match="expected a token to see in every row"):
                    call(**(inputs | hidden))
            out: list[int] = engine.generate(inputs["input_ids"][:1], max_new_tokens=2).tolist()
            return out

    first, second = run_ranks(2, work, timeout=20)
    assert first == second


class MeanPooler(torch.nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.mean(1)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertModel", "ViTModel"])
def test_poolers_that_read_more_than_the_first_token_are_refused(name: str) -> None:
    """They were given the class token alone, and took it for the whole text."""
    model = with_head(name)
    base = getattr(model, "bert", model)
    own, base.pooler = base.pooler, MeanPooler()
    with pytest.raises(ValueError, match="expected a pooler that reads the first token"):
        Engine(model)
    base.pooler = own
    handle = own.register_forward_hook(lambda _, x, out: out * 2)
    Engine(model).close()
    handle.remove()
