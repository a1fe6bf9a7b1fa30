"""Whether what somebody has put into a model treats each token by itself.

Ranks hold parts of a sequence. A hook that writes to the last token, or a layer of somebody's own
that takes a mean over tokens, would do so on every rank's part, and no frame would show it: in a
block attention alone may read tokens together. So where a model holds anything that may do so (a
hook that changes something, a patched `forward`, modules of unknown classes) it is run on a few
tokens, with attention that answers each token by itself: once on all of them, and once on each of
two parts. The results have to agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AstraError, ModelChanged
from ..limits import configured_limit
from ..plan import Plan
from .base import Adapter
from .during_calls import set_forward
from .families import pair
from .heads import CLASS, ROW
from .own_hooks import hooks_of_all
from .quantized import QuantizedEmbedding, QuantizedLinear, is_quantized

TOKENS = 8  # that a text model is tried on
# Modules of torch's that read each token by itself.
_TOKENWISE = (
    *(nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Conv2d, nn.Identity),
    *(nn.Dropout, nn.Sequential, nn.ModuleList, nn.ModuleDict, QuantizedLinear, QuantizedEmbedding),
)
# A compiled module is looked into, as containers are.
_KNOWN = ("transformers.", "torch.ao.", "torch._dynamo.")
_THEIRS = ("transformers.", "torch.", "astra_runtime.")  # forward passes of classes
# Of a token's hidden state, what products of other shapes may round differently.
_ROUNDING, _ROUNDING_OF_16_BITS, _ROUNDING_OF_INTEGERS = 0.01, 0.1, 0.2


class Apart:
    """Looks at a model's hooks and patches at every call, and tries the model where there are new
    ones."""

    def __init__(self, adapter: Adapter) -> None:
        # what makes embeddings that are cut afterwards sees all of them
        before = adapter.cut_after()
        whole = set() if before is None else set(before.modules())
        self.adapter = adapter
        self._modules = [module for module in adapter.base.modules() if module not in whole]
        self._kinds: list[Any] = list(dict.fromkeys(map(type, self._modules)))
        self._strange = not all(map(_is_known, self._modules))
        self._tried: tuple[Any, ...] | None = None if self._strange else ()
        adapter.hooks.watch(adapter.model, adapter.base)

    def check(self) -> None:
        """Raises ModelChanged where what is done to one token depends on others."""
        parts = self._parts()
        if parts == self._tried:
            return
        block = _first_mixed(self.adapter) if parts or self._strange else None
        if block is not None:
            raise ModelChanged(
                "what a hook, a patch or a module of somebody's own does to a token, in block "
                f"{block} or around it, depends on other tokens or on its place among those that "
                "it is given, which are a part of the sequence; let it treat each token by itself"
            )
        self._tried = parts

    def _parts(self) -> tuple[Any, ...]:
        """The patches of modules and of classes, the hooks that have changed something, and those
        that torch calls for every module."""
        patches = [
            module.__dict__["forward"]
            for module in self._modules
            if "forward" in module.__dict__ and _is_patched(module)
        ]
        patches += [kind.forward for kind in self._kinds if _is_patched_class(kind)]
        changing = self.adapter.hooks.changing([*self._modules, self.adapter.model])
        everywhere = [hook for hook in hooks_of_all() if not _is_of_torch(hook)]
        return (*patches, *changing, *everywhere)


def _is_of_torch(hook: Any) -> bool:
    """Whether it is one of torch's own, which count or name modules and change nothing."""
    return str(getattr(hook, "__module__", "")).startswith("torch.")


def _is_patched(module: nn.Module) -> bool:
    """Whether a module's `forward` is neither its class's, compiled or not, nor one of ours."""
    forward = set_forward(module)
    if forward is None:
        return False
    compiled: Any = getattr(forward, "_torchdynamo_orig_callable", None)
    return getattr(compiled, "__func__", None) is not type(module).forward


def _is_patched_class(kind: Any) -> bool:
    """Whether somebody has set the `forward` of a class that is not theirs."""
    ours = kind.__module__.startswith(_THEIRS)
    return ours and not kind.forward.__module__.startswith(_THEIRS)


def _is_known(module: nn.Module) -> bool:
    kind = type(module)
    if kind.__module__ == "torch.nn.modules.activation":
        return kind is not nn.MultiheadAttention
    return kind in _TOKENWISE or kind.__module__.startswith(_KNOWN)


class _Trial:
    """A listener of one part, in which attention answers each token with its own value."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.plan, self.rank = plan, rank
        self.hidden: list[Tensor] = []  # the input of each block, and the final hidden states

    def embedded(self, hidden: Tensor) -> Tensor:
        return self.plan.local_tokens(hidden, self.rank)

    def before_block(self, block: int, hidden: Tensor) -> None:
        self.hidden.append(hidden.clone())

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1)

    def finish(self, hidden: Tensor) -> Tensor:
        self.hidden.append(hidden.clone())
        return hidden


@torch.no_grad()
def _first_mixed(adapter: Adapter) -> int | None:
    """The first block up to which two parts of a sequence differ from the whole; None: none."""
    inputs = _inputs(adapter)
    tokens, copies = adapter.count(inputs)[1], adapter.class_tokens
    if tokens < 2:
        return None
    whole, halves = (
        Plan.make(tokens, ranks, causal=adapter.causal, copies=copies) for ranks in (1, 2)
    )
    try:
        want = _hidden(adapter, inputs, whole, 0)
        parts = [_hidden(adapter, inputs, halves, rank) for rank in (0, 1)]
    except AstraError:
        raise
    except Exception:  # the call itself tells, of inputs that it knows
        return None
    rounding = _rounding(adapter)
    for place, hidden in enumerate(want):
        for rank, part in enumerate(parts):
            if not _alike(halves.local_tokens(hidden, rank), part[place], rounding):
                return min(max(0, place - 1), len(adapter.blocks) - 1)
    return None


def _hidden(adapter: Adapter, inputs: dict[str, Tensor], plan: Plan, rank: int) -> list[Tensor]:
    trial = _Trial(plan, rank)
    options: dict[str, Any] = {"return_dict": True}
    if adapter.causal:
        options["use_cache"] = False
    with adapter.listening(trial):
        output = adapter.model(**adapter.local_inputs(inputs, plan, rank), **options)
    if adapter.head not in (CLASS, ROW):  # what a hook on the model has made of them
        answer = output[0]
        trial.hidden.append(answer if answer.dim() > 2 else answer[..., None])
    return trial.hidden


def _inputs(adapter: Adapter) -> dict[str, Tensor]:
    """A text of different tokens, or a picture."""
    config: Any = adapter.model.config
    if adapter.token_ids:
        count = min(TOKENS + adapter.class_tokens, configured_limit(config) or TOKENS)
        ids = 1 + 7 * torch.arange(count, device=adapter.device)
        return {"input_ids": ids[None] % int(config.vocab_size)}
    shape = (1, int(config.num_channels), *pair(config.image_size))
    values = torch.arange(torch.Size(shape).numel(), device=adapter.device).sin()
    return {"pixel_values": values.view(shape).to(adapter.dtype)}


def _rounding(adapter: Adapter) -> float:
    if is_quantized(adapter.model):
        return _ROUNDING_OF_INTEGERS
    wide = adapter.dtype in (torch.float32, torch.float64)
    return _ROUNDING if wide else _ROUNDING_OF_16_BITS


def _alike(one: Tensor, other: Tensor, rounding: float) -> bool:
    """Whether each token's hidden state [1, N, D] differs by rounding alone; what is not finite is
    met where it is sent."""
    if one.shape != other.shape:
        return False
    one, other = one.float(), other.float()
    apart = (one - other).norm(dim=-1) > rounding * one.norm(dim=-1)
    return not bool((apart & one.isfinite().all(-1) & other.isfinite().all(-1)).any())
