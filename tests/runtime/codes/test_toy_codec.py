"""A codec that is nowhere but in this file: the sign of every channel of a block's inputs.

Engine, simulation, costs, predictions and the fit's evaluation run with it once it stands in the
two registries. That nothing else knows codecs by name is read from the sources.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import astra_kernels as ak
from astra_runtime import Codebook
from astra_runtime.codes.base import (
    Bytes,
    Codec,
    CodeCosts,
    Payload,
    TokenBits,
    as_tensor,
    geometry,
)
from astra_runtime.codes.dense import DenseAttention, DenseTokens
from astra_runtime.codes.fields import CodebookFields
from astra_runtime.codes.hidden import SimulatedInputs
from astra_runtime.codes.packed import pack_rows
from astra_runtime.codes.registry import CODECS
from astra_runtime.codes.rotary import Rope, rotate
from astra_runtime.codes.simulated import Quantize, SimulatedCodec
from astra_runtime.costs import costs_of, flops_over_ideal
from astra_runtime.deploy.rates import measure_rates
from astra_runtime.models import Adapter, adapt
from astra_runtime.plan import Plan
from astra_runtime.train.calibration import record
from astra_runtime.train.fit import METHODS, FitMethod
from astra_runtime.train.options import FitData, FitOptions
from astra_runtime.train.simulate import Simulation

from ..models import inputs_for, tiny, windows_for
from ..outputs import logits_of, ranks_output

ROOT = Path(__file__).resolve().parents[3]


class Signs(DenseAttention):
    """A bit a channel; a receiver takes the channel's mean magnitude, with that sign."""

    key = "signs"
    early = True

    def __init__(self, codebook: CodebookFields, adapter: Adapter) -> None:
        assert codebook.tables is not None
        self.adapter = adapter
        self.magnitudes = codebook.tables[:, 0, 1].to(adapter.device)  # [L, D]

    @classmethod
    def token_bits(cls, codebook: CodebookFields, sizes: Mapping[str, int], block: int) -> float:
        return sizes["hidden_size"]

    @classmethod
    def costs(cls, codebook: CodebookFields, adapter: Adapter) -> CodeCosts:
        return CodeCosts(0.0, 7.0)

    @classmethod
    def simulate(
        cls, codebook: CodebookFields, adapter: Adapter, quantize: Quantize, receivers: int
    ) -> SimulatedCodec:
        return SimulatedSigns(codebook, adapter, quantize, receivers)

    def payload_bytes(self, block: int, batch: int, tokens: int) -> int:
        return batch * ak.packed_size(tokens * self.adapter.hidden_size, 1)

    def token_layout(self, block: int, batch: int, tokens: int) -> list[TokenBits]:
        row, width = self.payload_bytes(block, 1, tokens), self.adapter.hidden_size
        return [TokenBits(b * row, width, b) for b in range(batch)]

    def encode(self, block: int, what: Any, rope: Rope, out: Bytes) -> None:
        pack_rows((what > 0).int(), 1, out)

    def decode(
        self, block: int, payloads: Sequence[Payload], batch: int, rope: Rope
    ) -> DenseTokens:
        parts = []
        for payload in payloads:
            shape = (payload.tokens, self.adapter.hidden_size)
            rows = as_tensor(payload.view).view(batch, -1)
            signs = [ak.unpack(r, 1, shape[0] * shape[1]).view(shape) for r in rows]
            parts.append(torch.stack(signs)[:, : payload.num_received])
        estimate = (2.0 * torch.cat(parts, 1) - 1) * self.magnitudes[block]
        key, value = self.adapter.project(block, estimate)
        return DenseTokens(rotate(key, rope), value)


class SimulatedSigns(SimulatedInputs):
    def remote_inputs(self, block: int, x: Tensor, received: Tensor | None) -> list[Tensor]:
        assert self.codebook.tables is not None
        return [torch.where(x > 0, 1.0, -1.0) * self.codebook.tables[block, 0, 1]]


@dataclass(frozen=True)
class SignOptions:
    prefix: int
    vectors_needed: int = 2

    @classmethod
    def of(cls, options: FitOptions, codec: type[Codec], adapter: Adapter) -> SignOptions:
        return cls(options.prefix_for(codec, adapter))


def fit_signs(data: FitData, options: SignOptions) -> Codebook:
    recorded = record(data.adapter, Signs.early, data.windows, data.progress, options.prefix)
    tables = []
    for block in range(len(data.adapter.blocks)):
        size = torch.cat([x.flatten(0, 1) for x in recorded.take(block)]).abs().mean(0)
        tables.append(torch.stack([-size, size])[None])  # one group of two codewords, [1, 2, D]
    codebook = Codebook(
        Signs.key,
        1,
        2,
        tables=torch.stack(tables),
        prefix=options.prefix,
        geometry=geometry(data.adapter),
        model=data.adapter.digest(),
    )
    assert data.evaluate is not None
    codebook.notes["held_back"] = data.evaluate(codebook)
    return codebook


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, Signs.key, Signs)
    monkeypatch.setitem(METHODS, Signs, FitMethod(SignOptions.of, fit_signs))


def fitted(kind: str, model: Any) -> Codebook:
    return Codebook.fit(model, windows_for(kind), space="signs", held_back=2, world_size=2)


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_a_codec_of_one_file_runs_everywhere(kind: str, tmp_path: Path) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 23, batch=2)
    adapter, book = adapt(model), fitted(kind, model)
    assert book.notes["held_back"]["windows"] == 2
    assert book.coded
    assert book.bits == book.token_bits(adapter, 2) == 48

    outputs = ranks_output(model, book, inputs, 3, logits="all", weights=(5, 1, 3))
    tokens = adapter.count(inputs)[1]
    plan = Plan.make(
        tokens, 3, causal=adapter.causal, copies=adapter.class_tokens, shard_weights=(5, 1, 3)
    )
    with torch.no_grad():
        simulated = logits_of(Simulation(model, book, plan, inputs).run())
        exact = logits_of(Simulation(model, Codebook.dense(), plan, inputs).run())
    assert float((simulated - exact).abs().max()) > 1e-2
    for output in outputs:
        torch.testing.assert_close(output, simulated, rtol=2e-4, atol=2e-4)

    assert costs_of(adapter, book) == CodeCosts(0.0, 7.0)
    dense = flops_over_ideal(adapter, Codebook.dense(), tokens, 3)
    assert flops_over_ideal(adapter, book, tokens, 3) > dense
    book.save_pretrained(tmp_path)
    assert Codebook.from_pretrained(tmp_path) == book
    assert measure_rates(model, book, tokens).receive > 0


def test_its_frames_can_be_lost_and_its_model_checked() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 24)
    book = fitted("llama", model)
    plan = Plan.make(24, 2, causal=True)
    with torch.no_grad():
        lost = [
            logits_of(Simulation(model, b, plan, inputs, **given).run())
            for b, given in ((book, {"missed": [(1, 0, n) for n in range(3)]}), (DROP, {}))
        ]
    torch.testing.assert_close(*lost, rtol=2e-4, atol=2e-4)
    with pytest.raises(ValueError, match='"predicted" with space "transform" only'):
        Simulation(model, book, plan, inputs, after_loss="predicted")
    with pytest.raises(ValueError, match="made for a model with weights"):
        ranks_output(tiny("llama", seed=1), book, inputs, 2)


DROP = Codebook.local_only()


# Names of codecs in the sources.


def comparisons(path: Path) -> Iterator[str]:
    """Where a file compares something to a codec's key, or looks something up by it."""
    names = {codec.key for codec in CODECS.values()} - {Signs.key}

    def named(node: ast.AST) -> bool:
        return isinstance(node, ast.Constant) and node.value in names

    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
            items = [p for part in parts for p in (getattr(part, "elts", None) or [part])]
            if any(map(named, items)) and any("space" in ast.unparse(p) for p in parts):
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("folder", ["python/astra_runtime", "bench", "examples"])
def test_nobody_compares_codecs_by_name(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    assert [line for path in paths for line in comparisons(path)] == []


def test_the_check_finds_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "a.py").write_text('x = book.space in ("kv", "hidden")\ny = mode == "none"\n')
    assert list(comparisons(tmp_path / "a.py")) == ["a.py:1: book.space in ('kv', 'hidden')"]


def test_codes_know_nothing_of_training() -> None:
    for path in (ROOT / "python/astra_runtime/codes").glob("*.py"):
        late = {
            node.module
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.ImportFrom) and "train" in (node.module or "")
        }
        assert late == ({"train.fit"} if path.name == "codebook.py" else set()), path.name
