"""What a model's head reads of the final hidden states, by the class whose `forward` it runs.

A head sees what the ranks gather for it. One that reads each token by itself may have any of them;
one that reads the class token, or the last token of a row, gets that. A head that reads the token
ids as well, or rebuilds an image from all tokens, would see a shard and take it for the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .projection import is_plain
from .quantized import QuantizedLinear

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
_OF_ENCODERS = {
    "Model": TOKENS,
    "ForMaskedLM": TOKENS,
    "ForTokenClassification": TOKENS,
    "ForQuestionAnswering": EVERY,
    "ForSequenceClassification": CLASS,
}
_TRANSFORMERS = "transformers."
_DECODERS = ("Llama", "Mistral", "Qwen2", "Qwen3", "GPT2")
_ENCODERS = ("Bert", "Roberta", "XLMRoberta")
_GENERIC = {  # forward passes that transformers shares between families
    "GenericForSequenceClassification": ROW,
    "GenericForTokenClassification": TOKENS,
    "GenericForQuestionAnswering": EVERY,
}
HEADS: dict[str, str] = {
    **_GENERIC,
    **{family + head: reads for family in _DECODERS for head, reads in _READS.items()},
    **{family + head: reads for family in _ENCODERS for head, reads in _OF_ENCODERS.items()},
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
        ValueError: a wrapper, a head of the user's own, or one that reads more than it would get;
            a question-answering head without a start and an end.
    """
    kind = _forward_of(model)
    if kind.__name__ in HEADS and kind.__module__.startswith(_TRANSFORMERS):
        labels = getattr(getattr(model, "qa_outputs", None), "out_features", 2)
        if labels != 2:  # transformers fails behind the last block
            raise ValueError(
                "model: expected a question-answering head of 2 labels, start and end, got "
                f"{labels}; set num_labels=2 in its configuration"
            )
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


def check_forward(model: nn.Module) -> None:
    """Refuses a model, or one whose base, computes something else than its class does: what is
    around the blocks in a forward pass of the user's own would see a shard for the whole.

    Raises:
        ValueError: a base of the user's own, a `forward` that was set on the model or its base, or
            on the class of either; accelerate's and torch.compile's are those of the class.
    """
    prefix = getattr(model, "base_model_prefix", "")
    for module in dict.fromkeys((model, getattr(model, prefix, model))):
        where = "the model" if module is model else f"model.{prefix}"
        kind = _forward_of(module)
        own = kind.__dict__["forward"]
        said = f"{kind.__module__}.{kind.__name__}"
        theirs = said.startswith(_TRANSFORMERS)
        if theirs:  # it may have been set on the class
            said = f"{own.__module__}.{own.__qualname__}"
        if not said.startswith(_TRANSFORMERS) and (theirs or module is not model):
            raise ValueError(
                f"model: expected a forward of transformers' own in {where}, got that of {said}"
            )
        set_on = module.__dict__.get("forward")
        if set_on is None or "_hf_hook" in module.__dict__:
            continue
        compiled: Any = getattr(set_on, "_torchdynamo_orig_callable", None)
        if getattr(compiled, "__func__", None) is not own:
            raise ValueError(
                f"model: expected the forward of {kind.__name__} in {where}, got another one that "
                "was set on it; take it away (del model.forward), and apply what it adds to the "
                "engine's answer"
            )


_HEADS = ("lm_head", "score", "cls", "qa_outputs", "classifier")
_LINEAR = (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Tanh, QuantizedLinear)


def _own_class(module: nn.Module) -> tuple[type, ...]:
    return (type(module),) if type(module).__module__.startswith(_TRANSFORMERS) else ()


@torch.no_grad()
def check_head_module(model: nn.Module, hidden_size: int, dtype: torch.dtype) -> None:
    """Refuses a head that was put in or hooked and reads tokens together: it gets some of them.

    Raises:
        ValueError: it gives other answers of tokens one by one than of all, or a pooler reads more
            than the first one.
    """
    tokens = torch.arange(3 * hidden_size, device=next(model.parameters()).device)
    tokens = tokens.sin().to(dtype).view(1, 3, -1)
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    pooler: Any = getattr(base, "pooler", None)
    if not _is_of_its_class(pooler) and not _alike(pooler(tokens), pooler(tokens[:, :1])):
        raise ValueError(
            f"model: expected a pooler that reads the first token, got {type(pooler).__name__}, "
            "whose answer depends on others"
        )
    name = next((name for name in _HEADS if hasattr(model, name)), None)
    if head_reads(model) == CLASS or name is None:
        return
    head: Any = getattr(model, name)
    if _is_of_its_class(head):
        return
    apart = torch.cat([head(token) for token in tokens.split(1, 1)], 1)
    if not _alike(head(tokens), apart):
        raise ValueError(
            f"model: expected a head that reads each token by itself, got {type(head).__name__} in "
            f"{name}, whose answer to a token depends on others"
        )


def _is_of_its_class(head: Any) -> bool:
    """Whether a head is what its class says, or there is none."""
    parts = [] if head is None else head.modules()
    return all(is_plain(part, *_LINEAR, *_own_class(part)) for part in parts)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether they differ by rounding alone."""
    bound = 0.05 * one.abs().amax().float()
    return one.shape == other.shape and bool(((one - other).abs().float() <= bound).all())


def _is_model(model: nn.Module, name: str) -> bool:
    inner: Any = model._modules.get(name)
    return inner is not None and hasattr(inner, "config")
