"""After the last block: bringing the final hidden states to where the head runs.

Hidden states cross as they are, in the model's dtype; for the last token or the class token that is
one vector a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .trace import stage
from .transport import Mesh

if TYPE_CHECKING:
    from .layer import Call

# Control numbers in the frames' block field, behind every real block.
HEAD, TOKEN, JOB_SIZE, JOB, REPORT = 0xFF00, 0xFF01, 0xFF02, 0xFF03, 0xFF04
CLOCK, TRACE_SIZE, TRACE = 0xFF05, 0xFF06, 0xFF07


def send_tensor(mesh: Mesh, tensor: Tensor, *, block: int, plan: int, to: Iterable[int]) -> None:
    """Sends a tensor's bytes to `to`; whoever receives it knows shape and dtype."""
    receivers = tuple(to)
    if not receivers:
        return
    flat = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    frame = mesh.buffer(flat.numel())
    torch.frombuffer(frame.payload, dtype=torch.uint8).copy_(flat)
    with stage("send"):
        mesh.send(frame, block=block, plan=plan, to=receivers)


def receive_tensors(
    mesh: Mesh,
    shapes: Mapping[int, tuple[int, ...]],
    like: Tensor,
    *,
    block: int,
    plan: int,
) -> dict[int, Tensor]:
    """The tensors of the given shapes that these ranks sent, with the dtype of `like`."""
    sizes = {n: like.dtype.itemsize * torch.Size(shape).numel() for n, shape in shapes.items()}
    with stage("wait"):
        views = mesh.receive(sizes, block=block, plan=plan) if sizes else {}
    return {
        n: torch.frombuffer(view, dtype=torch.uint8)
        .to(like.device, copy=True)
        .view(like.dtype)
        .view(shapes[n])
        for n, view in views.items()
    }


def gather(call: Call, hidden: Tensor) -> Tensor:
    """The hidden states that `call.answer` asks for, from this rank's [B, copies + T, D].

    "last": the last token of a decoder, [B, 1, D], or the mean of all ranks' class tokens
    (Distributed Class Tokens: with dense exchange the copies are equal). "all": the class token and
    all tokens. "local": what this rank has. A rank that is not to have the answer gets its own.
    """
    plan, rank = call.plan, call.rank
    if call.answer == "local" or call.mesh.world_size == 1:
        last = call.answer == "last"
        return hidden if not last else hidden[:, -1:] if plan.causal else hidden[:, :1]
    if call.answer == "all":
        piece, senders = hidden, set(range(plan.world_size))
    elif not plan.causal:
        piece, senders = hidden[:, : plan.copies], set(range(plan.world_size))
    else:
        piece, senders = hidden[:, -1:], {plan.owner}

    takers = set(range(plan.world_size)) if call.everywhere else {plan.owner}
    if rank in senders:
        send_tensor(call.mesh, piece, block=HEAD, plan=call.tag, to=sorted(takers - {rank}))
    if rank not in takers:
        return piece
    whole = call.answer == "all"
    shapes = {
        n: (len(hidden), plan.copies + plan.size(n) if whole else 1, hidden.shape[-1])
        for n in senders - {rank}
    }
    pieces = receive_tensors(call.mesh, shapes, hidden, block=HEAD, plan=call.tag)
    if rank in senders:
        pieces[rank] = piece
    ordered = [pieces[n] for n in sorted(pieces)]
    if plan.causal and not whole:
        return ordered[0]
    first = [p[:, : plan.copies] for p in ordered]
    token = first[0] if plan.causal else torch.stack(first).mean(0)
    return torch.cat([token, *(p[:, plan.copies :] for p in ordered)], 1)
