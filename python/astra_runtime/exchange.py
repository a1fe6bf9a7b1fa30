"""What ranks tell each other in a call: a block's codes, and at the end the final hidden states.

Hidden states cross as they are, in the model's dtype; for the last token or the class token that is
one vector a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .call import Call
from .codes.base import arrived
from .control import Control
from .last_tokens import LastTokens
from .trace import stage
from .transport import require


def send_tensor(call: Call, tensor: Tensor, *, block: int, to: Iterable[int]) -> None:
    """Sends a tensor's bytes to `to`; whoever receives it knows shape and dtype.

    Behind them comes what this rank knows to be missing, where ranks may be left out.
    """
    mesh, missing = call.mesh, call.missing
    receivers = tuple(to)
    if not receivers:
        return
    flat = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    size = flat.numel()
    frame = mesh.buffer(size + (missing.all_width if missing else 0))
    torch.frombuffer(frame.payload, dtype=torch.uint8)[:size].copy_(flat)
    if missing:
        missing.write_all(frame.payload[size:])
    with stage("send"):
        partial = missing is not None
        mesh.send(frame, block=block, plan=call.tag, to=receivers, partial=partial)


def receive_tensors(
    call: Call, shapes: Mapping[int, tuple[int, ...]], like: Tensor, *, block: int
) -> dict[int, Tensor]:
    """The tensors of the given shapes that these ranks sent, with the dtype of `like`.

    Where ranks may be left out, those that are not needed get no longer than a block's exchange.
    """
    sizes = {n: like.dtype.itemsize * torch.Size(shape).numel() for n, shape in shapes.items()}
    with stage("wait"):
        views = _receive(call, sizes, block) if sizes else {}
    return {
        n: torch.frombuffer(view, dtype=torch.uint8)
        .to(like.device, copy=True)
        .view(like.dtype)
        .view(shapes[n])
        for n, view in views.items()
    }


def _receive(call: Call, sizes: dict[int, int], block: int) -> dict[int, memoryview]:
    mesh, missing, tag = call.mesh, call.missing, call.tag
    patience = mesh.timeout if call.patience is None else call.patience
    if missing is None:
        return mesh.receive(sizes, timeout=patience, block=block, plan=tag)
    totals = {n: size + missing.all_width for n, size in sizes.items()}
    needed = {n: totals[n] for n in call.needed & totals.keys()}
    frames = mesh.receive(needed, timeout=patience, partial=True, block=block, plan=tag)
    require(mesh, frames, needed, block, patience)
    rest = {n: total for n, total in totals.items() if n not in needed}
    frames |= mesh.receive(rest, timeout=call.deadline, partial=True, block=block, plan=tag)
    missing.leave_out(missing.answer, sizes.keys() - frames.keys())
    for n, view in frames.items():
        missing.read_all(view[sizes[n] :], n)
    return {n: view[: sizes[n]] for n, view in frames.items()}


def gather(call: Call, hidden: Tensor) -> Tensor:
    """The hidden states that `call.answer` asks for, from this rank's [B, copies + T, D].

    "last": the last token of a decoder, [B, 1, D], or the mean of all ranks' class tokens
    (Distributed Class Tokens: with dense exchange the copies are equal), of those that came where
    ranks may be left out. "all": the class token and all tokens. "local": what this rank has. A
    rank that is not to have the answer gets its own.
    """
    plan, rank = call.plan, call.rank
    if call.answer == "last" and call.last_tokens is not None:
        return _gather_last_tokens(call, call.last_tokens, hidden)
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
        send_tensor(call, piece, block=Control.HEAD, to=sorted(takers - {rank}))
    if rank not in takers:
        return piece
    whole = call.answer == "all"
    shapes = {
        n: (len(hidden), plan.copies + plan.size(n) if whole else 1, hidden.shape[-1])
        for n in senders - {rank}
    }
    pieces = receive_tensors(call, shapes, hidden, block=Control.HEAD)
    if rank in senders:
        pieces[rank] = piece
    ordered = [pieces[n] for n in sorted(pieces)]
    if plan.causal and not whole:
        return ordered[0]
    first = [p[:, : plan.copies] for p in ordered]
    token = first[0] if plan.causal else torch.stack(first).mean(0)
    return torch.cat([token, *(p[:, plan.copies :] for p in ordered)], 1)


def _gather_last_tokens(call: Call, last: LastTokens, hidden: Tensor) -> Tensor:
    """[B, 1, D], each row's last token, from whichever ranks have them."""
    rank, senders = call.rank, last.senders
    takers = set(range(call.plan.world_size)) if call.everywhere else {call.plan.owner}
    pieces = {rank: last.take(hidden, rank)} if rank in senders else {}
    if pieces:
        send_tensor(call, pieces[rank], block=Control.HEAD, to=sorted(takers - {rank}))
    if rank not in takers:
        return hidden[:, -1:]
    sizes = {n: len(last.rows(n)) for n in sorted(senders - {rank})}
    shapes = {n: (rows, 1, hidden.shape[-1]) for n, rows in sizes.items()}
    return last.put(pieces | receive_tensors(call, shapes, hidden, block=Control.HEAD))


def receive_codes(
    call: Call, block: int, sizes: dict[int, int]
) -> tuple[dict[int, memoryview], dict[int, Tensor]]:
    """The payloads of a block, by rank, and of those that did not come, or not whole, which tokens
    are there, bool [B, T]. What did not come is zeros."""
    mesh, missing, tag = call.mesh, call.missing, call.tag
    if missing is None:
        return mesh.receive(sizes, block=block, plan=tag, timeout=call.deadline), {}
    totals = {n: size + missing.width for n, size in sizes.items()}
    frames = mesh.receive(totals, block=block, plan=tag, timeout=call.deadline, partial=True)
    needed = call.needed & sizes.keys()
    if mesh.lossy:  # that a frame was lost says nothing of its sender, who will have an answer
        needed &= mesh.lost.keys()
    require(mesh, frames, needed, block, call.deadline or mesh.timeout)
    views, came = {}, {}
    for n, size in sizes.items():
        tokens = call.plan.num_sent(n)
        gaps = mesh.missing_ranges.get(n, ()) if n in frames else [(0, totals[n])]
        view = frames[n] if n in frames else memoryview(bytearray(totals[n]))
        for start, stop in gaps:
            view[start:stop] = bytes(stop - start)
        if gaps:
            strips = call.space.strips(block, call.batch, tokens)
            came[n] = arrived(strips, call.batch, tokens, gaps)
        missing.read_recent(block, view[size:], n)
        views[n] = view[:size]
    missing.leave_out(block, came)
    return views, came
