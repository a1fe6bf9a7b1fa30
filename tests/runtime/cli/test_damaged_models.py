"""Models and codebooks whose files lack something, or contradict each other, are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from astra_runtime.store import (
    DamagedModel,
    ModelNotFound,
    at_hand,
    load_model,
    load_tokenizer,
)

from ..models import tiny

Here = Callable[..., tuple[str, str]]


def test_files_that_lack_weights_are_no_model(tmp_path: Path) -> None:
    model = tiny("llama")
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(DamagedModel, match=r"lack 1 weights, model.layers.1.mlp.up_proj.weight"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_a_configuration_that_contradicts_the_weights_is_named(tmp_path: Path, form: str) -> None:
    """In another form they were taken as they are, without a word."""
    tiny("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"num_key_value_heads": 1}))
    words = r"expected model.layers.0.self_attn.k_proj.weight with shape \[16, 48\], got \[48, 48\]"
    with pytest.raises(DamagedModel, match=f"its config.json contradicts its weights: {words}"):
        load_model(str(tmp_path), form)
    file.write_text(json.dumps(config | {"hidden_size": 50}))
    with pytest.raises(DamagedModel, match="its config.json is wrong"):
        load_model(str(tmp_path), form)


def _with_biases(state: dict[str, Any]) -> None:
    state["model.layers.0.self_attn.q_proj.bias"] = torch.ones(48)


def _with_scales(state: dict[str, Any]) -> None:
    state["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(1)


@pytest.mark.parametrize("form", ["float32", "int8"])
@pytest.mark.parametrize(
    ("change", "said", "key"),
    [
        (None, {"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight"),
        (_with_biases, {}, "model.layers.0.self_attn.q_proj.bias"),
        (_with_scales, {}, "model.layers.0.mlp.up_proj.weight_scale"),
    ],
)
def test_weights_that_the_model_would_pass_over_are_named(
    tmp_path: Path, form: str, change: Any, said: dict[str, Any], key: str
) -> None:
    """It gave the answers of a smaller model, without a word."""
    model = tiny("llama")
    state = model.state_dict()
    if change is not None:
        change(state)
    model.save_pretrained(tmp_path, state_dict=state)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    with pytest.raises(DamagedModel, match=f"contradicts its weights: expected no {key}, as"):
        load_model(str(tmp_path), form)


@pytest.mark.parametrize(
    "asked",
    [
        ["fit", "--output", "{made}"],
        ["eval", "--codebook", "none"],
        ["finetune", "--control", "exact", "--output", "{made}"],
    ],
)
def test_a_model_of_images_is_named(
    here: Here,
    tmp_path: Path,
    asked: list[str],
) -> None:
    """It was said to lack a tokenizer."""
    tiny("vit").save_pretrained(tmp_path / "vit")
    filled = [part.format(made=tmp_path / "made") for part in asked]
    told = here(*filled, "--model", str(tmp_path / "vit"), code=1)[1]
    assert "which reads images" in told


def test_files_may_hold_more_than_a_model(tmp_path: Path) -> None:
    """Tables of older versions, and the head of a model whose body is loaded."""
    model = tiny("llama")
    state = model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    model.save_pretrained(tmp_path, state_dict=state)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {"architectures": ["LlamaModel"]}
    file.write_text(json.dumps(config))
    assert type(load_model(tmp_path)).__name__ == "LlamaModel"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized .gptq.; load"),
        ({"architectures": ["OurLlama"]}, "names the class 'OurLlama', which transformers 5"),
    ],
)
def test_models_of_other_libraries_are_named(
    tmp_path: Path, said: dict[str, Any], words: str
) -> None:
    tiny("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    with pytest.raises(DamagedModel, match=words):
        load_model(str(tmp_path))
    with pytest.raises(TypeError, match="model: expected a name, a folder or a file, got NoneType"):
        load_model(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", {"architectures": True}, "cannot be loaded: TypeError"),
        ("generation_config.json", 3, "cannot be loaded: TypeError"),
        ("tokenizer_config.json", {"tokenizer_class": [1]}, "has no tokenizer here .AttributeErr"),
        ("tokenizer.json", {"version": 1}, "has no tokenizer here .Exception: invalid type"),
    ],
)
def test_files_that_say_nonsense_are_named_with_their_model(
    home: Path,
    tmp_path: Path,
    file: str,
    content: Any,
    words: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(home / "model", folder)
    if isinstance(content, dict):
        content = json.loads((folder / file).read_text()) | content
    (folder / file).write_text(json.dumps(content))
    load = load_tokenizer if "tokenizer" in file else load_model
    with pytest.raises(ModelNotFound, match=f"model '{folder}' {words}"):
        load(str(folder))


def test_doctor_finds_a_cut_model(
    home: Path,
    here: Here,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "models" / "smollm2"
    tiny("llama").save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("ASTRA_CACHE", str(tmp_path))
    assert at_hand("smollm2") == str(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    found = json.loads(here("doctor", "--json", code=1)[0])
    assert not found["healthy"]
    assert [name for name, check in found["checks"].items() if not check["ok"]] == ["model smollm2"]
