"""What a host has set for torch as a whole, default device and dtype, is not the engine's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import astra_kernels as ak
from astra_runtime import Codebook, Engine
from astra_runtime.evaluate import run_ranks
from astra_runtime.transport import Mesh

from .models import book_of, inputs_for, tiny, windows_for


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Any:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


CODES: dict[str, dict[str, Any]] = {
    "kv": {"groups": 3, "codewords": 16},
    "hidden": {"groups": 2, "codewords": 16},
    "transform": {"bits": 20, "codewords": 8},
}


@pytest.mark.parametrize("space", CODES)
@pytest.mark.parametrize(
    "setting", [lambda: torch.device("meta"), lambda: _default_dtype(torch.float64)]
)
def test_calls_under_another_default(setting: Callable[[], Any], space: str) -> None:
    """Received codes were written to memory of the default device: a crash of the process."""
    model, inputs = tiny("llama"), inputs_for("llama", 70)
    book = book_of(model, "llama", space=space, held_back=0, **CODES[space])

    def work(mesh: Mesh, context: Callable[[], Any]) -> Tensor:
        with context(), Engine(model, book, mesh, halo=0) as engine:
            answer: Tensor = engine(**inputs, logits="all").logits
            draws = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 2}
            engine.generate(inputs["input_ids"], **draws)
            return answer

    want = run_ranks(2, lambda mesh: work(mesh, contextlib.nullcontext))
    for got, own in zip(run_ranks(2, lambda mesh: work(mesh, setting)), want, strict=True):
        assert torch.equal(got, own)


def test_ops_under_another_default_device() -> None:
    tables, query = torch.randn(2, 1, 40, 16), torch.randn(1, 2, 70, 16)
    vectors = torch.randn(300, 2, 16)

    def calls() -> list[Tensor]:
        codes = ak.encode(vectors, tables[:, 0])
        return [
            codes,
            ak.decode(codes, tables[:, 0]),
            ak.pack(codes.flatten(), 6),
            ak.coded_attention(query, codes[None], tables, tables)[0],
            ak.attention(query, query, query, is_causal=True)[0],
            ak.attention(query, query, query, window=(9, 0))[0],
        ]

    want = calls()
    with torch.device("meta"):
        got = calls()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pictures_and_draws_under_another_default_dtype(dtype: torch.dtype) -> None:
    """Means of pictures were sent as fp64, of twice the length: that ended the mesh."""
    vit, llama, picture = tiny("vit"), tiny("llama"), inputs_for("vit")

    def work(mesh: Mesh, context: Callable[[], Any]) -> list[Tensor]:
        with context(), Engine(vit, None, mesh) as engine, Engine(llama, None, mesh) as other:
            answer = engine(**picture, logits="all").logits
            torch.manual_seed(0)
            ids, asked = inputs_for("llama", 70)["input_ids"], {"do_sample": True, "top_k": 9}
            return [answer, other.generate(ids, num_return_sequences=3, max_new_tokens=3, **asked)]

    want = run_ranks(2, lambda mesh: work(mesh, contextlib.nullcontext))
    for got, own in zip(
        run_ranks(2, lambda mesh: work(mesh, lambda: _default_dtype(dtype))), want, strict=True
    ):
        for one, other in zip(got, own, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("space", ["kv", "transform"])
def test_a_fit_under_another_default_dtype(space: str) -> None:
    model, options = tiny("llama"), {"codewords": 8, "held_back": 0, "iterations": 2}
    want = Codebook.fit(model, windows_for("llama", 2), space=space, **options)
    with _default_dtype(torch.float64):
        assert Codebook.fit(model, windows_for("llama", 2), space=space, **options) == want


@pytest.mark.parametrize("space", ["kv", "hidden"])
def test_a_fit_after_an_engine(space: str) -> None:
    """Steps that engines compute otherwise stayed in the model, and gave other codes by rounding:
    so two fits in one process differed, as the first one's evaluation makes engines."""
    model, windows = tiny("llama"), windows_for("llama", 4)
    options = {"codewords": 8, "iterations": 2, "world_size": 2}
    want = Codebook.fit(model, windows, space=space, **options)
    for _ in range(2):
        assert Codebook.fit(model, windows, space=space, **options).digest == want.digest
