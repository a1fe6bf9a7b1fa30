"""The gradients of ops: each an op of its own, which torch's autograd layer asks for.

``torch.library.register_autograd`` would do, but for ``torch.func.grad``, which it does not serve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from astra_kernels._library.registration import State, library, register

# Gradients of out and lse, out, lse.
States = tuple[Tensor | None, Tensor | None, Tensor, Tensor]

# Arguments whose gradients are stored as models have tokens, [B, M, H, d].
TOKENS = ("query", "key", "value")

_functorch = torch._C._functorch


def register_autograd(
    name: str, backward: Callable[..., Any], save: Callable[..., None] | None = None
) -> None:
    """``save(ctx, inputs, output)`` keeps what ``backward(ctx, *grads)`` needs."""
    op = getattr(torch.ops.astra, name).default

    def below(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, *given: Any) -> Any:
        *args, keyset = given
        output = below(keyset, *args)
        if save is not None:
            save(ctx, tuple(args), output)
        return tuple(output) if isinstance(output, list) else output

    def backward_of_all(ctx: Any, *grads: Any) -> Any:
        _refuse_batches(name, grads)
        return *backward(ctx, *grads), None

    body = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_all)}
    function: Any = type(f"Astra_{name}", (_SingleLevelFunction,), body)

    def kernel(keyset: Any, *args: Any) -> Any:
        _refuse_tangents(name, args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below(keyset, *args)
        allowed = _functorch.get_single_level_autograd_function_allowed()
        _functorch.set_single_level_autograd_function_allowed(True)
        try:
            output = function.apply(*args, keyset)
        finally:
            _functorch.set_single_level_autograd_function_allowed(allowed)
        return output if op._schema.returns[0].type.kind() != "ListType" else list(output)

    library.impl(name, kernel, "Autograd", with_keyset=True)


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    if forward_ad._current_level < 0:
        return
    for value in args:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            op = name.removesuffix("_backward")
            raise RuntimeError(
                f"astra_kernels.{op} has no forward-mode derivative, but an input is "
                f"differentiated in forward mode: use astra_kernels.{op}.reference"
            )


def _refuse_batches(name: str, grads: tuple[Any, ...]) -> None:
    """torch.func.jacrev asks for the gradients of several outputs at once."""
    if _functorch.peek_interpreter_stack() is None:
        return
    if any(isinstance(grad, Tensor) and _functorch.is_batchedtensor(grad) for grad in grads):
        op = name.removesuffix("_backward")
        raise RuntimeError(
            f"astra_kernels.{op} has no gradients of several outputs at once (torch.func.jacrev, "
            f"vmap): ask for one after another, or use astra_kernels.{op}.reference"
        )


def register_gradient(
    schema: str, gradient: Callable[..., Mapping[str, Tensor]], *, to: Sequence[str]
) -> None:
    """The gradient of an op that gives (out, lse), to the arguments named in ``to``.

    It is an op of its own, ``<name>_backward``: the gradients of out and of lse (None: there is
    none), out and lse, the places of the arguments whose gradients are asked for, then all of the
    op's arguments. It gives a list of the gradients. ``gradient(states, wanted, *arguments)`` gives
    them by name, of any layout and dtype.
    """
    name, _, rest = schema.partition("(")
    arguments = rest.rpartition(") ->")[0]
    names = tuple(argument.split()[-1] for argument in arguments.split(", "))

    def backward(
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        wanted: Sequence[int],
        *args: Any,
    ) -> list[Tensor]:
        asked = frozenset(names[place] for place in wanted)
        grads = gradient((grad_out, grad_lse, out, lse), asked, *args)
        return [stored_like(grads[names[i]], args[i], names[i] in TOKENS) for i in wanted]

    def fake(
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        wanted: Sequence[int],
        *args: Any,
    ) -> list[Tensor]:
        return [new_like(args[i], names[i] in TOKENS) for i in wanted]

    register(
        f"{name}_backward(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, "
        f"int[] wanted, {arguments}) -> Tensor[]",
        backward,
        fake,
    )
    saved = Gradient(name, names, frozenset(to))
    register_autograd(name, saved.backward, saved.save)
    register_once_differentiable(name)


def new_like(tensor: Tensor, tokens: bool) -> Tensor:
    """A gradient in memory: that of [B, H, M, d] stored as [B, M, H, d], others contiguous."""
    if not tokens or tensor.ndim != 4:
        return tensor.new_empty(tensor.shape)
    batch, heads, rows, width = tensor.shape
    return tensor.new_empty((batch, rows, heads, width)).transpose(1, 2)


def stored_like(grad: Tensor, tensor: Tensor, tokens: bool) -> Tensor:
    """The gradient to ``tensor``, as ``new_like`` promises it."""
    grad = grad.to(tensor.dtype)
    if not tokens or tensor.ndim != 4:
        return grad.reshape(tensor.shape).contiguous()
    stored = grad.transpose(1, 2)
    return grad if stored.is_contiguous() else stored.contiguous().transpose(1, 2)


def register_once_differentiable(name: str) -> None:
    """Second derivatives of an op are refused where they are asked for."""

    def refuse(ctx: Any, *grads: object) -> NoReturn:
        raise RuntimeError(
            f"astra_kernels.{name} has no second derivative: use the differentiable "
            f"astra_kernels.{name}.reference"
        )

    register_autograd(f"{name}_backward", refuse)


@dataclass(frozen=True)
class Gradient:
    """What autograd keeps of a call, and how it asks for the gradient."""

    op: str
    names: tuple[str, ...]  # of the op's arguments
    to: frozenset[str]

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: State) -> None:
        for name, needed in zip(self.names, ctx.needs_input_grad, strict=False):
            if needed and name not in self.to:
                raise RuntimeError(
                    f"astra_kernels.{self.op} has no gradient to {name}, but {name} requires grad: "
                    f"detach it, or use the differentiable astra_kernels.{self.op}.reference"
                )
        ctx.set_materialize_grads(False)
        ctx.places = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*output, *(inputs[i] for i in ctx.places))

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * len(self.names)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[: len(result)]) if needed]
        if all(grad is None for grad in grads):
            return tuple(result)
        out, lse, *tensors = ctx.saved_tensors
        arguments = list(ctx.others)
        for place, tensor in zip(ctx.places, tensors, strict=True):
            arguments[place] = tensor
        op = getattr(torch.ops.astra, f"{self.op}_backward")
        for place, grad in zip(wanted, op(*grads, out, lse, wanted, *arguments), strict=True):
            result[place] = grad
        return tuple(result)
