"""What a model's head reads of the final hidden states, by the class whose `forward` it runs.

A head sees what the ranks gather for it. One that reads each token by itself may have any of them;
one that reads the class token, or the last token of a row, gets that. A head that reads the token
ids as well, or rebuilds an image from all tokens, would see a shard and take it for the whole.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# How a head reads the hidden states. TOKENS: each token by itself, any of them. EVERY: each token
# by itself, and its answer means nothing without all of them. CLASS: the class token. ROW: of each
# row the last token that is no padding, found by the token ids.
TOKENS, EVERY, CLASS, ROW = "tokens", "every", "class", "row"

_READS = {
    "Model": TOKENS,
    "ForCausalLM": TOKENS,
    "LMHeadModel": TOKENS,
    "ForMaskedLM": TOKENS,
    "ForTokenClassification": TOKENS,
    "ForQuestionAnswering": EVERY,
    "ForSequenceClassification": ROW,
}
_DECODERS = ("Llama", "Mistral", "Qwen2", "GPT2")
_GENERIC = {  # forward passes that transformers shares between families
    "GenericForSequenceClassification": ROW,
    "GenericForTokenClassification": TOKENS,
    "GenericForQuestionAnswering": EVERY,
}
HEADS: dict[str, str] = {
    **_GENERIC,
    **{family + head: reads for family in _DECODERS for head, reads in _READS.items()},
    "BertModel": TOKENS,
    "BertForMaskedLM": TOKENS,
    "BertForTokenClassification": TOKENS,
    "BertForQuestionAnswering": EVERY,
    "BertForSequenceClassification": CLASS,
    "BertForNextSentencePrediction": CLASS,
    "ViTModel": TOKENS,
    "ViTForImageClassification": CLASS,
}


def _forward_of(model: nn.Module) -> type:
    """The class whose `forward` a call of the model runs."""
    return next(kind for kind in type(model).__mro__ if "forward" in kind.__dict__)


def head_reads(model: nn.Module) -> str:
    """TOKENS, EVERY, CLASS or ROW, of a model that `check_head` takes."""
    return HEADS[_forward_of(model).__name__]


def check_head(model: nn.Module) -> None:
    """Refuses a model whose head nobody here knows, by name.

    Raises:
        ValueError: a wrapper, a head of the user's own, or one that reads more than it would get.
    """
    kind = _forward_of(model)
    if kind.__name__ in HEADS and kind.__module__.startswith("transformers."):
        return
    inside = [
        name for name in ("base_model", "model", "module", "_orig_mod") if _is_model(model, name)
    ]
    hint = f"pass the model inside (.{inside[0]})" if inside else "pass the model without its head"
    raise ValueError(
        f"model: expected one of transformers' own with a head that is known here, got "
        f"{type(model).__module__}.{type(model).__name__}; {hint}, and apply what is around it to "
        "the engine's answer"
    )


def _is_model(model: nn.Module, name: str) -> bool:
    inner: Any = model._modules.get(name)
    return inner is not None and hasattr(inner, "config")
