"""The benchmark beside llama.cpp and CTranslate2: files, tokens, tables; neither is needed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from bench.latency.tables import rivals
from bench.rivals.__main__ import check_tokens, methods
from bench.rivals.files import paired, write_gguf
from tests.runtime.models import tiny


def test_rotated_channels_are_made_neighbours() -> None:
    weight = np.arange(8, dtype=np.float32)[:, None]  # two heads of four channels
    assert paired(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_gguf_file_has_every_weight(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf")
    reader = GGUFReader(tmp_path / "model.gguf")
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert len(found) == len(model.state_dict()) - model.config.tie_word_embeddings
    layer = model.model.layers[1]
    assert torch.equal(found["token_embd.weight"], model.model.embed_tokens.weight)
    assert torch.equal(found["blk.1.ffn_down.weight"], layer.mlp.down_proj.weight)
    assert torch.equal(found["blk.1.attn_norm.weight"], layer.input_layernorm.weight)
    heads = model.config.num_attention_heads
    key = found["blk.1.attn_q.weight"].unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    assert torch.equal(key, layer.self_attn.q_proj.weight)
    assert reader.fields["llama.block_count"].parts[-1][0] == model.config.num_hidden_layers
    theta = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]["rope_theta"]
    assert reader.fields["llama.rope.freq_base"].parts[-1][0] == pytest.approx(theta)


def row(method: str, form: str, ms: float, devices: int = 1, same: bool = True) -> dict[str, Any]:
    chosen = [m for m in methods([1], ["Q8_0"]) if (m.method, m.form) == (method, form)]
    name = next(m for m in chosen if m.ranks == devices).name
    found = {"method": method, "name": name, "form": form, "devices": devices, "threads": 1}
    return found | {"ms": {"p50": ms}, "processor_ms": ms, "token": 7, "same_token": same}


ROWS = [
    row("astra", "float32", 2000.0),
    row("astra", "int8", 1000.0, devices=2),
    row("llama_cpp", "Q8_0", 4000.0),
    row("llama_cpp", "Q4_0", 3000.0, same=False),
    row("llama_cpp_rpc", "Q8_0", 8000.0, devices=2),
]


def test_full_precision_has_to_give_torchs_token() -> None:
    check_tokens([*ROWS, row("astra", "float32", 1.0, devices=2, same=False)])
    with pytest.raises(RuntimeError, match="ctranslate2 float32: expected torch's first token"):
        check_tokens([row("ctranslate2", "float32", 1.0, same=False)])


def test_the_table_has_ratios_to_our_single_device() -> None:
    report = {"rows": ROWS, "command": "python -m bench.rivals", "device": "a CPU"}
    report |= {"versions": {"torch": "2"}, "rivals": {"ctranslate2": "4"}}
    lines = rivals(report).splitlines()
    assert "| **astra int8, 2 devices** | 1 | 1.00 | 1.00 | 2.00× | yes |" in lines
    assert "| llama.cpp Q4_0 | 1 | 3.00 | 3.00 | 0.67× | no |" in lines
    assert "| llama.cpp rpc Q8_0, 2 devices | 1 | 8.00 | 8.00 | 0.25× | yes |" in lines
