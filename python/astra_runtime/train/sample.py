"""Text that the model itself writes: calibration data of every kind that it has learned.

A corpus at hand is of one kind, and codewords fitted on it serve little else. What a language model
writes when nothing is asked of it is spread over all that it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models import with_cache

BATCH = 24  # sequences at once: the weights are read once for all of them


@torch.inference_mode()
def sampled_windows(
    model: Any,
    windows: int,
    tokens: int,
    *,
    start: int = 0,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Tensor]:
    """`windows` token windows, int64 [tokens] each, drawn from the model's own distribution.

    Every one starts behind token `start`, which is not part of it. Deterministic for a seed and
    number of torch threads.

    Args:
        model: a Hugging Face language model.
        progress: called with the number of tokens done, of `ceil(windows / 24) * tokens`.
    """
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    drawn: list[Tensor] = []
    for first in range(0, windows, BATCH):
        count = min(BATCH, windows - first)
        ids = torch.full((count, 1), start, device=device)
        cache, column = DynamicCache(), ids
        for done in range(tokens):
            output = model(input_ids=column, **with_cache(model, cache))
            chances = output.logits[:, -1].float().softmax(-1).cpu()
            column = torch.multinomial(chances, 1, generator=generator).to(device)
            ids = torch.cat([ids, column], 1)
            progress(first // BATCH * tokens + done + 1)
        drawn += list(ids[:, 1:].cpu())
    return drawn


def document_token(tokenizer: Any) -> int:
    """The token in front of a text: what documents were parted by in training, as far as known."""
    names = tokenizer.get_vocab()
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
    return int(next(t for t in (names.get("<|endoftext|>"), *marks) if t is not None))
