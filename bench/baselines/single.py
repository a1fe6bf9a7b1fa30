"""One device: the model's own forward pass, for the logits that the task needs and no more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .blocks import Transformer
from .comm import Comm


@torch.inference_mode()
def single(model: nn.Module, inputs: Mapping[str, Tensor], comm: Comm) -> Tensor | None:
    """Rank 0 runs the unmodified Hugging Face model with torch's attention; the others rest.

    Exact by definition. Nothing is sent.
    """
    if comm.rank:
        return None
    decoder = Transformer.of(model).causal
    options = {"use_cache": False, "logits_to_keep": 1} if decoder else {}
    logits: Tensor = model(**inputs, **options).logits
    return logits[:, -1] if decoder else logits
