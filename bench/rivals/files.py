"""SmolLM2's weights in the rivals' files, made once from the model's folder into build/rivals.

    python -m bench.rivals.files FOLDER OUTPUT

`smollm2-F32.gguf` is written here; llama.cpp's own quantizer makes Q8_0 and Q4_0 of it, and
CTranslate2's own converter its folder, which it quantizes while it loads. The GGUF files have no
vocabulary: token ids go in and come out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

QUANTIZED: Final = {"Q8_0": 7, "Q4_0": 2}  # llama.cpp's LLAMA_FTYPE_MOSTLY_…
NAMES: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_BLOCK: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def paired(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of a query or key projection in llama.cpp's order.

    It rotates neighbouring channels of a head, where Hugging Face rotates one of the first half
    with one of the second.
    """
    rows, width = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, width)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, width)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a weight of a Llama."""
    if name in NAMES:
        return NAMES[name]
    block, _, part = name.removeprefix("model.layers.").partition(".")
    return f"blk.{block}.{IN_BLOCK[part.removesuffix('.weight')]}.weight"


def write_gguf(folder: Path, file: Path) -> None:
    """A Llama in fp32 as a GGUF file.

    folder: config.json and model.safetensors of a Hugging Face model.
    """
    from gguf import GGUFWriter, LlamaFileType
    from safetensors.numpy import load_file

    config: Mapping[str, Any] = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(file, "llama")
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, weight in load_file(folder / "model.safetensors").items():
        value = weight.astype(np.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = paired(value, heads if "q_proj" in name else kv_heads)
        writer.add_tensor(gguf_name(name), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make(folder: Path, output: Path) -> None:
    """All files that are not there yet; runs where the rivals are installed."""
    import llama_cpp
    from ctranslate2.converters import TransformersConverter

    output.mkdir(parents=True, exist_ok=True)
    whole = output / "smollm2-F32.gguf"
    if not whole.exists():
        part = whole.with_suffix(".part")
        write_gguf(folder, part)
        part.rename(whole)
    for form, kind in QUANTIZED.items():
        file = output / f"smollm2-{form}.gguf"
        if file.exists():
            continue
        part = file.with_suffix(".part")
        asked = llama_cpp.llama_model_quantize_default_params()
        asked.ftype = kind
        failed = llama_cpp.llama_model_quantize(str(whole).encode(), str(part).encode(), asked)
        if failed:
            raise RuntimeError(f"llama.cpp could not write {file.name}: status {failed}")
        part.rename(file)
    if not (output / "ctranslate2" / "model.bin").exists():
        TransformersConverter(str(folder)).convert(str(output / "ctranslate2"), force=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
