"""A model in memory made one of integers."""

from __future__ import annotations

from typing import Any

from .families import adapt
from .quantized import BITS, form_of, is_quantized, quantizable, quantized_module, tie_head


def quantize(model: Any, form: str) -> None:
    """Makes a model in memory one of integers, layer by layer; in place.

    Args:
        model: a supported Hugging Face model of floating-point weights, on a CPU.
        form: "int8" or "int4".

    Raises:
        ValueError: another form, weights that are no plain floating point, or are not finite.
    """
    if form not in BITS:
        raise ValueError(f"form: expected one of {', '.join(BITS)}, got {form!r}")
    if is_quantized(model):
        raise ValueError(f"model: expected floating-point weights, got {form_of(model)}")
    adapter = adapt(model)
    checkpoints = adapter.checkpoints()
    kinds = quantizable(model, adapter.blocks)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is getattr(embeddings, "weight", None)
    for name, kind in kinds.items():
        parent, _, last = name.rpartition(".")
        module: Any = model.get_submodule(name)
        made = quantized_module(kind, module.weight, getattr(module, "bias", None), form)
        setattr(model.get_submodule(parent), last, made)
    if tied and "head" in kinds.values():
        tie_head(model)
    adapter.set_checkpoints(checkpoints)
