"""Embeddings and classes from several ranks, as one device gives them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from astra_runtime import Engine
from astra_runtime.serve.encoding import Encoding
from astra_runtime.serve.service import QueueFull, RequestRefused

from ..models import tiny
from .service import leading, prompt


@contextlib.contextmanager
def encoding(model: Any, world_size: int, **options: Any) -> Iterator[Encoding]:
    def make(engine: Engine) -> Encoding:
        return Encoding(engine, **options)

    with leading(model, world_size, make) as leader:
        yield leader


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_are_one_devices(pooling: str) -> None:
    """Short texts on one rank each, a long one on all."""
    model = tiny("bert")
    texts = [prompt(tokens, tokens) for tokens in (1, 12, 20, 100, 7)]
    with encoding(model, 2, pooling=pooling) as leader:
        leader.embed([[1, 2, 3]]).result(20)  # from now on a token's cost is known
        found = leader.embed(texts).result(30)
        assert leader.costs.exchange is not None  # the long one was read by all ranks
    for ids, embedding in zip(texts, found, strict=True):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        pooled = states[0] if pooling == "cls" else states.mean(0)
        torch.testing.assert_close(
            torch.tensor(embedding.vector), F.normalize(pooled, dim=0), atol=1e-5, rtol=1e-4
        )
        assert embedding.tokens == len(ids)


def png(side: int = 20) -> bytes:
    from PIL import Image

    pixels = torch.arange(side * side).view(side, side).remainder(251).to(torch.uint8)
    out = io.BytesIO()
    Image.frombytes("L", (side, side), bytes(pixels.flatten().tolist())).save(out, "PNG")
    return out.getvalue()


def test_classes_are_one_devices() -> None:
    pytest.importorskip("PIL")
    model = tiny("vit", num_labels=5)
    with encoding(model, 2) as leader:
        pixels = leader._prepare(png())  # type: ignore[misc]
        with torch.no_grad():
            expected = model(pixel_values=pixels).logits[0].softmax(-1)
        leader.costs.exchange = 0.0  # so that the second one is read by all ranks
        for _ in range(2):
            (labels,) = leader.classify([png()], top=3).result(20)
            assert [label.id for label in labels] == expected.topk(3).indices.tolist()
            assert labels[0].score == pytest.approx(float(expected.max()), abs=1e-5)
            assert labels[0].name == f"LABEL_{labels[0].id}"
        with pytest.raises(RequestRefused, match="expected a PNG or JPEG"):
            leader.classify([b"no image"])


def test_texts_that_no_rank_can_read_are_refused() -> None:
    with encoding(tiny("bert"), 1, max_queue=1) as leader:
        for texts in ([[]], [[97]], [prompt(129)]):
            with pytest.raises(RequestRefused):
                leader.embed(texts)
        with leader._changed:
            waiting = leader.embed([[1]])
            with pytest.raises(QueueFull):
                leader.embed([[2]])
        assert len(waiting.result(20)) == 1


def test_pictures_and_patches_that_are_no_squares() -> None:
    model = tiny("vit", image_size=(8, 12), patch_size=(4, 6), num_labels=3)
    with encoding(model, 2) as leader:
        assert leader._patches() == 4


def test_models_whose_answers_are_no_vectors_are_refused() -> None:
    for name, kind in (("BertForTokenClassification", "bert"), ("ViTModel", "vit")):
        model = getattr(transformers, name)(tiny(kind).config).eval()
        with Engine(model) as engine, pytest.raises(ValueError, match=f"without a head.*{name}"):
            Encoding(engine)
